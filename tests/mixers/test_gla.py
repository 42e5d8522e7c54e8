"""GLA passes the mixer contract in its variants, and equals a literal transcription of the paper's layer."""

from __future__ import annotations

import pytest
import torch

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.gla import GLA
from gdn.testing.mixer_contract import MixerContract

Config = GLA.Config


class TestPaper(MixerContract):
    config = Config(heads=2)


class TestConvolution(MixerContract):
    config = Config(heads=3, expand_k=1.0, expand_v=2.0, gate_rank=3, short_conv=True)


class TestShortMemory(MixerContract):
    config = Config(heads=2, gate_normaliser=2.0)


def literal_layer(mixer: GLA, x: torch.Tensor) -> torch.Tensor:
    """The paper's layer for one sequence `[T, width]`, token by token, written without any of the library's operators."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    q, k, v = (x @ weights["qkv_proj.weight"].T).split((mixer.keys, mixer.keys, mixer.values), dim=-1)
    raw = (x @ weights["decay_proj.0.weight"].T) @ weights["decay_proj.1.weight"].T + weights["decay_proj.1.bias"]
    alpha = torch.sigmoid(raw) ** (1 / c.gate_normaliser)
    q, k, v, alpha = (t.unflatten(-1, (c.heads, -1)) for t in (q, k, v, alpha))
    state = torch.zeros(c.heads, v.shape[-1], k.shape[-1], dtype=x.dtype)  # value x key
    rows = []
    for t in range(len(x)):
        state = state * alpha[t][:, None, :] + v[t][:, :, None] * k[t][:, None, :]
        o = (state * q[t][:, None, :]).sum(-1) / k.shape[-1] ** 0.5
        rows.append(o / torch.sqrt((o * o).mean(-1, keepdim=True) + c.norm_eps) * weights["o_norm.weight"])
    gate = x @ weights["g_proj.weight"].T
    return (torch.stack(rows).flatten(1) * gate * torch.sigmoid(gate)) @ weights["o_proj.weight"].T


def test_equals_a_literal_transcription_of_the_paper() -> None:
    torch.manual_seed(0)
    mixer = Config(heads=2).build(16).double()
    x = torch.randn(40, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x.unsqueeze(0))[0][0], literal_layer(mixer, x), rtol=1e-9, atol=1e-11)


def test_the_memory_starts_to_forget_as_published() -> None:
    """A gate of zero keeps `0.5 ** (1 / 16)`: after one token of zeros, the memory holds what was in it times that."""
    mixer = Config(heads=2).build(16)
    state = mixer.init_state(1)
    state["memory"].fill_(1)
    with torch.no_grad():
        mixer.get_parameter("decay_proj.1.bias").zero_()
        mixer(torch.zeros(1, 1, 16), state=state)
    torch.testing.assert_close(state["memory"], torch.full_like(state["memory"], 0.9576), rtol=0, atol=5e-5)


def test_has_the_published_size() -> None:
    """Matrices of 4 d^2, the decay's two of rank 16 and its bias, and one norm for all heads."""
    d = 2048
    assert Config().num_parameters(d) == 4 * d * d + 16 * d + 16 * d // 2 + d // 2 + d // 4
    assert Config().state_bytes(d, 1) == 4 * 524_288


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="gate_normaliser: expected above 0"):
        Config(gate_normaliser=0.0)
    with pytest.raises(ConfigError, match=r"expand_k: expected expand_k \* width to be a multiple of heads=4, got 0.5 \* 12"):
        Config().build(12)
    mixer = Config(heads=2).build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))
