"""Mamba2 passes the mixer contract in its variants, and equals transformers' layer in plain torch."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.mamba2 import Mamba2
from gdn.models.lm import LM
from gdn.testing.mixer_contract import MixerContract

Config = Mamba2.Config
SMALL = Config(head_dim=8, state_dim=10)


class TestOfficial(MixerContract):
    config = SMALL


class TestGroups(MixerContract):
    config = Config(head_dim=8, state_dim=6, groups=3)


class TestWithoutBias(MixerContract):
    config = Config(head_dim=12, state_dim=8, conv_size=3, conv_bias=False)


def transformers_layer(mixer: Mamba2, width: int) -> nn.Module:
    """The same layer of transformers with the same weights."""
    from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    c = mixer.config
    config = Mamba2Config(
        hidden_size=width,
        num_heads=mixer.heads,
        head_dim=c.head_dim,
        state_size=c.state_dim,
        n_groups=c.groups,
        expand=c.expand,
        conv_kernel=c.conv_size,
        use_conv_bias=c.conv_bias,
        layer_norm_epsilon=c.norm_eps,
        chunk_size=16,
        num_hidden_layers=1,
    )
    peer = Mamba2Mixer(config, layer_idx=0)
    weights = {name.replace("conv.", "conv1d."): value for name, value in mixer.state_dict().items()}
    weights["conv1d.weight"] = weights["conv1d.weight"].unsqueeze(1)
    peer.load_state_dict(weights)
    return peer.eval()


@pytest.mark.parametrize("config", [SMALL, Config(head_dim=8, state_dim=6, groups=3)], ids=["official", "groups"])
def test_equals_transformers(config: Mamba2.Config) -> None:
    torch.manual_seed(0)
    mixer = config.build(24)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = transformers_layer(mixer, 24)
    x = torch.randn(2, 50, 24)
    outputs, gradients = [], []
    for layer in (mixer, peer):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y = y[0] if isinstance(y, tuple) else y
        outputs.append(y.detach())
        gradients.append(torch.autograd.grad(y.square().sum(), [inputs, layer.in_proj.weight, layer.A_log, layer.D]))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def literal_layer(mixer: Mamba2, u: torch.Tensor) -> torch.Tensor:
    """The paper's layer for one sequence `[T, width]`, token by token, with state as P x N, without any of the library's operators."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    inner, n = mixer.inner, c.groups * c.state_dim
    z, xbc, dt = (u @ weights["in_proj.weight"].T).split((inner, inner + 2 * n, mixer.heads), dim=-1)
    padded = torch.cat([torch.zeros(c.conv_size - 1, xbc.shape[1], dtype=u.dtype), xbc])
    mixed = torch.stack([(weights["conv.weight"].T * padded[t : t + c.conv_size]).sum(0) for t in range(len(u))]) + weights["conv.bias"]
    x, b, read = (mixed * torch.sigmoid(mixed)).split((inner, n, n), dim=-1)
    outputs = []
    for h in range(mixer.heads):
        state, first = torch.zeros(c.head_dim, c.state_dim, dtype=u.dtype), h * c.groups // mixer.heads * c.state_dim
        group = slice(first, first + c.state_dim)
        step, a, rows = F.softplus(dt[:, h] + weights["dt_bias"][h]), -torch.exp(weights["A_log"][h]), []
        for t in range(len(u)):
            value = x[t, h * c.head_dim : (h + 1) * c.head_dim]
            state = torch.exp(step[t] * a) * state + step[t] * torch.outer(value, b[t, group])
            rows.append(state @ read[t, group] + weights["D"][h] * value)
        outputs.append(torch.stack(rows))
    y = (torch.cat(outputs, dim=1) * z * torch.sigmoid(z)).unflatten(1, (c.groups, -1))
    y = (y / torch.sqrt((y * y).mean(-1, keepdim=True) + c.norm_eps)).flatten(1) * weights["norm.weight"]
    return y @ weights["out_proj.weight"].T


@pytest.mark.parametrize("groups", [1, 2])
def test_equals_a_literal_transcription_of_the_paper(groups: int) -> None:
    torch.manual_seed(0)
    mixer = Config(head_dim=6, state_dim=5, groups=groups).build(12).double()
    x = torch.randn(40, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x.unsqueeze(0))[0][0], literal_layer(mixer, x), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(("width", "parameters", "published"), [(1024, 349_619_712, 349.6), (2048, 1_306_303_488, 1306.3)])
def test_published_models_have_their_parameters(width: int, parameters: int, published: float) -> None:
    config = LM.Config(vocab=32000, width=width, layers=48, mlp=0, pattern=(Config(),))
    assert config.num_parameters() == parameters
    assert round(parameters / 1e6, 1) == published
    with torch.device("meta"):
        assert sum(p.numel() for p in Config().build(width).parameters()) == Config().num_parameters(width)
    assert Config().state_bytes(width, 1, itemsize=0) == 4 * 256 * width


def test_initial_gates_have_the_published_statistics() -> None:
    torch.manual_seed(0)
    mixer = Config(head_dim=1, state_dim=1).build(512)
    assert mixer.A_log.exp().min() >= 1 and mixer.A_log.exp().max() <= 16
    assert 8 < mixer.A_log.exp().mean() < 9
    dt = F.softplus(mixer.dt_bias)
    assert dt.min() >= 0.99e-3 and dt.max() <= 0.101
    assert torch.equal(mixer.D, torch.ones(1024))
    assert all(p._no_weight_decay for p in (mixer.A_log, mixer.dt_bias, mixer.D))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"decay_range: expected 0 < low < high, got \(0.0, 1.0\)"):
        Config(decay_range=(0.0, 1.0))
    with pytest.raises(ConfigError, match=r"head_dim: expected expand \* width = 48 to be a multiple of head_dim \* groups, got 64 \* 1"):
        Config().build(24)
    mixer = SMALL.build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))
