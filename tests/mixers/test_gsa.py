"""Gated Slot Attention passes the mixer contract in its variants, and equals a literal transcription of the paper's layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.gsa import GSA
from gdn.testing.mixer_contract import MixerContract

Config = GSA.Config


class TestPaper(MixerContract):
    config = Config(heads=2, slots=6)


class TestRelu(MixerContract):
    config = Config(heads=3, slots=5, expand_k=0.5, expand_v=2.0, feature_map="relu", gate_normaliser=4.0, norm_weight=False)


def literal_layer(mixer: GSA, x: torch.Tensor) -> torch.Tensor:
    """The paper's layer for one sequence `[T, width]`, token by token over explicit slots, without any of the library's operators."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    q, k, v = (x @ weights["qkv_proj.weight"].T).split((mixer.keys, mixer.keys, mixer.values), dim=-1)
    q, k, v = ((t * torch.sigmoid(t)).unflatten(-1, (c.heads, -1)) for t in (q, k, v))
    alpha = (torch.sigmoid(x @ weights["f_proj.weight"].T) ** (1 / c.gate_normaliser)).unflatten(-1, (c.heads, -1))
    rows = []
    for h in range(c.heads):
        slot_keys, slot_values = (torch.zeros(c.slots, t.shape[-1], dtype=x.dtype) for t in (k, v))
        outputs = []
        for t in range(len(x)):
            keep = alpha[t, h][:, None]
            slot_keys = keep * slot_keys + (1 - keep) * k[t, h]
            slot_values = keep * slot_values + (1 - keep) * v[t, h]
            scores = torch.exp(slot_keys @ q[t, h])
            outputs.append(slot_values.T @ (scores / scores.sum()))
        rows.append(torch.stack(outputs))
    o = torch.cat(rows, dim=-1)
    o = o * torch.sigmoid(o)
    return (o / torch.sqrt((o * o).mean(-1, keepdim=True) + c.norm_eps) * weights["o_norm.weight"]) @ weights["o_proj.weight"].T


def test_equals_a_literal_transcription_of_the_paper() -> None:
    torch.manual_seed(0)
    mixer = Config(heads=2, slots=5).build(16).double()
    x = torch.randn(40, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x.unsqueeze(0))[0][0], literal_layer(mixer, x), rtol=1e-9, atol=1e-11)


class DtypesOfSoftmax(TorchDispatchMode):
    """Notes the dtype of the result of each softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.seen.append(result.dtype)
        return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slots_are_weighted_in_float32(dtype: torch.dtype) -> None:
    """Outputs are equal bit for bit without, on the CPU, since PyTorch widens inside a softmax; its gradient reads the rounded result."""
    mixer = Config(heads=2, slots=6).build(16).to(dtype)
    with DtypesOfSoftmax() as softmax:
        mixer(torch.randn(1, 9, 16, dtype=dtype))
    assert softmax.seen == [torch.float32]


@pytest.mark.parametrize(("tau", "start"), [({}, 0.917), ({"gate_normaliser": 4.0}, 0.841), ({"gate_normaliser": 16.0}, 0.958)])
def test_slots_start_to_forget_as_published(tau: dict[str, float], start: float) -> None:
    """A gate of zero keeps `0.5 ** (1 / tau)`: after one token of zeros, slots hold what was in them times that. By default tau is 8."""
    mixer = Config(heads=2, slots=6).with_(**tau).build(16)
    state = mixer.init_state(1)
    state["memory_keys"].fill_(1)
    with torch.no_grad():
        mixer(torch.zeros(1, 1, 16), state=state)
    torch.testing.assert_close(state["memory_keys"], torch.full_like(state["memory_keys"], start), rtol=0, atol=5e-4)


def test_has_the_published_size() -> None:
    d = 1024
    assert Config().num_parameters(d) == 4 * d * d + 4 * 64 * d + d
    assert Config(norm_weight=False).num_parameters(d) == 4 * d * d + 4 * 64 * d
    assert Config().state_bytes(d, 1) == 4 * 128 * d


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="slots: expected at least 1, got 0"):
        Config(slots=0)
    with pytest.raises(ConfigError, match=r"expand_k: expected expand_k \* width to be a multiple of heads=4, got 1.0 \* 18"):
        Config().build(18)
    mixer = Config(heads=2).build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))
