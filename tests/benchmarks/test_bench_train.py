from __future__ import annotations

import bench_train_gpu as bench
import pytest
import rows


def test_our_model_and_the_transformer_train_and_a_missing_peer_is_a_row(tmp_path):
    line = f"--device cpu --size tiny --shapes 2x16,1x32 --steps 1 --models ours,fla,transformer --out {tmp_path / 'out.jsonl'}"
    args = bench.parse(line.split())
    found = rows.run("train", bench.plan(args), args, "cpu")
    assert [(r["shape"], r["impl"]) for r in found] == [(s, m) for s in ("2x16", "1x32") for m in ("ours", "fla", "transformer")]
    for result in found:
        if result["impl"] == "fla":
            assert "failed" in result
        else:
            assert result["tokens_per_s"] > 0 and 0 < result["loss"] < 20
    text = bench.table(found).splitlines()
    assert len(text) == 4 and "2x16" in text[0] and "1x32" in text[0]


def test_compared_models_are_of_equal_size():
    for size in ("like_fla", "gdn_1.3b"):
        ours, other = bench.OURS[size].num_parameters(), bench.TRANSFORMER[size].num_parameters()
        assert abs(ours / other - 1) < 0.01, (size, ours, other)


def test_utilisation_counts_the_scores_of_attention_and_knows_devices():
    short, long = (bench.utilisation(bench.TRANSFORMER["like_fla"], n, 1_300_000_000, 50e3, "NVIDIA H200") for n in (2048, 16384))
    assert short["mfu_6n"] == long["mfu_6n"] == pytest.approx(6 * 1.3e9 * 50e3 / 989e12, abs=1e-3)
    assert long["mfu"] > 1.2 * short["mfu"] > 1.2 * 0.9 * short["mfu_6n"]
    assert bench.utilisation(bench.OURS["tiny"], 8, 1, 1.0, "an unknown card") == {}


def test_compile_names_what_is_compiled():
    args = bench.parse(["--device", "cpu", "--compile", "--models", "ours,fla,transformer"])
    assert args.models == ["ours compiled", "fla", "transformer compiled"]


@pytest.mark.parametrize(
    ("line", "message"),
    [("--shapes 4096", "expected batch x length"), ("--size big", "invalid choice"), ("--steps 0 --device cpu", "at least 1")],
)
def test_bad_arguments_are_named(line, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(line.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("model", "processes"), [("ours", 0), ("transformer compiled", 0), ("fla", 3)])
def test_only_what_fla_tunes_is_compiled_ahead(model, processes, monkeypatch, asked_ahead):
    monkeypatch.setattr(bench, "measure", lambda *arguments: {"model": arguments[0]})
    args = bench.parse(["--device", "cpu", "--shapes", "1x8", "--compilers", "3", "--compile-limit", "40", "--models", model])
    (row,) = bench.plan(args)
    found = row.measure()
    assert asked_ahead == [(processes, 40)]
    assert found["model"] == model and found["configurations"] == 9
