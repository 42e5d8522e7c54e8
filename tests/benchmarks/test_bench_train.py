from __future__ import annotations

import sys
from types import SimpleNamespace

import bench_train_gpu as bench
import pytest
import rows
import torch
from on_gpu import gpu

from gdn.hf.families import family
from gdn.models import LM
from gdn.ops import ops

FORMAT = family("gated_deltanet")


def test_our_model_and_the_transformer_train_and_a_missing_peer_is_a_row(tmp_path):
    line = f"--device cpu --size tiny --shapes 2x16,1x32 --steps 1 --models ours,fla,transformer --graph --out {tmp_path / 'out.jsonl'}"
    args = bench.parse(line.split())
    found = rows.run("train", bench.plan(args), args, "cpu")
    assert [(r["shape"], r["impl"]) for r in found] == [(s, m) for s in ("2x16", "1x32") for m in ("ours", "fla", "transformer")]
    for result in found:
        if result["impl"] == "fla":
            assert "failed" in result
        else:
            assert not {"graph_ms", "graph_error"} & set(result) and result["tokens_per_s"] > 0 and 0 < result["loss"] < 20
            assert 0 < result["errors"]["loss"] < 1e-2 and 0 < result["errors"]["gradients"] < 0.2
    text = bench.table(found).splitlines()
    assert len(text) == 4 and "2x16" in text[0] and "1x32" in text[0]


@gpu
@pytest.mark.parametrize("model", ["ours", "ours blocks", "transformer"])
def test_a_step_is_timed_as_a_graph_and_errors_are_measured_after_it(model):
    found = bench.measure(model, "tiny", 2, 600, 2, "cuda", graph=True)
    assert "graph_error" not in found and found["graph_ms"] > 0
    assert max(found["errors"].values()) < 0.2


def errors(model="ours", length=200):
    """Of the tiny model at two sequences of that length, in float32."""
    module, loss = bench.gdn(model, "tiny", "cpu")
    return bench.errors(module.float(), loss, torch.randint(256, (2, length)))


@pytest.mark.parametrize("length", [200, bench.SHORT + 100])
@pytest.mark.parametrize("model", ["ours", "transformer"])
def test_errors_are_those_of_the_first_tokens_of_the_last_sequence(model, length):
    """The other tokens have no part in loss and gradients."""
    assert max(errors(model, length).values()) < 1e-4


def test_errors_are_at_weights_that_are_drawn_alike():
    """Whatever a model began with and has learned."""
    module, loss = bench.gdn("ours", "tiny", "cpu")
    with torch.no_grad():
        for weight in module.parameters():
            weight.fill_(3.0)
    bench.errors(module.float(), loss, torch.randint(256, (2, 20)))
    for name, weight in module.named_parameters():
        assert (weight.dim() == 1 and (weight == 3).all()) or 0.015 < weight.std() < 0.025, name


def test_a_scaled_output_of_an_operator_is_seen(monkeypatch):
    """Where float64 is served by another row, as it is on a GPU."""
    op = ops()["gated_delta_rule"]
    rule = op.function("chunked")

    def scaled(q, *arguments, **options):
        o, state = rule(q, *arguments, **options)
        return (o if q.dtype == torch.float64 else 1.1 * o), state

    monkeypatch.setitem(op._functions, "chunked", scaled)
    assert errors()["gradients"] > 0.001


class Played:
    """FLA's model, played by ours: weights under FLA's names and in FLA's layout, laid back whenever it runs."""

    def __init__(self, scale):
        config = bench.OURS["tiny"]
        config = config.with_(pattern=(config.pattern[0].with_(beta_bias=False, norm_eps=1e-5),))
        values = FORMAT.write_config(config)
        self.config = SimpleNamespace(to_dict=lambda: values)
        self.inner, self.scale = LM(config), scale
        ours = self.inner.state_dict()
        pairs = [pair for rule in FORMAT.rules(config) for pair in zip(rule.theirs, rule.write([ours[name] for name in rule.ours]))]
        self.weights = {name: weight.clone().requires_grad_() for name, weight in pairs}

    def state_dict(self):
        return self.weights

    def named_parameters(self):
        return self.weights.items()

    def parameters(self):
        return self.weights.values()

    def zero_grad(self, set_to_none):
        for weight in self.weights.values():
            weight.grad = None

    def to(self, dtype):
        return self

    def __call__(self, input_ids, labels):
        """A label is asked of the token before it, as in transformers."""
        weights, targets = bench.as_ours(self.inner.config, self.weights), torch.full_like(labels, -100)
        targets[:, :-1] = labels[:, 1:]
        loss = torch.func.functional_call(self.inner, weights, (input_ids,), {"targets": targets}).loss
        return SimpleNamespace(loss=self.scale * loss)


@pytest.mark.parametrize(("scale", "error"), [(1.0, 0.0), (1.1, 0.1)])
def test_the_errors_of_flas_model_are_against_ours_with_its_weights(scale, error, monkeypatch):
    models = SimpleNamespace(GatedDeltaNetConfig=dict, GatedDeltaNetForCausalLM=lambda config: Played(scale))
    monkeypatch.setitem(sys.modules, "fla.models", models)
    monkeypatch.setitem(bench.FLA, "tiny", {})
    (row,) = bench.plan(bench.parse(["--device", "cpu", "--size", "tiny", "--shapes", "2x40", "--steps", "1", "--models", "fla"]))
    assert row.measure()["errors"] == pytest.approx({"loss": error, "gradients": error}, abs=1e-4)


def test_a_comparison_that_fails_keeps_the_times(monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("no room for float64")

    monkeypatch.setattr(bench, "in_float64", broken)
    found = bench.measure("ours", "tiny", 2, 16, 1, "cpu")
    assert found["step_ms"] > 0 and found["errors_missing"] == "OutOfMemoryError: no room for float64"


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
