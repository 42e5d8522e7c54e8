"""RetNet passes the mixer contract, and equals a literal transcription of the paper's layer."""

from __future__ import annotations

import cmath

import pytest
import torch

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.retnet import RetNet
from gdn.testing.mixer_contract import MixerContract

Config = RetNet.Config


class TestPaper(MixerContract):
    config = Config(heads=2)


class TestNarrow(MixerContract):
    config = Config(heads=3, expand_k=0.5, expand_v=1.0, rope_base=100.0)


def literal_layer(mixer: RetNet, x: torch.Tensor) -> torch.Tensor:
    """The paper's layer for one sequence `[T, width]`, token by token, with the rotation as complex numbers."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    q, k, v = (x @ weights["qkv_proj.weight"].T).split((mixer.keys, mixer.keys, mixer.values), dim=-1)
    q, k, v = (t.unflatten(-1, (c.heads, -1)) for t in (q, k, v))
    half = k.shape[-1] // 2
    turns = [[cmath.exp(1j * t * c.rope_base ** (-i / half)) for i in range(half)] for t in range(len(x))]
    turned = torch.tensor(turns, dtype=torch.complex128)
    q, k = (torch.complex(t[..., :half], t[..., half:]) * turned[:, None] for t in (q, k))
    gamma = torch.tensor([1 - 2.0 ** (-5 - h) for h in range(c.heads)], dtype=x.dtype)
    state = torch.zeros(c.heads, v.shape[-1], half, dtype=torch.complex128)
    rows = []
    for t in range(len(x)):
        state = gamma[:, None, None] * state + v[t][:, :, None] * k[t][:, None, :]
        o = (state * q[t].conj()[:, None, :]).sum(-1).real / (2 * half) ** 0.5
        rows.append(o / torch.sqrt((o * o).mean(-1, keepdim=True) + c.norm_eps) * weights["o_norm.weight"])
    gate = x @ weights["g_proj.weight"].T
    return (torch.stack(rows).flatten(1) * gate * torch.sigmoid(gate)) @ weights["o_proj.weight"].T


def test_equals_a_literal_transcription_of_the_paper() -> None:
    torch.manual_seed(0)
    mixer = Config(heads=2).build(16).double()
    x = torch.randn(40, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x.unsqueeze(0))[0][0], literal_layer(mixer, x), rtol=1e-9, atol=1e-11)


def test_counts_tokens_and_not_padding() -> None:
    mixer = Config(heads=2).build(16)
    state = mixer.init_state(2)
    mask = torch.tensor([[False, False, True, True], [True] * 4])
    with torch.no_grad():
        mixer(torch.randn(2, 4, 16), state=state, mask=mask)
        mixer(torch.randn(2, 3, 16), state=state)
    assert state["seen"].tolist() == [5, 7]


def test_has_the_published_size() -> None:
    d = 2048
    assert Config().num_parameters(d) == 8 * d * d + 2 * d // 8


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="heads: expected an even width of each for the rotary embedding, got 3 = 12 / 4"):
        Config(heads=4).build(12)
    with pytest.raises(ConfigError, match=r"expand_v: expected expand_v \* width to be a multiple of heads=4, got 0.75 \* 24"):
        Config(heads=4, expand_v=0.75).build(24)
    mixer = Config(heads=2).build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))
