"""Muon works on maps, not on how they are stored: stacked matrices move as separate ones would under torch's Muon."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from gdn.core.errors import ConfigError
from gdn.mixers.attention import Attention
from gdn.mixers.base import MixerConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.train.muon import orthogonal, split
from gdn.train.optim import AdamW

LINEAR = GatedDeltaNet.Config(heads=2, head_dim=8)
CONFIG = LM.Config(
    vocab=17, width=24, layers=2, mlp=32, pattern=(LINEAR, Attention.Config(heads=4, kv_heads=2, head_dim=6, output_gate=True))
)


def model(seed: int = 0) -> LM:
    torch.manual_seed(seed)
    return LM(CONFIG)


def test_every_parameter_is_in_one_group_and_only_maps_are_muons() -> None:
    lm = model()
    optimizer = AdamW(matrices="muon").build(lm)
    names = {id(p): n for n, p in lm.named_parameters()}
    held = {g["name"]: {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert sum(len(v) for v in held.values()) == len(names) == len(set().union(*held.values()))
    assert {n.split(".", 2)[-1] for n in held["muon"]} == {
        *(f"mixer.{m}.weight" for m in ("qkv_proj", "g_proj", "o_proj")),
        *(f"mlp.{m}.weight" for m in ("gate_up", "down")),
    }
    assert {"blocks.0.mixer.a_proj.weight", "blocks.0.mixer.conv.weight", "embedding.weight"} <= held["decay"]
    assert "blocks.0.mixer.A_log" in held["no_decay"]


def test_stacked_matrices_move_as_separate_ones_do_in_torch() -> None:
    lm = model()
    rows = {"mixer.qkv_proj": ((16, 16, 32), (24, 12, 12)), "mlp.gate_up": ((32, 32),) * 2, "mixer.o_proj": ((24,), (24,))}
    separate: dict[str, list[nn.Parameter]] = {}
    for i in (0, 1):
        for path, sizes in rows.items():
            weight = lm.get_parameter(f"blocks.{i}.{path}.weight")
            separate[f"{i} {path}"] = [nn.Parameter(p.detach().clone()) for p in weight.split(sizes[i])]
    theirs = torch.optim.Muon(
        [p for parts in separate.values() for p in parts], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    adam_names = [n for n, _ in lm.named_parameters() if n.endswith(("embedding.weight", "conv.weight"))]
    adams = [nn.Parameter(lm.get_parameter(n).detach().clone()) for n in adam_names]
    plain = torch.optim.AdamW(adams, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))
    ours = AdamW(matrices="muon", lr=0.01).build(lm)
    tokens = torch.randint(17, (2, 20))
    for _ in range(3):
        lm(tokens, targets=tokens).loss.backward()
        for name, parts in separate.items():
            i, path = name.split()
            for part, gradient in zip(parts, lm.get_parameter(f"blocks.{i}.{path}.weight").grad.split([len(p) for p in parts])):
                part.grad = gradient.clone()
        for name, twin in zip(adam_names, adams):
            twin.grad = lm.get_parameter(name).grad.clone()
        for optimizer in (ours, theirs, plain):
            optimizer.step()
        ours.zero_grad()
    for name, parts in separate.items():
        i, path = name.split()
        torch.testing.assert_close(lm.get_parameter(f"blocks.{i}.{path}.weight"), torch.cat(list(parts)), rtol=1e-5, atol=1e-6)
    for name, twin in zip(adam_names, adams):
        torch.testing.assert_close(lm.get_parameter(name), twin, rtol=1e-4, atol=1e-6)


STACKS = {"deltaproduct": ("qkv_proj", 5), "hgrn2": ("qfi_proj", 3), "mamba2": ("in_proj", 5)}
"""The matrix of a mixer that holds several, and how many. Of all others queries, keys and values."""


@pytest.mark.parametrize("name", MixerConfig.members())
def test_every_mixer_says_the_rows_of_its_stacks(name: str) -> None:
    mixer = MixerConfig.members()[name]
    with torch.device("meta"):
        lm = LM(LM.Config(vocab=17, width=256, layers=1, mlp=0, pattern=(mixer(**mixer.typical),)))
    rows = {path: rows for path, m in lm.named_modules() if isinstance(m, nn.Linear) and (rows := split(lm)[1].get(m.weight))}
    stack, maps = STACKS.get(name, ("qkv_proj", 3))
    assert {path: len(parts) for path, parts in rows.items()} == {f"blocks.0.mixer.{stack}": maps}
    assert all(sum(parts) == lm.get_submodule(path).out_features for path, parts in rows.items())


def test_singular_values_come_near_one() -> None:
    for shape in ((20, 50), (50, 20)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape)).float())
        assert values.min() > 0.5
        assert values.max() < 1.4


def test_it_trains_and_its_state_is_kept() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(17, (4, 30))
    lm, losses = model(), []
    optimizer = AdamW(matrices="muon", lr=3e-3).build(lm)
    for _ in range(20):
        loss = lm(tokens, targets=tokens.roll(-1, 1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    again = model()
    again.load_state_dict(lm.state_dict())
    other = AdamW(matrices="muon", lr=3e-3).build(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for a, o in ((lm, optimizer), (again, other)):
        o.zero_grad()
        a(tokens, targets=tokens).loss.backward()
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), again.parameters()))


def test_a_layer_of_transformers_says_its_rows_or_is_refused() -> None:
    class Mixer(nn.Module):
        stacked_rows: dict[str, tuple[int, ...]]

        def __init__(self) -> None:
            super().__init__()
            for name, rows in (("in_proj_qkv", 20), ("in_proj_z", 12), ("in_proj_a", 2), ("in_proj_b", 2)):
                setattr(self, name, nn.Linear(8, rows, bias=False))

    mixer = Mixer()
    layers = nn.Sequential(nn.ModuleList([mixer]))
    with pytest.raises(ConfigError, match=r"0.in_proj_qkv holds several matrices"):
        split(layers)
    mixer.stacked_rows = {"in_proj_qkv": (4, 4, 12)}
    names, rows = split(layers)
    assert names == ["0.0.in_proj_qkv.weight", "0.0.in_proj_z.weight"]
    assert list(rows.values()) == [(4, 4, 12)]


def test_an_undeclared_stack_is_refused() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv_proj = nn.Linear(4, 12)

    with pytest.raises(ConfigError, match=r"0.qkv_proj holds several matrices"):
        split(nn.Sequential(nn.ModuleList([Mixer()])))
    with pytest.raises(ConfigError, match="momentum"):
        AdamW(momentum=1.0)
