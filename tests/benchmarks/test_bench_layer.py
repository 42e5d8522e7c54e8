from __future__ import annotations

import inspect
import json
from pathlib import Path

import bench_layer_gpu as bench
import pytest
import rows
import torch

from gdn import mixers
from gdn.hf.families import family
from gdn.models.lm import LM
from gdn.ops import ops


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
    assert all(list(r["errors"]) == ["y", "dx", "dw"] and 0 < max(r["errors"].values()) < 1e-4 for r in found)
    assert [json.loads(text)["mixer"] for text in out.read_text().splitlines()] == list(bench.PAIRS)


def test_the_table_shows_ratios_and_gaps():
    both = [{"mixer": "gla", "impl": impl, "eager_ms": ms, "parameters": 7} for impl, ms in (("ours", 2.0), ("fla", 3.0))]
    both[0]["errors"] = {"y": 1e-3, "dx": 4e-3, "dw": 2e-3}
    text = bench.table([*both, {"mixer": "swat", "impl": "ours", "failed": "broken"}]).splitlines()
    assert "1.50" in text[1] and "7/7" in text[1] and text[1].endswith("4.0e-03/-/-")
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


def measured(impl="ours", name="gated_deltanet", more=""):
    (row,) = bench.plan(bench.parse(f"--device cpu --width 128 --shape 2x12 --repeats 3 --mixers {name} --impls {impl} {more}".split()))
    return row.measure()


class Played:
    """FLA's layer of a mixer, played by ours: weights under FLA's names and in FLA's layout, laid back whenever it runs."""

    def __init__(self, name, dtype, scale):
        self.name, self.scale, self.inner = name, scale, bench.PAIRS[name].ours(128).build(128).to(dtype)
        weights = bench.as_theirs(name, 128, self.inner.state_dict())
        self.weights = {key: torch.zeros_like(weight, dtype=dtype).requires_grad_() for key, weight in weights.items()}

    def load_state_dict(self, weights):
        assert weights.keys() == self.weights.keys()
        with torch.no_grad():
            for key, weight in weights.items():
                self.weights[key].copy_(weight)

    def named_parameters(self):
        return self.weights.items()

    def parameters(self):
        return self.weights.values()

    def __call__(self, x):
        model = LM.Config(vocab=8, width=128, layers=1, mlp=0, pattern=(bench.PAIRS[self.name].ours(128),))
        ours, found = {f"blocks.0.mixer.{key}": weight for key, weight in self.inner.state_dict().items()}, {}
        for rule in family(bench.FORMATS[self.name]).rules(model):
            if all(key in ours for key in rule.ours):
                theirs = [self.weights[key.split(".", 4)[-1]] for key in rule.theirs]
                found |= zip(rule.ours, rule.read(theirs, [len(ours[key]) for key in rule.ours]))
        found = {key.removeprefix("blocks.0.mixer."): weight.to(ours[key].dtype) for key, weight in found.items()}  # decays in float32
        return self.scale * torch.func.functional_call(self.inner, found, (x,))[0]


@pytest.fixture
def play(monkeypatch):
    """Let `Played` stand in for FLA's layer of a mixer, with its output scaled."""

    def playing(name, scale=1.0):
        def fla(pair, width, device, dtype):
            module = Played(name, dtype, scale)
            return module, module

        monkeypatch.setattr(bench, "fla", fla)

    return playing


@pytest.mark.parametrize("name", bench.FORMATS)
def test_errors_of_flas_layer_are_those_with_our_weights(name, play):
    play(name)
    errors = measured("fla", name, "--dtype fp32")["errors"]
    assert all(0 < error < 1e-4 for error in errors.values()), errors


def test_a_scaled_output_of_flas_layer_is_seen(play):
    play("gated_deltanet", 1.1)
    assert measured("fla", more="--dtype fp32")["errors"] == pytest.approx({"y": 0.1, "dx": 0.1, "dw": 0.1}, abs=1e-3)


def test_a_scaled_output_of_an_operator_is_seen(monkeypatch):
    """The reference rows that errors are against know nothing of it."""
    op = ops()["gated_delta_rule"]
    rule = op.function("chunked")

    def scaled(*arguments, **options):
        o, state = rule(*arguments, **options)
        return torch.cat([o[:-1], 1.1 * o[-1:]]), state  # of the last sequence alone

    sound = measured(more="--dtype fp32")["errors"]
    monkeypatch.setitem(op._functions, "chunked", scaled)
    faulty = measured(more="--dtype fp32")["errors"]
    assert max(sound.values()) < 1e-4 and max(faulty.values()) > 0.01, (sound, faulty)


def test_a_comparison_that_fails_keeps_the_times(monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("no room for float64")

    monkeypatch.setattr(bench, "errors", broken)
    found = measured()
    assert found["eager_ms"] > 0 and found["errors_missing"] == "OutOfMemoryError: no room for float64"


def test_a_weight_without_a_place_is_named():
    weights = bench.PAIRS["gla"].ours(128).build(128).state_dict()
    with pytest.raises(ValueError, match=r"the format gla has no place for blocks\.0\.mixer\.extra"):
        bench.as_theirs("gla", 128, weights | {"extra": torch.zeros(1)})


@pytest.mark.parametrize(("impl", "processes"), [("ours", 0), ("ours compiled", 0), ("fla", 3)])
def test_only_what_fla_tunes_is_compiled_ahead(impl, processes, monkeypatch, asked_ahead):
    monkeypatch.setattr(bench, "measure", lambda *arguments: {"note": "no flash-attn"})
    args = bench.parse(["--device", "cpu", "--mixers", "gla", "--compilers", "3", "--compile-limit", "40", "--impls", impl])
    (row,) = bench.plan(args)
    found = row.measure()
    assert asked_ahead == [(processes, 40)]
    assert found["configurations"] == 9
    assert found["note"] == "no flash-attn; 1 of 9 configurations took too long to compile: slow"
