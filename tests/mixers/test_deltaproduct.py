"""DeltaProduct passes the mixer contract, equals a literal transcription of the paper, has its size, and can track a permutation."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import MixerConfig
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.deltaproduct import DeltaProduct
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.sizes import size
from gdn.testing.mixer_contract import MixerContract

Config = DeltaProduct.Config


class TestGated(MixerContract):
    config = Config(heads=2, head_dim=6, value_heads=4, expand_v=1.5, householders=2, gate=True, allow_neg_eigval=True, conv_size=3)


class TestUngated(MixerContract):
    config = Config(heads=2, head_dim=6, householders=3, gate=False, allow_neg_eigval=False, output_gate=False, short_conv=False)


def literal_layer(mixer: DeltaProduct, x: torch.Tensor) -> torch.Tensor:
    """The recurrence of the paper, H_t = A_t H_{t-1} + B_t with A_t the product of the Householders, without the library's operators."""
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
    n, h, hv = c.householders, c.heads, c.num_value_heads
    q = z[..., : h * c.head_dim].reshape(batch, length, h, c.head_dim)
    k = z[..., h * c.head_dim : (1 + n) * h * c.head_dim].reshape(batch, length, n, h, c.head_dim)
    v = z[..., (1 + n) * h * c.head_dim :].reshape(batch, length, n, hv, c.value_dim)
    q, k = (a / torch.sqrt((a * a).sum(-1, keepdim=True) + 1e-6) for a in (q, k))
    beta = torch.sigmoid(x @ weights["b_proj.weight"].T).reshape(batch, length, n, hv) * (2 if c.allow_neg_eigval else 1)
    alpha = torch.ones(batch, length, hv, dtype=x.dtype)
    if c.gate:
        alpha = torch.exp(-torch.exp(weights["A_log"]) * F.softplus(x @ weights["a_proj.weight"].T + weights["dt_bias"]))
    o = torch.zeros(batch, length, hv, c.value_dim, dtype=x.dtype)
    eye = torch.eye(c.head_dim, dtype=x.dtype)
    for b in range(batch):
        for i in range(hv):
            state = torch.zeros(c.head_dim, c.value_dim, dtype=x.dtype)
            for t in range(length):
                keys = [k[b, t, j, i // (hv // h)] for j in range(n)]
                factors = [eye - beta[b, t, j, i] * torch.outer(keys[j], keys[j]) for j in range(n)]
                transition = alpha[b, t, i] * eye
                for factor in factors:
                    transition = factor @ transition
                state = transition @ state
                for j in range(n):
                    write = beta[b, t, j, i] * torch.outer(keys[j], v[b, t, j, i])
                    for factor in factors[j + 1 :]:
                        write = factor @ write
                    state = state + write
                o[b, t, i] = state.T @ q[b, t, i // (hv // h)] / math.sqrt(c.head_dim)
    o = o / torch.sqrt((o * o).mean(-1, keepdim=True) + c.norm_eps) * weights["o_norm.weight"]
    if c.output_gate:
        gate = (x @ weights["g_proj.weight"].T).reshape(o.shape)
        o = o * gate * torch.sigmoid(gate)
    return o.flatten(2) @ weights["o_proj.weight"].T


SWITCHES = {
    "gated": Config(heads=2, head_dim=4, householders=2, gate=True, allow_neg_eigval=True),
    "ungated": Config(heads=2, head_dim=4, householders=3, gate=False, allow_neg_eigval=True, output_gate=False),
    "grouped": Config(heads=2, head_dim=4, value_heads=4, expand_v=0.5, householders=2, gate=True, allow_neg_eigval=False),
    "without convolution": Config(heads=2, head_dim=4, householders=4, gate=False, allow_neg_eigval=False, short_conv=False),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_equals_a_literal_transcription_of_the_paper(name: str) -> None:
    torch.manual_seed(0)
    mixer = SWITCHES[name].build(12).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x)[0], literal_layer(mixer, x), rtol=1e-10, atol=1e-12)


ONE_WRITE: dict[str, tuple[bool, MixerConfig]] = {
    "DeltaNet": (False, DeltaNet.Config(heads=2, head_dim=8, output_gate=True)),
    "Gated DeltaNet": (True, GatedDeltaNet.Config(heads=2, head_dim=8, expand_v=1.0, beta_bias=False)),
}


@pytest.mark.parametrize("name", ONE_WRITE)
def test_one_write_is_an_older_mixer(name: str) -> None:
    gate, config = ONE_WRITE[name]
    torch.manual_seed(0)
    ours = Config(heads=2, head_dim=8, householders=1, gate=gate, allow_neg_eigval=False).build(16).double()
    other = config.build(16).double()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x)[0], other(x)[0])


def test_published_model_has_its_number_of_parameters() -> None:
    """392 M, and as many with one write and twice the heads: the two are compared in the paper."""
    model = size("deltaproduct_392m")
    assert round(model.num_parameters() / 1e6) == 392
    single = model.pattern[0].with_(householders=1, heads=12)
    assert round(model.with_(pattern=(single,)).num_parameters() / 1e6) == 392


def test_initial_gates_are_gated_deltanets_and_do_not_decay() -> None:
    torch.manual_seed(0)
    mixer = SWITCHES["gated"].with_(heads=512, value_heads=None).build(16)
    rate, step = mixer.A_log.detach().exp(), F.softplus(mixer.dt_bias.detach())
    assert 0 <= rate.min() < 1 < 15 < rate.max() <= 16
    assert 1e-3 * 0.999 <= step.min() < 2e-3 < 0.05 < step.max() <= 0.1 * 1.001
    assert all(parameter._no_weight_decay for parameter in (mixer.A_log, mixer.dt_bias))


@pytest.mark.parametrize(("householders", "top", "exact"), [(2, True, True), (1, True, False), (2, False, False)])
def test_two_reflections_rotate(householders: int, top: bool, exact: bool) -> None:
    """Whether a layer of given keys can turn its memory by a third of a circle for ever: what tracking three things in a circle needs."""
    from gdn.ops import gated_delta_product

    best = math.inf
    for angle in torch.linspace(0, math.pi, 25, dtype=torch.float64).tolist():
        directions = torch.tensor([[1.0, 0.0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64)[:householders]
        k = directions.reshape(1, 1, householders, 1, 2).expand(1, 30, -1, -1, -1)
        beta = torch.full((1, 30, householders, 1), 2.0 if top else 1.0, dtype=torch.float64)
        start = torch.tensor([1.0, 0.0], dtype=torch.float64).reshape(1, 1, 2, 1)
        q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 30, 1, 2)
        zero = torch.zeros(1, 30, 1, dtype=torch.float64)
        o, _ = gated_delta_product(q, k, 0 * k[..., :1], zero, beta, scale=1.0, initial_state=start)
        turned = torch.cos(torch.arange(1, 31, dtype=torch.float64) * 2 * math.pi / 3)
        best = min(best, float((o.flatten() - turned).abs().max()))
    assert (best < 1e-9) == exact


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="missing householders, gate, allow_neg_eigval"):
        Config.from_dict({"type": "deltaproduct"})
    with pytest.raises(ConfigError, match="householders: expected at least 1, got 0"):
        Config(householders=0, gate=True, allow_neg_eigval=True)
    for wrong in (6, 0, -4):
        with pytest.raises(ConfigError, match=f"multiple of heads=4, got {wrong}"):
            Config(householders=2, gate=True, allow_neg_eigval=True, heads=4, value_heads=wrong)
    mixer = SWITCHES["gated"].build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))
