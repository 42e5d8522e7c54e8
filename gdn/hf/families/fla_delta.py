"""flash-linear-attention's delta rules: separate q, k and v with a convolution each."""

from __future__ import annotations

import math
from typing import Any

from gdn.core.errors import ConfigError
from gdn.hf.families.base import Fields, Line, Wishes
from gdn.hf.families.fla import CONV, O_PROJ, QKV, Layer, family_of, same
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.deltaproduct import DeltaProduct
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.kimi_delta import KimiDelta
from gdn.models.lm import LM

DECAY = same("a_proj.weight", "A_log", "dt_bias")
GATE = same("g_proj.weight")

ACTIVATIONS = {"silu": "silu", "relu": "relu", "elu": "elu+1", "identity": "identity"}
NORMS = {"l2": "l2", "sum": "l1"}


def _delta(mixer: Any) -> tuple[Line, ...]:
    """What all have: projections, convolutions where there are any, output norm."""
    return (QKV, *(CONV,) * mixer.short_conv, *same("o_norm.weight"), O_PROJ)


def _gated_deltanet(mixer: GatedDeltaNet.Config) -> tuple[Line, ...]:
    return (*_delta(mixer), *same("b_proj.weight"), *DECAY, *GATE * mixer.output_gate)


def _read_gated_deltanet(f: Fields) -> GatedDeltaNet.Config:
    f.only("output_gate_activation", "swish", "silu")
    return GatedDeltaNet.Config(
        heads=f.get("num_heads", 6),
        head_dim=f.get("head_dim", 256),
        value_heads=f.get("num_v_heads", None),
        expand_v=float(f.get("expand_v", 2.0)),
        short_conv=f.get("use_short_conv", True),
        conv_size=f.get("conv_size", 4),
        output_gate=f.get("use_gate", True),
        allow_neg_eigval=f.get("allow_neg_eigval", False),
        beta_bias=False,
        norm_eps=f.get("norm_eps", 1e-6),
    )


def _write_gated_deltanet(mixer: GatedDeltaNet.Config, config: LM.Config, wishes: Wishes) -> dict[str, Any]:
    wishes.fixed(mixer, "gated_deltanet.", qk_activation="silu", qk_norm="l2", gate=True, beta_bias=False, output_norm=True)
    return {
        "num_heads": mixer.heads,
        "num_v_heads": mixer.value_heads,
        "head_dim": mixer.head_dim,
        "expand_v": mixer.expand_v,
        "use_gate": mixer.output_gate,
        "use_short_conv": mixer.short_conv,
        "conv_size": mixer.conv_size,
        "allow_neg_eigval": mixer.allow_neg_eigval,
    }


def _delta_net(mixer: DeltaNet.Config) -> tuple[Line, ...]:
    return (*_delta(mixer), *same("b_proj.weight") * mixer.beta, *GATE * mixer.output_gate)


def _read_delta_net(f: Fields) -> DeltaNet.Config:
    f.free("use_output_norm")  # theirs always norms
    width, heads = f["hidden_size"], f.get("num_heads", 16)
    keys, values = _channels(f, "expand_k", width, heads), _channels(f, "expand_v", width, heads)
    f.only("qk_activation", *ACTIVATIONS)
    f.only("qk_norm", *NORMS)
    activation: Any = ACTIVATIONS[f.get("qk_activation", "silu")]
    norm: Any = NORMS[f.get("qk_norm", "l2")]
    return DeltaNet.Config(
        heads=heads,
        head_dim=keys // heads,
        expand_v=values / keys,
        short_conv=f.get("use_short_conv", True),
        conv_size=f.get("conv_size", 4),
        qk_activation=activation,
        qk_norm=norm,
        beta=f.get("use_beta", True),
        allow_neg_eigval=f.get("allow_neg_eigval", False),
        output_gate=f.get("use_gate", False),
        norm_eps=f.get("norm_eps", 1e-6),
    )


def _channels(f: Fields, name: str, width: int, heads: int) -> int:
    """Their width of all heads, a multiple of the residual stream's up to rounding."""
    expand = f.get(name, 1.0)
    channels = round(expand * width)
    if not math.isclose(channels, expand * width) or channels < 1 or channels % heads:
        raise ConfigError(
            f"{f.family}: {name}: expected {name} * hidden_size to be a multiple of num_heads={heads}, got {expand} * {width}"
        )
    return channels


def _write_delta_net(mixer: DeltaNet.Config, config: LM.Config, wishes: Wishes) -> dict[str, Any]:
    norms = {ours: theirs for theirs, ours in NORMS.items()}
    if mixer.qk_norm not in norms:
        wishes.refuse(f"deltanet.qk_norm={mixer.qk_norm!r}", " or ".join(map(repr, norms)))
    return {
        "num_heads": mixer.heads,
        "expand_k": mixer.heads * mixer.head_dim / config.width,
        "expand_v": mixer.value_width / config.width,
        "use_gate": mixer.output_gate,
        "use_beta": mixer.beta,
        "use_short_conv": mixer.short_conv,
        "conv_size": mixer.conv_size,
        "qk_activation": next(theirs for theirs, ours in ACTIVATIONS.items() if ours == mixer.qk_activation),
        "qk_norm": norms[mixer.qk_norm],
        "allow_neg_eigval": mixer.allow_neg_eigval,
    }


def _gated_deltaproduct(mixer: DeltaProduct.Config) -> tuple[Line, ...]:
    return (*_delta(mixer), *same("b_proj.weight"), *DECAY * mixer.gate, *GATE * mixer.output_gate)


def _read_gated_deltaproduct(f: Fields) -> DeltaProduct.Config:
    return DeltaProduct.Config(
        householders=f.get("num_householder", 1),
        gate=f.get("use_forget_gate", False),
        allow_neg_eigval=f.get("allow_neg_eigval", False),
        heads=f.get("num_heads", 6),
        head_dim=f.get("head_dim", 256),
        expand_v=float(f.get("expand_v", 2.0)),
        short_conv=f.get("use_short_conv", True),
        conv_size=f.get("conv_size", 4),
        output_gate=f.get("use_output_gate", True),
        norm_eps=f.get("norm_eps", 1e-6),
    )


def _write_gated_deltaproduct(mixer: DeltaProduct.Config, config: LM.Config, wishes: Wishes) -> dict[str, Any]:
    if mixer.num_value_heads != mixer.heads:  # their layer has such a field, but their configuration does not pass it on
        wishes.refuse(f"deltaproduct.value_heads={mixer.value_heads}", f"as many as heads={mixer.heads}")
    return {
        "num_householder": mixer.householders,
        "use_forget_gate": mixer.gate,
        "allow_neg_eigval": mixer.allow_neg_eigval,
        "num_heads": mixer.heads,
        "head_dim": mixer.head_dim,
        "expand_v": mixer.expand_v,
        "use_short_conv": mixer.short_conv,
        "conv_size": mixer.conv_size,
        "use_output_gate": mixer.output_gate,
    }


NARROW = {"f_a_proj.weight": "f_proj.0.weight", "f_b_proj.weight": "f_proj.1.weight", "g_a_proj.weight": "g_proj.0.weight"}
"""The matrices of the bottlenecks; the last one has a bias."""


def _kda(mixer: KimiDelta.Config) -> tuple[Line, ...]:
    narrow = tuple(Line(ours, f"attn.{theirs}") for ours, theirs in NARROW.items())
    last = tuple(Line(f"g_b_proj.{kind}", f"attn.g_proj.1.{kind}") for kind in ("weight", "bias"))
    return (*_delta(mixer), *same("b_proj.weight", "A_log", "dt_bias"), *narrow, *last)


def _read_kda(f: Fields) -> KimiDelta.Config:
    f.only("safe_gate", False)
    f.only("lower_bound", None)
    return KimiDelta.Config(
        heads=f.get("num_heads", 16),
        head_dim=f.get("head_dim", 128),
        value_heads=f.get("num_v_heads", None),
        expand_v=float(f.get("expand_v", 1.0)),
        short_conv=f.get("use_short_conv", True),
        conv_size=f.get("conv_size", 4),
        allow_neg_eigval=f.get("allow_neg_eigval", False),
        norm_eps=f.get("norm_eps", 1e-6),
    )


def _write_kda(mixer: KimiDelta.Config, config: LM.Config, wishes: Wishes) -> dict[str, Any]:
    wishes.fixed(mixer, "kimi_delta.", output_gate_bias=True)
    return {
        "num_heads": mixer.heads,
        "num_v_heads": mixer.value_heads,
        "head_dim": mixer.head_dim,
        "expand_v": mixer.expand_v,
        "use_short_conv": mixer.short_conv,
        "conv_size": mixer.conv_size,
        "allow_neg_eigval": mixer.allow_neg_eigval,
    }


GATED_DELTANET = family_of(
    Layer("gated_deltanet", "GatedDeltaNetForCausalLM", "gated_deltanet", _gated_deltanet, _read_gated_deltanet, _write_gated_deltanet)
)
DELTA_NET = family_of(Layer("delta_net", "DeltaNetForCausalLM", "deltanet", _delta_net, _read_delta_net, _write_delta_net))
GATED_DELTAPRODUCT = family_of(
    Layer(
        "gated_deltaproduct",
        "GatedDeltaProductForCausalLM",
        "deltaproduct",
        _gated_deltaproduct,
        _read_gated_deltaproduct,
        _write_gated_deltaproduct,
    )
)
KDA = family_of(Layer("kda", "KDAForCausalLM", "kimi_delta", _kda, _read_kda, _write_kda))
