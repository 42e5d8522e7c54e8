from __future__ import annotations

from typing import Any

import bench_accelerate_gpu as bench
import pytest
import recorded
import report
import rows
import torch

LINE = "--device cpu --size tiny --train-shapes 2x12 --decode-shapes 3x5 --train-steps 1 --decode-steps 2"


def test_both_models_train_alike_and_what_cannot_run_here_is_a_row(tmp_path):
    out = tmp_path / "accelerate.jsonl"
    args = bench.parse([*LINE.split(), "--impls", "stock,gdn,gdn graph", "--out", str(out)])
    found = rows.run("accelerate_gpu", bench.plan(args), args, "cpu")
    expected = [("train", "stock"), ("train", "gdn"), ("decode", "gdn graph"), ("decode", "stock"), ("decode", "gdn")]
    assert [(r["work"], r["impl"]) for r in found] == expected
    assert all(r["ms"] > 0 and r["tokens_per_s"] > 0 for r in found if r["impl"] != "gdn graph")
    stock, ours = (torch.tensor(r["losses"]) for r in found[:2])
    torch.testing.assert_close(ours, stock, rtol=1e-3, atol=0)
    assert [r["rule"] for r in found[:2]] == [bench.stock_rule(), "gdn"]
    assert found[2]["failed"] == "ValueError: a CUDA graph needs a GPU"
    text = bench.table(found).splitlines()
    assert len(text) == 6 and text[1].endswith("1.00") and "needs a GPU" in text[3]
    page = report.text(recorded.load(tmp_path))
    assert "| train, 2x12 | gdn | gdn |" in page and "| decode, 3x5 | stock |" in page


def test_every_decoding_step_that_is_timed_gives_the_same_tokens(monkeypatch):
    """Over a cache that grows and over one whose addresses stay."""
    seen: dict[str, list[torch.Tensor]] = {}

    def follow(step: Any, steps: int, device: torch.device) -> float:
        token = next(c.cell_contents for c in step.__wrapped__.__closure__ if isinstance(c.cell_contents, torch.Tensor))
        for _ in range(steps):
            step()
            tokens.append(token.clone())
        return 1.0

    monkeypatch.setattr(bench, "seconds_per_step", follow)
    monkeypatch.setattr(bench, "captured", lambda step, device: step)
    for impl in ("stock", "gdn", "stock graph", "gdn graph"):
        tokens = seen[impl] = []
        bench.decode(impl, "tiny", 3, 5, 12, torch.device("cpu"))
    for impl, found in seen.items():
        assert len(found) == 12
        assert torch.equal(torch.cat(found, 1), torch.cat(seen["stock"], 1)), impl
    assert len(torch.cat(seen["stock"], 1).unique()) > 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--train-shapes 8 --device cpu", "--train-shapes: '8': expected batch x length"),
        ("--decode-steps 0 --device cpu", "--decode-steps: expected at least 1"),
        ("--impls fla", "expected some of gdn compiled, stock"),
    ],
)
def test_bad_arguments_are_named(line, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(line.split())
    assert message in capsys.readouterr().err
