"""Gated DeltaNet passes the mixer contract in its variants, and equals a literal transcription of the paper's layer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.testing.mixer_contract import MixerContract

Config = GatedDeltaNet.Config


class TestOfficial(MixerContract):
    config = Config(heads=2, head_dim=8)


class TestGroupedValues(MixerContract):
    config = Config(heads=2, head_dim=8, value_heads=6, expand_v=1.5, beta_bias=False)


class TestNegativeEigenvalues(MixerContract):
    config = Config(heads=3, head_dim=5, expand_v=1.0, allow_neg_eigval=True)


class TestWithoutConvolution(MixerContract):
    config = Config(heads=2, head_dim=8, short_conv=False)


class TestWithoutDecay(MixerContract):
    config = Config(heads=2, head_dim=8, gate=False)


class TestWithoutOutputGate(MixerContract):
    config = Config(heads=2, head_dim=8, output_gate=False)


class TestWithoutOutputNorm(MixerContract):
    config = Config(heads=2, head_dim=8, output_norm=False)


class TestL1AndElu(MixerContract):
    config = Config(heads=2, head_dim=8, qk_norm="l1", qk_activation="elu+1", conv_size=3)


def literal_layer(mixer: GatedDeltaNet, x: torch.Tensor) -> torch.Tensor:
    """Section 3 of the paper, token by token with state as value x key, written without any of the library's operators."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    batch, length, _ = x.shape
    hk, hv = c.heads * c.head_dim, c.num_value_heads * c.value_dim
    w_q, w_k, w_v = weights["qkv_proj.weight"].split((hk, hk, hv))
    c_q, c_k, c_v = weights["conv.weight"].split((hk, hk, hv))

    def path(w, filters):
        z = x @ w.T
        out = torch.zeros_like(z)
        for t in range(length):
            for tap in range(c.conv_size):
                source = t - (c.conv_size - 1) + tap
                if source >= 0:
                    out[:, t] += filters[:, tap] * z[:, source]
        return out * torch.sigmoid(out)

    q = path(w_q, c_q).reshape(batch, length, c.heads, c.head_dim)
    k = path(w_k, c_k).reshape(batch, length, c.heads, c.head_dim)
    v = path(w_v, c_v).reshape(batch, length, c.num_value_heads, c.value_dim)
    q, k = (z / torch.sqrt((z * z).sum(-1, keepdim=True) + 1e-6) for z in (q, k))
    beta = torch.sigmoid(x @ weights["b_proj.weight"].T + weights["b_proj.bias"])
    alpha = torch.exp(-torch.exp(weights["A_log"]) * F.softplus(x @ weights["a_proj.weight"].T + weights["dt_bias"]))
    o = torch.zeros(batch, length, c.num_value_heads, c.value_dim, dtype=x.dtype)
    for n in range(batch):
        for h in range(c.num_value_heads):
            group = h // (c.num_value_heads // c.heads)
            state = torch.zeros(c.value_dim, c.head_dim, dtype=x.dtype)
            for t in range(length):
                key, query = k[n, t, group], q[n, t, group] / math.sqrt(c.head_dim)
                erase = torch.eye(c.head_dim, dtype=x.dtype) - beta[n, t, h] * torch.outer(key, key)
                state = state @ (alpha[n, t, h] * erase) + beta[n, t, h] * torch.outer(v[n, t, h], key)
                o[n, t, h] = state @ query
    gate = (x @ weights["g_proj.weight"].T).reshape(o.shape)
    if c.output_norm:
        o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + c.norm_eps) * weights["o_norm.weight"]
    return (o * gate * torch.sigmoid(gate)).flatten(2) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("options", [{}, {"value_heads": 4}, {"output_norm": False}], ids=["paper", "grouped", "no norm"])
def test_equals_a_literal_transcription_of_the_paper(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    mixer = Config(heads=2, head_dim=4, **options).build(12).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], literal_layer(mixer, x), rtol=1e-10, atol=1e-12)


def test_initial_gates_have_the_published_statistics() -> None:
    torch.manual_seed(0)
    mixer = Config(heads=512, head_dim=1, expand_v=1.0).build(8)
    assert mixer.A_log.exp().max() <= 16
    assert 7 < mixer.A_log.exp().mean() < 9
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101
    # log-uniform: half of them below the geometric mean of the bounds
    assert 0.4 < (dt < 1e-2).float().mean() < 0.6
    assert torch.equal(mixer.b_proj.bias, torch.zeros(512))
    assert mixer.A_log._no_weight_decay
    assert mixer.dt_bias._no_weight_decay


def test_gates_stay_float32_under_a_bf16_layer() -> None:
    from gdn.models.lm import LM
    from gdn.models.store import cast

    model = cast(LM(LM.Config(vocab=11, width=16, layers=1, mlp=16, pattern=(Config(heads=2, head_dim=8),))), torch.bfloat16)
    mixer = model.blocks[0].mixer
    assert mixer.A_log.dtype == mixer.dt_bias.dtype == torch.float32
    assert mixer.qkv_proj.weight.dtype == torch.bfloat16
    tokens = torch.randint(11, (1, 30))
    with torch.no_grad():
        logits = model(tokens).logits
        state = model.init_state(1)
        assert state.layers[0]["memory"].dtype == torch.float32
        parts = [model(piece, state=state).logits for piece in tokens.split(7, dim=1)]
    assert logits.dtype == torch.bfloat16
    assert (torch.cat(parts, 1).float() - logits.float()).norm() / logits.float().norm() < 0.02


def test_mistakes_are_named() -> None:
    for wrong in (6, 0, -4):
        with pytest.raises(ConfigError, match=f"multiple of heads=4, got {wrong}"):
            Config(heads=4, value_heads=wrong)
    with pytest.raises(ConfigError, match="whole number"):
        Config(head_dim=5, expand_v=1.5)
    mixer = Config(heads=2, head_dim=8).build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))


def test_a_hook_on_the_convolution_is_not_passed_by() -> None:
    """As accelerate and fully sharded training use them to bring its weights."""
    mixer, seen = GatedDeltaNet.Config(heads=2, head_dim=8).build(16), []
    x = torch.randn(2, 5, 16)
    expected = mixer(x)[0]
    mixer.conv.register_forward_hook(lambda *call: seen.append(call))
    torch.testing.assert_close(mixer(x)[0], expected)
    assert len(seen) == 1
