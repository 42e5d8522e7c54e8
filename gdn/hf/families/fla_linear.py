"""flash-linear-attention's memories that only add: Gated Linear Attention, Gated Slot Attention, RetNet, HGRN2."""

from __future__ import annotations

from typing import Any

from gdn.core.errors import ConfigError
from gdn.hf.families.base import Fields, Line, Wishes
from gdn.hf.families.fla import CONV, O_PROJ, QKV, Layer, family_of, same
from gdn.mixers.gla import GLA as GLAMixer
from gdn.mixers.gsa import GSA as GSAMixer
from gdn.mixers.hgrn2 import HGRN2 as HGRN2Mixer
from gdn.mixers.retnet import RetNet
from gdn.models.lm import LM

GATED_NORM = Line("o_norm.weight", "attn.g_norm_swish_gate.weight")

UNFUSED = (("g_norm_swish_gate.weight", "g_norm.weight"),)
"""The name of the same norm where norm and gate are not one kernel (`fuse_norm` false)."""

EPSILON = 1e-5
"""Of the output norms of GSA and HGRN2, whatever the configuration says: it is not passed to the function that norms and projects."""

RANK, NORMALISER = 16, 16.0
"""Of GLA's decay: its configuration cannot change them."""


def _as_many_heads(f: Fields, heads: int) -> None:
    f.only("num_kv_heads", None, heads)


def _gla(mixer: GLAMixer.Config) -> tuple[Line, ...]:
    decay = (("0", "weight"), ("1", "weight"), ("1", "bias"))
    return (
        QKV,
        *(CONV,) * mixer.short_conv,
        *(Line(f"decay_proj.{i}.{kind}", f"attn.gk_proj.{i}.{kind}") for i, kind in decay),
        *same("g_proj.weight"),
        GATED_NORM,
        O_PROJ,
    )


def _read_gla(f: Fields) -> GLAMixer.Config:
    f.free("use_gk", "use_gv")  # their layer does not take them
    f.only("feature_map", None)
    f.only("use_output_gate", True)
    f.only("elementwise_affine", True)
    f.only("clamp_min", None)
    f.only("gate_low_rank_dim", RANK)
    f.only("gate_logit_normalizer", NORMALISER)
    heads = f.get("num_heads", 4)
    _as_many_heads(f, heads)
    return GLAMixer.Config(
        heads=heads,
        expand_k=float(f.get("expand_k", 0.5)),
        expand_v=float(f.get("expand_v", 1.0)),
        gate_rank=RANK,
        gate_normaliser=NORMALISER,
        short_conv=f.get("use_short_conv", False),
        conv_size=f.get("conv_size", 4),
        norm_eps=f.get("norm_eps", 1e-6),
    )


def _write_gla(mixer: GLAMixer.Config, config: LM.Config, wishes: Wishes) -> dict[str, Any]:
    wishes.fixed(mixer, "gla.", gate_rank=RANK, gate_normaliser=NORMALISER)
    return {
        "num_heads": mixer.heads,
        "expand_k": mixer.expand_k,
        "expand_v": mixer.expand_v,
        "use_short_conv": mixer.short_conv,
        "conv_size": mixer.conv_size,
        "fuse_norm": True,
    }


FEATURES = {"swish": "silu", "relu": "relu"}


def _gsa(mixer: GSAMixer.Config) -> tuple[Line, ...]:
    norm = (Line("o_norm.weight", "attn.g_norm.weight"),) * mixer.norm_weight
    return (QKV, *same("f_proj.weight"), *norm, O_PROJ)


def _read_gsa(f: Fields) -> GSAMixer.Config:
    f.free("use_output_gate", "use_norm", "clamp_min", "clamp_max", "conv_size")  # their layer does nothing with them
    f.only("use_short_conv", False)
    f.only("feature_map", *FEATURES)
    f.only("expand_v", 1)  # their norm has the width of the residual stream
    heads, expand = f.get("num_heads", 4), float(f.get("expand_k", 1.0))
    _as_many_heads(f, heads)
    feature: Any = FEATURES[f.get("feature_map", "swish")]
    return GSAMixer.Config(
        heads=heads,
        slots=f.get("num_slots", 64) or round(f["hidden_size"] * expand) // heads,
        expand_k=expand,
        feature_map=feature,
        gate_normaliser=float(f.get("gate_logit_normalizer", 8)),
        norm_weight=f.get("elementwise_affine", True),
        norm_eps=EPSILON,
    )


def _write_gsa(mixer: GSAMixer.Config, config: LM.Config, wishes: Wishes) -> dict[str, Any]:
    wishes.fixed(mixer, "gsa.", expand_v=1.0)
    return {
        "num_heads": mixer.heads,
        "num_slots": mixer.slots,
        "expand_k": mixer.expand_k,
        "expand_v": mixer.expand_v,
        "feature_map": next(theirs for theirs, ours in FEATURES.items() if ours == mixer.feature_map),
        "gate_logit_normalizer": mixer.gate_normaliser,
        "elementwise_affine": mixer.norm_weight,
    }


def _retnet(mixer: RetNet.Config) -> tuple[Line, ...]:
    return (QKV, *same("g_proj.weight"), GATED_NORM, O_PROJ)


def _read_retnet(f: Fields) -> RetNet.Config:
    f.free("use_short_conv", "conv_size")  # their blocks do not pass them on
    f.only("feature_map", None)
    f.only("use_output_gate", True)
    f.only("elementwise_affine", True)
    heads = f.get("num_heads", 8)
    _as_many_heads(f, heads)
    return RetNet.Config(
        heads=heads,
        expand_k=float(f.get("expand_k", 1.0)),
        expand_v=float(f.get("expand_v", 2.0)),
        norm_eps=f.get("norm_eps", 1e-6),
    )


def _write_retnet(mixer: RetNet.Config, config: LM.Config, wishes: Wishes) -> dict[str, Any]:
    wishes.fixed(mixer, "retnet.", rope_base=10000.0)
    return {"num_heads": mixer.heads, "expand_k": mixer.expand_k, "expand_v": mixer.expand_v, "fuse_norm": True}


def _hgrn2(mixer: HGRN2Mixer.Config) -> tuple[Line, ...]:
    return (
        Line("qfi_proj.weight", {f"attn.{part}_proj.weight": part for part in "qfi"}),
        Line("o_norm.weight", "attn.g_norm.weight"),
        O_PROJ,
    )


def _lower_bounds(config: LM.Config) -> tuple[Line, ...]:
    """Of all layers in one matrix."""
    layers = [i for i, m in enumerate(config.mixers) if isinstance(m, HGRN2Mixer.Config) and m.lower_bound]
    return (Line(" ".join(f"blocks.{i}.mixer.bound" for i in layers), "model.lower_bounds", flat=True),) if layers else ()


def _read_hgrn2(f: Fields) -> HGRN2Mixer.Config:
    f.free("conv_size")
    f.only("use_short_conv", False)
    f.only("elementwise_affine", True)
    width, heads, ratio, bounds = f["hidden_size"], f.get("num_heads", None), f.get("expand_ratio", 128), f.get("use_lower_bound", True)
    if bounds and f.get("attn", None):
        raise ConfigError("hgrn2: use_lower_bound=True is not supported beside attn: their bounds also count layers of attention")
    if not (ratio or heads):
        raise ConfigError("hgrn2: expected expand_ratio or num_heads, got neither")
    return HGRN2Mixer.Config(head_dim=ratio or width // heads, lower_bound=bounds, norm_eps=EPSILON)


def _write_hgrn2(mixer: HGRN2Mixer.Config, config: LM.Config, wishes: Wishes) -> dict[str, Any]:
    if mixer.lower_bound and any(m.tag() == "attention" for m in config.mixers):
        wishes.refuse("hgrn2.lower_bound=True beside attention", "one of the two")
    return {"num_heads": mixer.heads(config.width), "expand_ratio": mixer.head_dim, "use_lower_bound": mixer.lower_bound}


GLA = family_of(Layer("gla", "GLAForCausalLM", "gla", _gla, _read_gla, _write_gla, aliases=UNFUSED))
GSA = family_of(Layer("gsa", "GSAForCausalLM", "gsa", _gsa, _read_gsa, _write_gsa, epsilon=EPSILON))
RETNET = family_of(Layer("retnet", "RetNetForCausalLM", "retnet", _retnet, _read_retnet, _write_retnet, hidden_ratio=2, aliases=UNFUSED))
HGRN2 = family_of(Layer("hgrn2", "HGRN2ForCausalLM", "hgrn2", _hgrn2, _read_hgrn2, _write_hgrn2, outside=_lower_bounds, epsilon=EPSILON))
