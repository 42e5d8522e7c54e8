"""Costs by arithmetic: of every mixer that there is, without building one; and a step's memory against what autograd keeps."""

from __future__ import annotations

import pytest
import torch

from gdn import cli
from gdn.mixers.attention import Attention
from gdn.mixers.base import MixerConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.describe import costs, mixer_costs
from gdn.models.lm import LM


def kept_bytes(model: LM, tokens: torch.Tensor) -> int:
    """Bytes of the activations saved for the backward pass, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(tokens, targets=tokens)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize(("width", "head_dim"), [(128, 32), (256, 64)])
def test_the_estimate_of_activations_is_near_what_is_kept(width: int, head_dim: int) -> None:
    mixer = GatedDeltaNet.Config(heads=3, head_dim=head_dim)
    config = LM.Config(vocab=257, width=width, layers=2, mlp=3 * width, pattern=(mixer,))
    measured = kept_bytes(LM(config), torch.randint(257, (1, 256)))
    assert 0.9 < measured / costs(config, 256).activation_bytes < 1.1


def test_the_costs_of_a_very_deep_model_are_known_at_once() -> None:
    """The blocks are gone through a few times, not once for each block."""
    visits = 0

    class Counted(LM.Config):
        @property
        def mixers(self) -> list[MixerConfig]:
            nonlocal visits
            visits += 1
            return super().mixers

    layer = GatedDeltaNet.Config(heads=3, head_dim=32)
    costs(Counted(vocab=257, width=128, layers=300, mlp=0, pattern=(layer,)), 256)
    assert visits < 10


def test_every_mixer_is_listed_with_what_it_costs() -> None:
    found, reasons = mixer_costs(256, 100)
    members = MixerConfig.members()
    assert {"attention", "gated_deltanet", "swat"} <= set(members)
    assert {each.name for each in found} == set(members)
    assert not reasons
    assert {each.name: each.chosen for each in found if each.chosen} == {"deltaproduct": "householders=2, gate=True, allow_neg_eigval=True"}
    assert [each.state_bytes for each in found] == sorted(each.state_bytes for each in found)
    for each in found:
        with torch.device("meta"):
            mixer = members[each.name](**members[each.name].typical).build(256)
        assert sum(p.numel() for p in mixer.parameters()) == each.parameters


def test_a_mixer_that_cannot_be_listed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixerConfig, "_tags", {"attention": Attention.Config})

    class Config(MixerConfig):
        depth: int

    found, reasons = mixer_costs(16, 1)
    assert "depth" in reasons[Config.tag()]
    assert "attention" in {each.name for each in found}


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["info", "--mixers", "--width", "512", "--length", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "width 512" in printed
    assert all(name in printed for name in ("attention", "gated_deltanet", "swat", "householders=2", "allow_neg_eigval=True"))
    assert f"{Attention.Config().num_parameters(512):,}" in printed
    assert cli.main(["info", "--mixers", "--width", "0"]) == 1
    assert "width: expected at least 1, got 0" in capsys.readouterr().err
