"""What differs between the transformers families that `gdn.accelerate` knows, as data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Projected(NamedTuple):
    """What a layer's input projections give."""

    qkv: Tensor
    """`[B, T, D]`, queries, keys and values side by side: the input of the convolution."""
    gate: Tensor
    """`[B, T, HV * V]`, the raw output gate."""
    a: Tensor
    """`[B, T, HV]`, the raw decay."""
    b: Tensor
    """`[B, T, HV]`, the raw writing strength."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family of transformers."""

    module: str
    """Where its classes are defined."""
    model: str
    """Class of the stack of layers."""
    block: str
    """Class of the block around the mixer."""
    mixer: str
    """Class of the gated delta rule layer."""
    gated_norm: str
    """Class of the mixer's output norm."""
    norm: str
    """Class of all other norms."""
    centred: bool
    """Whether a norm's weight is stored minus one."""
    project: Callable[[Any, Tensor], Projected]
    output_norm: str
    """The mixer's attribute of this name is its output norm, """
    output: str
    """and this one its output projection."""
    sources: Mapping[str, tuple[str, ...]]
    """By class: digests of the source code that was compared with ours. Another source is refused."""


def _qwen3_next(layer: Any, x: Tensor) -> Projected:
    """Both projections are interleaved by key head: q, k, values, gates and b, a of each."""
    heads, groups = layer.num_k_heads, layer.num_v_heads // layer.num_k_heads
    width, values = layer.head_k_dim, groups * layer.head_v_dim
    q, k, v, gate = layer.in_proj_qkvz(x).unflatten(-1, (heads, -1)).split((width, width, values, values), dim=-1)
    b, a = layer.in_proj_ba(x).unflatten(-1, (heads, -1)).split((groups, groups), dim=-1)
    return Projected(torch.cat([q.flatten(2), k.flatten(2), v.flatten(2)], dim=-1), gate.flatten(2), a.flatten(2), b.flatten(2))


def _qwen3_5(layer: Any, x: Tensor) -> Projected:
    return Projected(layer.in_proj_qkv(x), layer.in_proj_z(x), layer.in_proj_a(x), layer.in_proj_b(x))


def _olmo_hybrid(layer: Any, x: Tensor) -> Projected:
    qkv = torch.cat([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], dim=-1)
    return Projected(qkv, layer.g_proj(x), layer.a_proj(x), layer.b_proj(x))


LOSS_SOURCES = ("daa131c9d3400c2a", "648bfdc187fa8a89")
"""Digests of the source of `ForCausalLMLoss` and its `fixed_cross_entropy`, which `loss.py` was compared with; others stay as they are."""

FAMILIES: dict[str, Family] = {
    "qwen3_next": Family(
        module="transformers.models.qwen3_next.modeling_qwen3_next",
        model="Qwen3NextModel",
        block="Qwen3NextDecoderLayer",
        mixer="Qwen3NextGatedDeltaNet",
        gated_norm="Qwen3NextRMSNormGated",
        norm="Qwen3NextRMSNorm",
        centred=True,
        project=_qwen3_next,
        output_norm="norm",
        output="out_proj",
        sources={
            "Qwen3NextModel": ("4cf799558e0bc438", "85ff9c3c2409f386"),
            "Qwen3NextDecoderLayer": ("974b01af32d850d2", "09f5a873f7709b25"),
            "Qwen3NextGatedDeltaNet": ("72026333c75e56e6", "6d918e00ad56b97e"),
            "Qwen3NextRMSNormGated": ("19e010e31ccbe6fb",),
            "Qwen3NextRMSNorm": ("9289e4ccb3fa9eff",),
        },
    ),
    "qwen3_5": Family(
        module="transformers.models.qwen3_5.modeling_qwen3_5",
        model="Qwen3_5TextModel",
        block="Qwen3_5DecoderLayer",
        mixer="Qwen3_5GatedDeltaNet",
        gated_norm="Qwen3_5RMSNormGated",
        norm="Qwen3_5RMSNorm",
        centred=True,
        project=_qwen3_5,
        output_norm="norm",
        output="out_proj",
        sources={
            "Qwen3_5TextModel": ("7dc0858da498da9f", "318153c217a776a1"),
            "Qwen3_5DecoderLayer": ("883ce17ef86293ec", "551207043bf45e29"),
            "Qwen3_5GatedDeltaNet": ("72f4d6cfd73583d6", "ca8e32d95d74d13d"),
            "Qwen3_5RMSNormGated": ("3e776f46382cd8a6",),
            "Qwen3_5RMSNorm": ("f8dc3210a9e9c607",),
        },
    ),
    "qwen3_5_moe": Family(
        module="transformers.models.qwen3_5_moe.modeling_qwen3_5_moe",
        model="Qwen3_5MoeTextModel",
        block="Qwen3_5MoeDecoderLayer",
        mixer="Qwen3_5MoeGatedDeltaNet",
        gated_norm="Qwen3_5MoeRMSNormGated",
        norm="Qwen3_5MoeRMSNorm",
        centred=True,
        project=_qwen3_5,
        output_norm="norm",
        output="out_proj",
        sources={
            "Qwen3_5MoeTextModel": ("391c232e2583777c", "0d2c086a0c07fa41"),
            "Qwen3_5MoeDecoderLayer": ("feef3cda78d8d37f", "34b658906c223cdf"),
            "Qwen3_5MoeGatedDeltaNet": ("dc7040a0ab26c2ef", "b8907cf2c2aa478f"),
            "Qwen3_5MoeRMSNormGated": ("b11c04bf489a2dfe",),
            "Qwen3_5MoeRMSNorm": ("c041dfe49d455431",),
        },
    ),
    "olmo_hybrid": Family(
        module="transformers.models.olmo_hybrid.modeling_olmo_hybrid",
        model="OlmoHybridModel",
        block="OlmoHybridLinearAttentionDecoderLayer",
        mixer="OlmoHybridGatedDeltaNet",
        gated_norm="OlmoHybridRMSNormGated",
        norm="OlmoHybridRMSNorm",
        centred=False,
        project=_olmo_hybrid,
        output_norm="o_norm",
        output="o_proj",
        sources={
            "OlmoHybridModel": ("4570e772172de761", "de2166df328de301"),
            "OlmoHybridLinearAttentionDecoderLayer": ("2c984ca24a9e6fbe", "d196e4d73eeac84b"),
            "OlmoHybridGatedDeltaNet": ("816baf96bbda7362", "469b9debee3c66fd"),
            "OlmoHybridRMSNormGated": ("9bc43275810f626a",),
            "OlmoHybridRMSNorm": ("4adadb6db6f2df70",),
        },
    ),
}
"""By transformers' model type."""
