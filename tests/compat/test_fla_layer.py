"""FLA's layer class: its parameter names, the numbers of our own layer, its cache protocol, its ways to say what is padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gdn import Packing
from gdn.compat.fla import Cache, GatedDeltaNet
from gdn.core.errors import ArgumentError
from gdn.mixers import GatedDeltaNet as Ours

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
SIZES: dict[str, Any] = {"hidden_size": 24, "expand_v": 1.5, "head_dim": 8, "num_heads": 2, "num_v_heads": 4, "layer_idx": 0}

NAMES = {
    "A_log": (4,),
    "dt_bias": (4,),
    "q_proj.weight": (16, 24),
    "k_proj.weight": (16, 24),
    "v_proj.weight": (48, 24),
    "a_proj.weight": (4, 24),
    "b_proj.weight": (4, 24),
    "g_proj.weight": (48, 24),
    "o_proj.weight": (24, 48),
    "q_conv1d.weight": (16, 1, 4),
    "k_conv1d.weight": (16, 1, 4),
    "v_conv1d.weight": (48, 1, 4),
    "o_norm.weight": (12,),
}
"""The state dict of FLA 0.6.0's layer of these sizes."""


def build(**changes: Any) -> GatedDeltaNet:
    torch.manual_seed(0)
    layer = GatedDeltaNet(**{**SIZES, **changes}).double().eval()
    with torch.no_grad():
        layer.o_norm.weight.add_(0.3 * torch.randn_like(layer.o_norm.weight))
    return layer


def input(batch: int = 2, length: int = 40) -> Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def ours(layer: GatedDeltaNet, **changes: Any) -> Ours:
    """Our layer with the same weights."""
    config = Ours.Config(heads=2, head_dim=8, value_heads=4, expand_v=1.5, beta_bias=False, **changes)
    mixer, state = config.build(24).double(), layer.state_dict()
    state["qkv_proj.weight"] = torch.cat([state.pop(f"{n}_proj.weight") for n in "qkv"])
    if config.short_conv:
        state["conv.weight"] = torch.cat([state.pop(f"{n}_conv1d.weight").squeeze(1) for n in "qkv"])
    mixer.load_state_dict(state)
    return mixer


def test_parameters_have_the_names_and_shapes_of_fla() -> None:
    assert {name: tuple(t.shape) for name, t in build().state_dict().items()} == NAMES
    biased = build(conv_bias=True).state_dict()
    assert {"q_conv1d.bias", "k_conv1d.bias", "v_conv1d.bias"} == biased.keys() - NAMES.keys()
    assert NAMES.keys() - build(use_gate=False, use_short_conv=False).state_dict().keys() == {
        "g_proj.weight",
        *(f"{n}_conv1d.weight" for n in "qkv"),
    }


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        ({}, {}),
        ({"allow_neg_eigval": True}, {"allow_neg_eigval": True}),
        ({"use_gate": False}, {"output_gate": False}),
        ({"use_short_conv": False}, {"short_conv": False}),
        ({"norm_eps": 0.1, "mode": "fused_recurrent", "output_gate_activation": "silu"}, {"norm_eps": 0.1}),
    ],
    ids=str,
)
def test_is_our_layer_under_other_names(flags: dict[str, Any], changes: dict[str, Any]) -> None:
    layer, x = build(**flags), input(length=70)
    mixer = ours(layer, **changes)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            y, nothing, cache = layer(x)
            torch.testing.assert_close(y, mixer(x)[0], **EXACT)
            assert nothing is None
            assert cache is None


def test_a_sigmoid_gate_and_a_bias_of_the_convolution() -> None:
    layer, x = build(output_gate_activation="sigmoid", use_gate=True), input()
    plain = build()
    plain.load_state_dict(layer.state_dict())
    with torch.no_grad():
        gate = layer.g_proj(x).unflatten(-1, (4, 12))
        ratio = layer.o_norm.weight.new_ones(1) / gate  # silu(z) = z sigmoid(z)
        inner: list[Tensor] = []
        plain.o_proj.register_forward_pre_hook(lambda module, args: inner.append(args[0]))
        plain(x)
        torch.testing.assert_close(layer(x)[0], layer.o_proj(inner[0] * ratio.flatten(2)), **EXACT)
        biased = build(conv_bias=True)
        y = biased(x)[0]
        biased.k_conv1d.bias.zero_()
        assert not torch.allclose(biased(x)[0], y)


@torch.no_grad()
@pytest.mark.parametrize("flags", [{}, {"use_short_conv": False}, {"conv_bias": True}], ids=str)
def test_the_cache_continues_a_sequence(flags: dict[str, Any]) -> None:
    layer, x = build(**flags), input(length=80)
    whole = layer(x)[0]
    for pieces in ([80], [70, 1, 1, 8], [2, 1, 77], [1] * 3 + [77]):
        cache, outputs = Cache(), []
        for piece in x.split(pieces, dim=1):
            y, _, returned = layer(piece, past_key_values=cache, use_cache=True)
            assert returned is cache
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, 1), whole, **EXACT)
        assert cache.get_seq_length() == 80
        assert cache[0]["recurrent_state"].shape == (2, 4, 12, 8)
    if layer.use_short_conv:
        q, _, _ = cache[0]["conv_state"]
        torch.testing.assert_close(q, layer.q_proj(x[:, -4:]).transpose(1, 2), **EXACT)
    cache.reset()
    assert len(cache) == cache.get_seq_length() == 0


def test_masked_tokens_are_taken_out() -> None:
    layer, x = build(), input(3)
    mask = torch.ones(3, 45, dtype=torch.int64)
    mask[0, 5:12] = mask[1, 40:] = mask[2, 20:23] = 0  # padding on the left, on the right and in the middle
    cache = Cache()
    y = layer(x, attention_mask=mask, past_key_values=cache, use_cache=True)[0]
    for row, states in enumerate(cache[0]["recurrent_state"]):
        kept, alone = mask[row, 5:].bool(), Cache()
        expected = layer(x[row : row + 1, kept], past_key_values=alone, use_cache=True)[0]
        torch.testing.assert_close(y[row : row + 1, kept], expected, **EXACT)
        torch.testing.assert_close(states, alone[0]["recurrent_state"][0], **EXACT)
        assert not y[row, ~kept].any()


def test_packed_documents() -> None:
    layer, x = build(), input(1)
    packed = layer(x, cu_seqlens=torch.tensor([0, 10, 40]))[0]
    torch.testing.assert_close(packed, torch.cat([layer(p)[0] for p in x.split([10, 30], 1)], 1), **EXACT)
    torch.testing.assert_close(packed, ours(layer)(x, packing=Packing.from_lengths([10, 30]))[0], **EXACT)


def test_trains() -> None:
    layer = build().train()
    layer(input())[0].square().sum().backward()
    assert all(p.grad is not None and bool((p.grad != 0).any()) for p in layer.parameters())
    assert layer.A_log._no_weight_decay


def test_refusals_name_the_argument() -> None:
    with pytest.raises(ArgumentError, match=r"use_output_gate: GatedDeltaNet of FLA 0.6.0 knows no such argument"):
        build(use_output_gate=True)
    with pytest.raises(ArgumentError, match='mode: expected "chunk" or "fused_recurrent", got "parallel"'):
        build(mode="parallel")
    with pytest.raises(ArgumentError, match="num_v_heads: expected a multiple of num_heads=2, got 3"):
        build(num_v_heads=3)
    with pytest.raises(ArgumentError, match="expand_v: expected head_dim"):
        build(expand_v=1.3)
    with pytest.raises(ArgumentError, match="output_gate_activation"):
        build(output_gate_activation="relu")
    with pytest.raises(ArgumentError, match="layer_idx: expected the layer's place"):
        build(layer_idx=None)(input(), past_key_values=Cache(), use_cache=True)
    with pytest.raises(ArgumentError, match="output_attentions"):
        build()(input(), output_attentions=True)
    with pytest.raises(ArgumentError, match="cp_context"):
        build()(input(), cp_context=object())
    with pytest.raises(ArgumentError, match=r"attention_mask: expected \[B, T\], 0 at padding"):
        build()(input(), attention_mask=torch.ones(2, 1, 40, 40))
    with pytest.raises(ArgumentError, match=r"attention_mask: expected .* T of at least 40"):
        build()(input(), attention_mask=torch.ones(2, 30))
    with pytest.raises(ArgumentError, match="layer_idx: expected at most 0"):
        Cache().update(layer_idx=1)
