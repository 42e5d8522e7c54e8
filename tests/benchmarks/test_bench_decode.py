from __future__ import annotations

import bench_decode_gpu as bench
import pytest
import rows
import torch


def test_models_decode_and_what_cannot_run_here_is_a_row(tmp_path):
    line = f"--device cpu --size tiny --batches 1,3 --context 5 --steps 2 --out {tmp_path / 'out.jsonl'} --impls"
    args = bench.parse([*line.split(), "ours,transformer,fla,ours graph"])
    found = rows.run("decode", bench.plan(args), args, "cpu")
    assert [(r["impl"], r["batch"]) for r in found] == [(i, b) for i in ("ours", "transformer", "fla", "ours graph") for b in (1, 3)]
    assert all(r["tokens_per_s"] > 0 and r["ms_per_token"] > 0 for r in found[:4])
    assert all("failed" in r for r in found[4:])
    assert all(0 < r["errors"]["logits"] < 0.02 for r in found[:4])
    text = bench.table(found).splitlines()
    assert len(text) == 5 and "B=1" in text[0] and "needs a GPU" not in text[1]


def test_the_measured_step_is_greedy_decoding(monkeypatch):
    """The loop that is timed gives the tokens of `generate` at temperature 0."""
    from gdn.models.sampling import Sampling, generate

    seen = []

    def follow(step, steps, device):
        token = next(c.cell_contents for c in step.__wrapped__.__closure__ if isinstance(c.cell_contents, torch.Tensor))
        for _ in range(steps):
            seen.append(token.clone())
            step()
        return 1.0

    drawn = []

    def tokens(vocab, batch, length, device):
        drawn.append(torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(len(drawn))))
        return drawn[-1].clone()

    monkeypatch.setattr(bench, "seconds_per_step", follow)
    monkeypatch.setattr(bench, "random_tokens", tokens)
    torch.manual_seed(0)
    with torch.no_grad():
        model, _, _ = bench.ours("ours", "tiny", 2, 6, 4, torch.device("cpu"))
    expected = generate(model, torch.cat(drawn, dim=1), Sampling(temperature=0.0))
    for token in seen:
        assert torch.equal(token.squeeze(1), next(expected))


def test_errors_see_what_a_step_forgets(monkeypatch):
    model = bench.prepared(bench.LM(bench.train.config("ours", "tiny")), torch.device("cpu"))
    kept = bench.error(model, "ours", "tiny", 2, 8, torch.device("cpu"))
    forward = type(model).forward
    monkeypatch.setattr(type(model), "forward", lambda self, x, state=None: forward(self, x, state=self.init_state(len(x))))
    forgotten = bench.error(model, "ours", "tiny", 2, 8, torch.device("cpu"))
    assert kept["logits"] < 0.02 < forgotten["logits"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--batches 0 --device cpu", "whole numbers above 0"),
        ("--steps 0 --device cpu", "at least 1"),
        ("--impls hf", "expected some of ours graph"),
    ],
)
def test_bad_arguments_are_named(line, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(line.split())
    assert message in capsys.readouterr().err
