"""DeltaNet passes the mixer contract in its variants, equals a literal transcription of the paper and has the published sizes."""

from __future__ import annotations

import math

import pytest
import torch

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.sizes import size
from gdn.testing.mixer_contract import MixerContract

Config = DeltaNet.Config


class TestPaper(MixerContract):
    config = Config(heads=2, head_dim=8)


class TestFullStrengthWithGate(MixerContract):
    config = Config(heads=3, head_dim=6, expand_v=1.5, short_conv=False, beta=False, output_gate=True, qk_activation="elu+1", qk_norm="l1")


def literal_layer(mixer: DeltaNet, x: torch.Tensor) -> torch.Tensor:
    """The recurrence of the paper, state as value x key, token by token, without any of the library's operators."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    batch, length, _ = x.shape
    z = x @ weights["qkv_proj.weight"].T
    if c.short_conv:
        taps, shifted = weights["conv.weight"], torch.zeros_like(z)
        for t in range(length):
            for tap in range(c.conv_size):
                source = t - (c.conv_size - 1) + tap
                if source >= 0:
                    shifted[:, t] += taps[:, tap] * z[:, source]
        z = shifted
    hk = c.heads * c.head_dim
    q, k, v = (part.reshape(batch, length, c.heads, -1) for part in z.split((hk, hk, z.shape[-1] - 2 * hk), -1))
    v = v * torch.sigmoid(v)
    feature = {
        "silu": lambda a: a * torch.sigmoid(a),
        "relu": lambda a: torch.clamp(a, min=0),
        "elu+1": lambda a: torch.where(a > 0, a + 1, torch.exp(a)),
        "identity": lambda a: a,
    }[c.qk_activation]
    size = {
        "l2": lambda a: torch.sqrt((a * a).sum(-1, keepdim=True) + 1e-6),
        "l1": lambda a: a.abs().sum(-1, keepdim=True).clamp_min(1e-6),
        "none": lambda a: 1.0,
    }[c.qk_norm]
    q, k = (feature(a) / size(feature(a)) for a in (q, k))
    beta = torch.sigmoid(x @ weights["b_proj.weight"].T) if c.beta else torch.ones(batch, length, c.heads, dtype=x.dtype)
    beta = 2 * beta if c.allow_neg_eigval else beta
    o = torch.zeros_like(v)
    for n in range(batch):
        for h in range(c.heads):
            state = torch.zeros(c.value_dim, c.head_dim, dtype=x.dtype)
            for t in range(length):
                key, strength = k[n, t, h], beta[n, t, h]
                state = state @ (torch.eye(c.head_dim, dtype=x.dtype) - strength * torch.outer(key, key))
                state = state + strength * torch.outer(v[n, t, h], key)
                o[n, t, h] = state @ q[n, t, h] / math.sqrt(c.head_dim)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + c.norm_eps) * weights["o_norm.weight"]
    if c.output_gate:
        gate = (x @ weights["g_proj.weight"].T).reshape(o.shape)
        o = o * gate * torch.sigmoid(gate)
    return o.flatten(2) @ weights["o_proj.weight"].T


SWITCHES = {
    "the paper's": Config(heads=2, head_dim=4),
    "L1 and 1 + ELU": Config(heads=2, head_dim=4, qk_norm="l1", qk_activation="elu+1"),
    "L2 and ReLU": Config(heads=2, head_dim=4, qk_activation="relu"),
    "without convolution": Config(heads=2, head_dim=4, short_conv=False),
    "identity, no norm": Config(heads=2, head_dim=2, short_conv=False, qk_activation="identity", qk_norm="none"),
    "full strength, reflecting": Config(heads=2, head_dim=4, beta=False, allow_neg_eigval=True),
    "reflecting, gated, wide values": Config(heads=2, head_dim=4, expand_v=1.5, allow_neg_eigval=True, output_gate=True, conv_size=2),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_equals_a_literal_transcription_of_the_paper(name: str) -> None:
    torch.manual_seed(0)
    mixer = SWITCHES[name].build(12).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], literal_layer(mixer, x), rtol=1e-10, atol=1e-12)


def test_equals_transformers_gated_layer_that_never_forgets() -> None:
    """OLMo Hybrid's layer with exp(A_log) = 0 is DeltaNet with an output gate."""
    from transformers import OlmoHybridConfig
    from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet

    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12}
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = OlmoHybridConfig(vocab_size=16, hidden_size=24, linear_allow_neg_eigval=True, **layers, **heads)
    torch.manual_seed(0)
    theirs = OlmoHybridGatedDeltaNet(config, 0)
    ours = Config(heads=2, head_dim=8, expand_v=1.5, allow_neg_eigval=True, output_gate=True).build(24)
    with torch.no_grad():
        theirs.A_log.fill_(-math.inf)
        ours.qkv_proj.weight.copy_(torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]))
        ours.conv.weight.copy_(theirs.conv1d.weight.squeeze(1))
        for name in ("b_proj", "g_proj", "o_proj"):
            getattr(ours, name).weight.copy_(getattr(theirs, name).weight)
        x = torch.randn(2, 70, 24)
        torch.testing.assert_close(ours(x)[0], theirs(x), rtol=1e-4, atol=2e-6)


def test_published_models_have_their_number_of_parameters() -> None:
    assert round(size("deltanet_340m").num_parameters() / 1e6, 1) == 374.4
    assert round(size("deltanet_1.3b").num_parameters() / 1e6, 1) == 1365.7


def test_is_gated_deltanet_without_gates() -> None:
    torch.manual_seed(0)
    ours = Config(heads=2, head_dim=8).build(16).double()
    other = GatedDeltaNet.Config(heads=2, head_dim=8, expand_v=1.0, gate=False, output_gate=False, beta_bias=False).build(16).double()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], other(x)[0])


@pytest.mark.parametrize("beta", [True, False])
def test_padding_does_not_touch_a_memory_that_is_not_empty(beta: bool) -> None:
    """1 + ELU makes keys of one from the zeros at padding; only the strength keeps them from writing."""
    torch.manual_seed(0)
    mixer = Config(heads=2, head_dim=4, beta=beta, short_conv=False, qk_activation="elu+1").build(8).double()
    for length in (3, 20):  # by the step and over the sequence
        state = mixer.init_state(1)
        state["memory"].normal_()
        before = state.clone()
        with torch.no_grad():
            mixer(torch.randn(1, length, 8, dtype=torch.float64), state=state, mask=torch.zeros(1, length, dtype=torch.bool))
        torch.testing.assert_close(state["memory"], before["memory"])


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="heads: expected at least 1, got 0"):
        Config(heads=0)
    with pytest.raises(ConfigError, match="whole number"):
        Config(head_dim=5, expand_v=1.5)
    mixer = Config(heads=2, head_dim=8).build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))
