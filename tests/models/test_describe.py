"""Costs by arithmetic: of every mixer that there is, without building one."""

from __future__ import annotations

import pytest
import torch

from gdn import cli
from gdn.mixers.attention import Attention
from gdn.mixers.base import MixerConfig
from gdn.models.describe import mixer_costs


def test_every_mixer_is_listed_with_what_it_costs() -> None:
    found, reasons = mixer_costs(256, 100)
    members = MixerConfig.members()
    assert {"attention", "gated_deltanet", "swat"} <= set(members)
    assert {costs.name for costs in found} | set(reasons) == set(members)
    assert [costs.state_bytes for costs in found] == sorted(costs.state_bytes for costs in found)
    for costs in found:
        with torch.device("meta"):
            mixer = members[costs.name]().build(256)
        assert sum(p.numel() for p in mixer.parameters()) == costs.parameters


def test_a_mixer_that_cannot_be_listed_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixerConfig, "_tags", {"attention": Attention.Config})

    class Config(MixerConfig):
        depth: int

    found, reasons = mixer_costs(16, 1)
    assert "depth" in reasons[Config.tag()]
    assert "attention" in {costs.name for costs in found}


def test_the_command_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--mixers", "--width", "512", "--length", "1000"]) == 0
    printed = capsys.readouterr().out
    assert "width 512" in printed
    assert all(name in printed for name in ("attention", "gated_deltanet", "swat"))
    assert f"{Attention.Config().num_parameters(512):,}" in printed
    assert cli.main(["info", "--mixers", "--width", "0"]) == 1
    assert "width: expected at least 1, got 0" in capsys.readouterr().err
