"""Attention passes the mixer contract in its variants, and equals a literal transcription of the layer."""

from __future__ import annotations

import math

import pytest
import torch

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.attention import Attention, mean_context
from gdn.mixers.base import GrowingState, room
from gdn.testing.mixer_contract import MixerContract

Config = Attention.Config


class TestTransformer(MixerContract):
    config = Config(heads=3, head_dim=8)


class TestSlidingWindow(MixerContract):
    config = Config(heads=3, head_dim=8, window=17)


class TestWindowOfTheTokenBefore(MixerContract):
    config = Config(heads=2, head_dim=12, kv_heads=1, window=2)

    def test_learns_to_recall_a_token(self) -> None:
        """A window of two cannot."""
        with pytest.raises(AssertionError, match="chance"):
            super().test_learns_to_recall_a_token()


class TestQwen(MixerContract):
    config = Config(heads=4, kv_heads=2, head_dim=8, qk_norm=True, output_gate=True, rope_fraction=0.25)


class TestNormOverAllHeads(MixerContract):
    config = Config(heads=4, kv_heads=2, head_dim=6, qk_norm=True, norm_all_heads=True)


class TestWindowedQwen(MixerContract):
    config = Config(heads=4, kv_heads=2, head_dim=8, window=30, qk_norm=True, output_gate=True, rope_base=1e6)


def literal_layer(mixer: Attention, x: torch.Tensor) -> torch.Tensor:
    """Token by token and head by head, written without any of the library's operators."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    batch, length, _ = x.shape
    width, groups = c.head_dim, c.num_kv_heads
    w_q, w_k, w_v = weights["qkv_proj.weight"].split([c.heads * width, groups * width, groups * width])
    turned = int(c.rope_fraction * width)

    def rope(z: torch.Tensor, position: int) -> torch.Tensor:
        out = z.clone()
        for i in range(turned // 2):
            angle = position / c.rope_base ** (2 * i / turned)
            a, b = z[i], z[i + turned // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + turned // 2] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def head(w: torch.Tensor, name: str, n: int, t: int, h: int) -> torch.Tensor:
        z = w[h * width : (h + 1) * width] @ x[n, t]
        if c.qk_norm:
            z = z / torch.sqrt((z * z).mean() + c.norm_eps) * weights[f"{name}_norm.weight"]
        return rope(z, t)

    o = torch.zeros(batch, length, c.heads, width, dtype=x.dtype)
    for n in range(batch):
        for h in range(c.heads):
            group = h // (c.heads // groups)
            for t in range(length):
                oldest = 0 if c.window is None else max(0, t - c.window + 1)
                query = head(w_q, "q", n, t, h)
                scores = [torch.exp(query @ head(w_k, "k", n, s, group) / math.sqrt(width)) for s in range(oldest, t + 1)]
                values = [w_v[group * width : (group + 1) * width] @ x[n, s] for s in range(oldest, t + 1)]
                o[n, t, h] = sum(p * v for p, v in zip(scores, values)) / sum(scores)
    y = o.flatten(2)
    if c.output_gate:
        y = y / (1 + torch.exp(-x @ weights["g_proj.weight"].T))
    return y @ weights["o_proj.weight"].T


@pytest.mark.parametrize(
    "config",
    [Config(heads=2, head_dim=4), Config(heads=4, kv_heads=2, head_dim=8, window=3, qk_norm=True, output_gate=True, rope_fraction=0.5)],
    ids=["transformer", "everything"],
)
def test_equals_a_literal_transcription(config: Attention.Config) -> None:
    torch.manual_seed(0)
    mixer = config.build(12).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        x = torch.randn(2, 7, 12, dtype=torch.float64)
        torch.testing.assert_close(mixer(x)[0], literal_layer(mixer, x), rtol=1e-10, atol=1e-12)


def test_published_layers_have_their_number_of_parameters() -> None:
    assert Config(heads=18, head_dim=128, window=2048).num_parameters(2304) == 4 * 2304**2
    assert Config(heads=16, head_dim=256, kv_heads=2, output_gate=True, qk_norm=True).num_parameters(2048) == 27_263_488  # Qwen3-Next


def test_the_state_of_a_growing_cache_doubles_and_rolls_back() -> None:
    assert [room(n) for n in (0, 1, 64, 65, 128, 129, 1000)] == [64, 64, 64, 128, 128, 256, 1024]
    mixer = Config(heads=1, head_dim=4).build(4)
    state, x = mixer.init_state(1), torch.randn(1, 200, 4)
    assert isinstance(state, GrowingState)
    with torch.no_grad():
        mixer(x[:, :60], state=state)
        address, snapshot = state["keys"].data_ptr(), state.clone()
        mixer(x[:, 60:64], state=state)
        assert state["keys"].data_ptr() == address
        mixer(x[:, 64:65], state=state)
        assert (state.tokens, state["keys"].shape[1], snapshot.tokens) == (65, 128, 60)
        after = mixer(x[:, 65:66], state=state)[0]
        state.copy_(snapshot)
        assert (state.tokens, state["keys"].shape[1]) == (60, 64)
        mixer(x[:, 60:65], state=state)
        torch.testing.assert_close(mixer(x[:, 65:66], state=state)[0], after)


@pytest.mark.parametrize("window", [None, 5])
def test_sequences_of_a_batch_may_go_on_with_pieces_of_different_lengths(window: int | None) -> None:
    mixer = Config(heads=2, head_dim=4, window=window).build(8).double()
    x, y = torch.randn(1, 9, 8, dtype=torch.float64), torch.randn(1, 9, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.cat([mixer(x)[0], mixer(y[:, :8])[0]], dim=1)
        state = mixer.init_state(2)
        first = mixer(torch.cat([x[:, :4], torch.cat([y[:, :1] + 9, y[:, :3]], 1)]), state=state, mask=padded(4, 0, 1))[0]
        second = mixer(torch.cat([torch.cat([x[:, :2] + 9, x[:, 4:7]], 1), y[:, 3:8]]), state=state, mask=padded(5, 2, 0))[0]
        third = [mixer(torch.cat([x[:, t : t + 1], y[:, 8:]]), state=state)[0] for t in (7, 8)]
    found = [first[:1], second[:1, 2:], *(t[:1] for t in third), first[1:, 1:], second[1:]]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=1e-10, atol=1e-11)


def padded(length: int, *pads: int) -> torch.Tensor:
    return torch.arange(length) >= torch.tensor(pads).unsqueeze(1)


def test_operations_count_the_mean_context() -> None:
    assert mean_context(4, None) == 2.5
    assert mean_context(4, 2) == (1 + 2 + 2 + 2) / 4
    assert mean_context(10, 20) == 5.5
    config = Config(heads=2, head_dim=8, window=2)
    assert config.flops_per_token(16, 4) - 2 * config.num_parameters(16) == 4 * 16 * 7 // 4


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="kv_heads: expected a divisor of heads=4, got 3"):
        Config(heads=4, kv_heads=3)
    with pytest.raises(ConfigError, match="window: expected at least 1 or None, got 0"):
        Config(window=0)
    with pytest.raises(ConfigError, match="rope_fraction: expected an even part of head_dim=6"):
        Config(head_dim=6, rope_fraction=0.5)
    mixer, x = Config(heads=2, head_dim=8).build(16), torch.randn(1, 4, 16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(x, state=mixer.init_state(1), packing=Packing.from_lengths([4]))
    with pytest.raises(ArgumentError, match="mask: cannot be given together with packing"):
        mixer(x, mask=torch.ones(1, 4, dtype=torch.bool), packing=Packing.from_lengths([4]))
    with pytest.raises(ArgumentError, match="packing: describes 3 tokens"):
        mixer(x, packing=Packing.from_lengths([3]))
