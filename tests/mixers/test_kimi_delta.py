"""Kimi Delta Attention passes the mixer contract and equals a literal transcription and transformers' layer."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.kimi_delta import KimiDelta
from gdn.testing.mixer_contract import MixerContract

Config = KimiDelta.Config


class TestPaper(MixerContract):
    config = Config(heads=2, head_dim=8)


class TestGroupedValues(MixerContract):
    config = Config(heads=2, head_dim=6, value_heads=4, expand_v=1.5, allow_neg_eigval=True, output_gate_bias=False, short_conv=False)


def literal_layer(mixer: KimiDelta, x: torch.Tensor) -> torch.Tensor:
    """The layer as the paper writes it down, token by token, without any of the library's operators."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    batch, length, _ = x.shape
    z = x @ weights["qkv_proj.weight"].T
    if c.short_conv:
        shifted = torch.zeros_like(z)
        for t in range(length):
            for tap in range(c.conv_size):
                source = t - (c.conv_size - 1) + tap
                if source >= 0:
                    shifted[:, t] += weights["conv.weight"][:, tap] * z[:, source]
        z = shifted
    z = z * torch.sigmoid(z)
    h, hv, dk = c.heads, c.num_value_heads, c.head_dim
    q, k = (z[..., i * h * dk : (i + 1) * h * dk].reshape(batch, length, h, dk) for i in (0, 1))
    v = z[..., 2 * h * dk :].reshape(batch, length, hv, c.value_dim)
    q, k = (a / torch.sqrt((a * a).sum(-1, keepdim=True) + 1e-6) for a in (q, k))
    beta = torch.sigmoid(x @ weights["b_proj.weight"].T) * (2 if c.allow_neg_eigval else 1)
    raw = x @ weights["f_a_proj.weight"].T @ weights["f_b_proj.weight"].T + weights["dt_bias"]
    alpha = torch.exp(-torch.exp(weights["A_log"]).unsqueeze(-1) * F.softplus(raw).reshape(batch, length, hv, dk))
    o = torch.zeros_like(v)
    for n in range(batch):
        for i in range(hv):
            state = torch.zeros(dk, c.value_dim, dtype=x.dtype)
            for t in range(length):
                key = k[n, t, i // (hv // h)]
                state = torch.diag(alpha[n, t, i]) @ state
                state = state + torch.outer(key, beta[n, t, i] * (v[n, t, i] - state.T @ key))
                o[n, t, i] = state.T @ q[n, t, i // (hv // h)] / math.sqrt(dk)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + c.norm_eps) * weights["o_norm.weight"]
    gate = x @ weights["g_a_proj.weight"].T @ weights["g_b_proj.weight"].T
    gate = gate + weights["g_b_proj.bias"] if c.output_gate_bias else gate
    return (o.flatten(2) * torch.sigmoid(gate)) @ weights["o_proj.weight"].T


SWITCHES = {
    "the paper's": Config(heads=2, head_dim=4),
    "grouped, reflecting, no bias": Config(
        heads=2, head_dim=4, value_heads=4, expand_v=0.5, allow_neg_eigval=True, output_gate_bias=False, conv_size=2
    ),
    "without convolution": Config(heads=2, head_dim=4, short_conv=False),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_equals_a_literal_transcription_of_the_paper(name: str) -> None:
    torch.manual_seed(0)
    mixer = SWITCHES[name].build(12).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], literal_layer(mixer, x), rtol=1e-10, atol=1e-12)


def test_equals_transformers() -> None:
    from transformers import KimiLinearConfig
    from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention

    theirs = KimiLinearDeltaAttention(KimiLinearConfig(hidden_size=24, linear_head_dim=8, linear_num_heads=3, num_hidden_layers=2), 0)
    ours = Config(heads=3, head_dim=8, output_gate_bias=False).build(24)
    torch.manual_seed(0)
    with torch.no_grad():
        ours.qkv_proj.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.conv.weight.copy_(theirs.conv1d.weight.squeeze(1))
        theirs.forget_gate.A_log.copy_(ours.A_log.view(1, 1, 3, 1))
        theirs.forget_gate.dt_bias.copy_(ours.dt_bias)
        for name in ("b_proj", "g_a_proj", "g_b_proj", "o_proj"):
            getattr(ours, name).weight.copy_(getattr(theirs, name).weight)
        for name in ("f_a_proj", "f_b_proj"):
            getattr(ours, name).weight.copy_(getattr(theirs.forget_gate, name).weight)
        x = torch.randn(2, 70, 24)
        torch.testing.assert_close(ours(x)[0], theirs(x, attention_mask=None), rtol=1e-4, atol=2e-6)


def test_number_of_parameters_of_the_default_layer() -> None:
    """Counted by hand: width 2048, 16 heads of 128."""
    matrices = 4 * 2048 * 2048 + 2048 * 16
    bottlenecks = 2 * (2048 * 128 + 128 * 2048)
    rest = 2048 + 2048 + 16 + 128 + 3 * 2048 * 4  # output gate bias, dt_bias, A_log, norm, convolution
    assert Config().num_parameters(2048) == matrices + bottlenecks + rest


def test_initial_gates_have_the_published_statistics() -> None:
    torch.manual_seed(0)
    mixer = Config(heads=256, head_dim=2).build(8)
    assert mixer.A_log.exp().min() >= 1
    assert 8 < mixer.A_log.exp().mean() < 9
    assert mixer.dt_bias.shape == (512,)
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101
    assert 0.4 < (dt < 1e-2).float().mean() < 0.6
    assert mixer.A_log._no_weight_decay
    assert mixer.dt_bias._no_weight_decay


def test_mistakes_are_named() -> None:
    for wrong in (6, 0, -4):
        with pytest.raises(ConfigError, match=f"multiple of heads=4, got {wrong}"):
            Config(heads=4, value_heads=wrong)
    with pytest.raises(ConfigError, match="whole number"):
        Config(head_dim=5, expand_v=1.5)
    mixer = Config(heads=2, head_dim=8).build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))
