from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import bench_layer_gpu as bench
import pytest
import rows
import torch

from gdn import mixers


def test_every_mixer_has_a_row():
    files = {path.stem for path in Path(mixers.__file__).parent.glob("*.py")}
    assert set(bench.PAIRS) == files - {"__init__", "base"}


def test_a_run_measures_every_mixer_of_ours(tmp_path):
    out = tmp_path / "layer.jsonl"
    line = f"--device cpu --dtype fp32 --width 128 --shape 1x16 --repeats 3 --impls ours --out {out}"
    args = bench.parse(line.split())
    found = rows.run("layer", bench.plan(args), args, "cpu")
    assert [r["mixer"] for r in found] == list(bench.PAIRS)
    assert not [r for r in found if "failed" in r]
    assert all(r["parameters"] > 0 and r["eager_ms"] > 0 and r["forward_ms"] > 0 for r in found)
    assert [json.loads(text)["mixer"] for text in out.read_text().splitlines()] == list(bench.PAIRS)


def test_the_table_shows_ratios_and_gaps():
    both = [{"mixer": "gla", "impl": impl, "eager_ms": ms, "parameters": 7} for impl, ms in (("ours", 2.0), ("fla", 3.0))]
    text = bench.table([*both, {"mixer": "swat", "impl": "ours", "failed": "broken"}]).splitlines()
    assert "1.50" in text[1] and "7/7" in text[1]
    assert text[2].startswith("swat") and "1.50" not in text[2]


@pytest.mark.parametrize(
    ("line", "message"), [("--width 100 --device cpu", "multiple of 128"), ("--mixers glaa", "'glaa': expected some of")]
)
def test_bad_arguments_are_named(line, message, capsys):
    with pytest.raises(SystemExit):
        bench.parse(line.split())
    assert message in capsys.readouterr().err


def test_no_pair_shares_a_config_by_accident():
    built = {name: pair.ours(1024) for name, pair in bench.PAIRS.items()}
    assert all(inspect.getmodule(type(config)).__name__ == f"gdn.mixers.{name}" for name, config in built.items())


@pytest.mark.parametrize("name", bench.FORMATS)
def test_errors_are_those_of_layers_with_the_same_weights(name, monkeypatch):
    """FLA's layer is played by ours, with the weights that are handed over laid back."""

    class Played(torch.nn.Module):
        def load_state_dict(self, theirs):
            self.theirs = theirs

    played, handed = Played(), []
    monkeypatch.setattr(bench, "fla", lambda pair, width, device, dtype: (played, lambda x: handed[0](x)[0]))
    real = bench.their_weights

    def seen(name, config, module, width):
        handed.append(copy.deepcopy(module))
        return real(name, config, module, width)

    monkeypatch.setattr(bench, "their_weights", seen)
    args = bench.parse(["--device", "cpu", "--width", "128", "--shape", "1x16"])
    found = bench.errors(name, args)
    assert 0 < found["error_ours"] == found["error_fla"] < 0.05
    assert sum(w.numel() for w in played.theirs.values()) == sum(w.numel() for w in handed[0].state_dict().values())


def test_a_weight_without_a_place_is_named():
    module = bench.PAIRS["gla"].ours(128).build(128)
    module.register_buffer("extra", torch.zeros(1))
    with pytest.raises(ValueError, match=r"the format gla has no place for blocks\.0\.mixer\.extra"):
        bench.their_weights("gla", bench.PAIRS["gla"].ours(128), module, 128)


@pytest.mark.parametrize(("impl", "processes"), [("ours", 0), ("ours compiled", 0), ("fla", 3), ("error", 3)])
def test_only_what_fla_tunes_is_compiled_ahead(impl, processes, monkeypatch, asked_ahead):
    monkeypatch.setattr(bench, "measure", lambda *arguments: {"note": "no flash-attn"})
    monkeypatch.setattr(bench, "errors", lambda *arguments: {"note": "no flash-attn"})
    args = bench.parse(["--device", "cpu", "--mixers", "gla", "--compilers", "3", "--compile-limit", "40", "--impls", impl])
    (row,) = bench.plan(args)
    found = row.measure()
    assert asked_ahead == [(processes, 40)]
    assert found["configurations"] == 9
    assert found["note"] == "no flash-attn; 1 of 9 configurations took too long to compile: slow"
