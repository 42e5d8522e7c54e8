"""SWAT passes the mixer contract in its variants, and equals a literal transcription of the paper's equation."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.swat import Swat
from gdn.testing.mixer_contract import MixerContract

Config = Swat.Config


class TestBalanced(MixerContract):
    config = Config(heads=4, head_dim=6, window=17)


class TestOnlyRecentWithoutRotaryEmbedding(MixerContract):
    config = Config(heads=3, head_dim=8, window=30, recent_heads=3, rope_fraction=0.0)


def literal_layer(mixer: Swat, x: torch.Tensor) -> torch.Tensor:
    """Equation by equation with the rotary embedding as complex numbers, positions from 1."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    batch, length, _ = x.shape
    inner, half = c.heads * c.head_dim, c.head_dim // 2
    w_q, w_k, w_v = weights["qkv_proj.weight"].split(inner)
    o = torch.zeros(batch, length, inner, dtype=x.dtype)
    for b in range(batch):
        for h in range(c.heads):
            here = slice(h * c.head_dim, (h + 1) * c.head_dim)
            side = 1 if h >= c.heads // 2 else -1
            slope = side * 2.0 ** -(h % (c.heads // 2) + 1)
            for m in range(1, length + 1):
                for n in range(max(1, m - c.window + 1), m + 1):
                    query, key = w_q[here] @ x[b, m - 1], w_k[here] @ x[b, n - 1]
                    product = 0.0
                    for i in range(half):
                        turn = cmath.exp(1j * (m - n) * c.rope_base ** (-i / half))
                        a, z = complex(query[i], query[i + half]), complex(key[i], key[i + half])
                        product += (turn * a * z.conjugate()).real
                    weight = 1 / (1 + math.exp(-(product / math.sqrt(c.head_dim) + slope * (m - n))))
                    o[b, m - 1, here] += weight * (w_v[here] @ x[b, n - 1])
    return o @ weights["o_proj.weight"].T


def test_equals_a_literal_transcription_of_the_paper() -> None:
    torch.manual_seed(0)
    mixer = Config(heads=4, head_dim=6, window=4).build(12).double()
    with torch.no_grad():
        mixer.qkv_proj.weight.mul_(3)
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        torch.testing.assert_close(mixer(x)[0], literal_layer(mixer, x), rtol=1e-10, atol=1e-12)


def test_slopes_are_balanced_powers_of_two() -> None:
    def slopes(**options: int | bool) -> list[float]:
        return Config(**{"heads": 6, "head_dim": 2, **options}).build(4)._slopes(torch.zeros(1)).tolist()

    assert slopes() == [-0.5, -0.25, -0.125, 0.5, 0.25, 0.125]
    assert slopes(recent_heads=4) == [-0.5, -0.25, -0.125, -0.0625, 0.5, 0.25]
    assert slopes(heads=3) == [-0.5, -0.25, 0.5]
    assert slopes(recent_heads=0, heads=2) == [0.5, 0.25]
    assert slopes(alibi=False) == [0.0] * 6


def test_parameters_are_those_of_attention() -> None:
    assert Config(heads=16, head_dim=64).num_parameters(1024) == 4 * 1024**2


@pytest.mark.parametrize("window", [1, 5])
def test_sequences_of_a_batch_may_go_on_with_pieces_of_different_lengths(window: int) -> None:
    mixer = Config(heads=2, head_dim=4, window=window).build(8).double()
    x, junk = torch.randn(2, 9, 8, dtype=torch.float64), torch.full((1, 2, 8), 9.0, dtype=torch.float64)
    with torch.no_grad():
        expected, state = mixer(x)[0], mixer.init_state(2)
        first = torch.cat([x[:1, :4], torch.cat([junk, x[1:, :2]], 1)])
        mask = torch.tensor([[True] * 4, [False] * 2 + [True] * 2])
        a = mixer(first, state=state, mask=mask)[0]
        second = torch.cat([torch.cat([junk, x[:1, 4:6]], 1), x[1:, 2:6]])
        b = mixer(second, state=state, mask=mask.flip(0))[0]
        c = mixer(x[:, 6:], state=state)[0]
    torch.testing.assert_close(torch.cat([a[:1], b[:1, 2:], c[:1]], 1), expected[:1], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(torch.cat([a[1:, 2:], b[1:], c[1:]], 1), expected[1:], rtol=1e-10, atol=1e-11)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="recent_heads: expected 0 to heads=4, got 5"):
        Config(heads=4, recent_heads=5)
    with pytest.raises(ConfigError, match="window: expected at least 1, got 0"):
        Config(window=0)
    mixer, x = Config(heads=2, head_dim=8).build(16), torch.randn(1, 4, 16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(x, state=mixer.init_state(1), packing=Packing.from_lengths([4]))
