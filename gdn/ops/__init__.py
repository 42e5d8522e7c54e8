"""Operators: pure functions of tensors, each with a readable reference and faster rows in a table. Names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "gated_delta_rule": "delta_rule",
    "gated_delta_step": "delta_step",
    "gated_delta_product": "delta_product",
    "gated_delta_product_step": "delta_product",
    "channel_delta_rule": "delta_channel",
    "channel_delta_step": "delta_channel",
    "delta_core": "delta_fused",
    "GateParameters": "delta_fused",
    "causal_conv1d": "short_conv",
    "causal_conv1d_step": "short_conv",
    "convolved_qkv": "qkv",
    "l2norm": "norm",
    "rms_norm": "norm",
    "add_rms_norm": "norm",
    "gated_rms_norm": "norm",
    "swiglu_linear": "projection",
    "gated_rms_norm_linear": "projection",
    "parallel_linear": "projection",
    "rotary_embedding": "rotary",
    "scale_heads": "state_space",
    "skip_gated_rms_norm": "state_space",
    "decay_gate": "gates",
    "write_gate": "gates",
    "linear_cross_entropy": "loss",
    "linear_attention": "linear_recurrence",
    "gated_linear_attention": "linear_recurrence",
    "value_gated_linear_attention": "linear_recurrence",
    "linear_attention_step": "linear_step",
    "gated_linear_attention_step": "linear_step",
    "value_gated_linear_attention_step": "linear_step",
    "causal_attention": "attention",
    "windowed_sigmoid_attention": "attention",
}

__all__ = [*sorted(_WHERE), "ops", "use"]


def __getattr__(name: str) -> Any:
    if name in ("ops", "use"):
        value = getattr(importlib.import_module("gdn.core.dispatch"), name)
    elif name in _WHERE:
        value = getattr(importlib.import_module(f"gdn.ops.{_WHERE[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
