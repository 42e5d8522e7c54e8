"""`gdn check` finds nothing in our models, finds what leaks in stock transformers, and finds leaks that are planted."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import gdn
from gdn import cli
from gdn.core.errors import ArgumentError
from gdn.hf.convert import convert
from gdn.mixers import GatedDeltaNet
from gdn.models import LM, store
from gdn.testing import model_checks
from gdn.testing.model_checks import Finding, OwnModel, check_model


def own(width: int = 32) -> LM:
    torch.manual_seed(0)
    return LM(LM.Config(vocab=64, width=width, layers=2, mlp=64, pattern=(GatedDeltaNet.Config(heads=2, head_dim=16),)))


def stock() -> Any:
    import transformers

    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
    sizes = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 12,
    }
    kinds = ["linear_attention", "full_attention"]
    return transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**sizes, **linear, num_hidden_layers=2, layer_types=kinds))


def verdicts(findings: list[Finding]) -> dict[str, str]:
    return {f.name: f.verdict for f in findings}


def test_our_model_does_not_leak() -> None:
    model = own().train()
    found = check_model(model)
    assert [f.name for f in found] == [
        "packed documents, told by packing",
        "left padding",
        "split prefill, thirds",
        "split prefill, an odd cut",
        "split prefill, all but 2",
        "single steps",
        "rollback by a snapshot",
        "bf16 against float32",
    ]
    assert set(verdicts(found).values()) == {"ok"}
    assert all(f.allowed < 1e-4 for f in found[:-1]), "what is allowed is more than rounding"
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_a_stock_model_leaks_where_it_is_known_to_and_an_accelerated_one_only_in_its_cache() -> None:
    model = stock()
    found = {f.name: f for f in check_model(model, length=48)}
    assert {name for name, f in found.items() if f.leaks} == {"packed documents, told by position_ids", "rollback by cache.crop"}
    assert found["packed documents, told by position_ids"].token == 16
    assert found["rollback by cache.crop"].token == 24
    refusal = found["packed documents, told by cu_seq_lens"]
    assert refusal.verdict == "refused"
    assert "can't keep packed sequences apart" in refusal.note
    gdn.accelerate(model)
    after = verdicts(check_model(model, length=48))
    assert {name for name, verdict in after.items() if verdict != "ok"} == {"rollback by cache.crop"}


class Faulty(OwnModel):
    """One of our models with a fault that a property check must see."""

    def __init__(self, model: LM, fault: str) -> None:
        super().__init__(model)
        self.fault = fault

    def read(self, tokens: Tensor, state: Any = None, mask: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Any]:
        if self.fault == "mask":
            mask = None
        logits, after = super().read(tokens, state, mask, keep)
        if after is not None and ((self.fault == "steps" and tokens.shape[1] == 1) or (self.fault == "pieces" and tokens.shape[1] > 1)):
            after.layers[0]["conv"].zero_()
        return logits, after

    def packed(self) -> Any:
        return {"nothing": lambda tokens, lengths: self.model(tokens).logits} if self.fault == "packing" else super().packed()

    def rollbacks(self) -> Any:
        return {"nothing": lambda state: lambda after, count: after} if self.fault == "rollback" else super().rollbacks()


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("mask", "left padding"),
        ("steps", "single steps"),
        ("pieces", "split prefill, an odd cut"),
        ("packing", "packed documents, told by nothing"),
        ("rollback", "rollback by nothing"),
    ],
)
def test_a_planted_leak_is_found(fault: str, name: str) -> None:
    assert verdicts(check_model(Faulty(own(), fault), length=48))[name] == "LEAKS"


def test_weights_that_lose_more_than_bf16_does_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_three_bits(model: LM, dtype: torch.dtype) -> None:
        for p in model.parameters():
            mantissa, exponent = torch.frexp(p.data)
            p.data = torch.ldexp((8 * mantissa).round() / 8, exponent)

    monkeypatch.setattr(store, "cast", to_three_bits)
    assert verdicts(check_model(own(), length=48))["bf16 against float32"] == "LEAKS"


def test_the_command_exits_with_1_when_something_leaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.save_model(own(), tmp_path / "run" / "model")
    assert cli.main(["check", str(tmp_path / "run"), "--length", "48", "--device", "cpu"]) == 0
    assert "nothing leaks" in capsys.readouterr().out
    stock().save_pretrained(tmp_path / "stock")
    capsys.readouterr()
    assert cli.main(["check", str(tmp_path / "stock"), "--length", "48", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "LEAKS" in out
    assert "2 of 10 leak" in out
    assert cli.main(["check", str(tmp_path / "stock"), "--length", "48", "--device", "cpu", "--accelerate"]) == 1
    assert "1 of 10 leak: rollback by cache.crop" in capsys.readouterr().out
    file = tmp_path / "stock" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert cli.main(["check", str(tmp_path / "stock"), "--device", "cpu"]) == 1
    assert "stock: neither a run of gdn nor a model of transformers: Error while deserializing" in capsys.readouterr().err


@pytest.mark.parametrize("leaks", [False, True])
def test_what_a_model_refused_is_not_called_right(leaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = [Finding("packed", 1.0 if leaks else 0.0, 0.5), Finding("left padding", None, 0.5, note="no cache"), Finding("bf16", 0.0, 0.5)]
    monkeypatch.setattr(model_checks, "check_model", lambda *_, **__: found)
    assert model_checks.report(own(), title="") == int(leaks)
    out = capsys.readouterr().out
    assert "nothing leaks" not in out
    assert ("1 of 3 leak: packed" if leaks else "of the 2 checks that the model took none leaks") in out
    assert "1 of 3 say nothing, the model refused: left padding" in out


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="length: expected at least 24 tokens, got 10"):
        check_model(own(), length=10)
    with pytest.raises(ArgumentError, match=r"model: expected a gdn.models.LM or a causal language model of transformers, got Linear"):
        check_model(torch.nn.Linear(2, 2))
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    assert cli.main(["check", str(tmp_path)]) == 1
    assert "neither a run of gdn nor a model of transformers" in capsys.readouterr().err
    asked: list[object] = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *given, **more: asked.append(given))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for absent in (str(tmp_path / "x"), "./x", "runs/x", "a/b/c"):
        assert cli.main(["check", absent]) == 1
        assert capsys.readouterr().err == f"gdn check: {absent}: no such folder\n"
    assert not asked  # the hub
    with pytest.raises(SystemExit):
        cli.main(["check", "--help"])
    assert "exit status is 1 when something leaks" in capsys.readouterr().out.replace("\n", " ")


def test_our_model_for_transformers_is_opened_without_the_code_in_its_folder(tmp_path: Path) -> None:
    """In another process, since a test may have registered the class in this one."""
    store.save_model(own(), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "gdn", "gdn")
    ended = fresh.run(cli.main, ["check", str(tmp_path / "gdn"), "--length", "24"])
    assert ended.status == 0, ended.output
    assert "rollback by cache.crop" in ended.output
    assert "nothing leaks" in ended.output
