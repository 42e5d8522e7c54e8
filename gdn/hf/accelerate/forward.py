"""The forwards that take the place of transformers' own: the mixer, its norms, and the stack that finds packed documents.

They read the modules' own parameters and keep transformers' cache protocol, so state dictionaries, adapters, quantised projections,
gradient checkpointing and every cache class go on working.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing
from gdn.hf.accelerate.families import Family
from gdn.hf.accelerate.packed import find_packing
from gdn.hf.names import CACHE, one_of
from gdn.ops import (
    GateParameters,
    causal_conv1d,
    causal_conv1d_step,
    convolved_qkv,
    decay_gate,
    delta_core,
    gated_delta_rule,
    gated_delta_step,
    gated_rms_norm,
    l2norm,
    rms_norm,
    write_gate,
)

STEP_LENGTH = 8
"""Up to this many tokens with a state and no gradients are served by `gated_delta_step`, which updates the cache in place."""

Forward = Callable[..., Any]


def norm_forward(family: Family) -> Forward:
    """For the norms of a block, of queries and keys, and the last one."""
    if family.centred:
        return lambda self, x: rms_norm(x, self.weight.to(accumulate_dtype(self.weight.dtype)) + 1, eps=self.eps)
    return lambda self, hidden_states: rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)


def gated_norm_forward(family: Family) -> Forward:
    """For the mixer's output norm."""
    return lambda self, hidden_states, gate: gated_rms_norm(hidden_states, gate, self.weight, eps=self.variance_epsilon)


def model_forward(family: Family) -> Forward:
    """For the stack of layers: find the packed documents once, tell every layer."""

    def forward(
        self: Any,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Any:
        cache = one_of(past_key_values, cache)
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is not None:
            packed = find_packing(tokens, attention_mask, position_ids, cache, use_cache, kwargs)
            if packed is not None:
                kwargs["packing"], position_ids = packed
                attention_mask, use_cache = None, False
        return type(self).forward(
            self,
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **{CACHE: cache},
            **kwargs,
        )

    return forward


def mixer_forward(family: Family) -> Forward:
    """For the gated delta rule layer."""
    from transformers.integrations.accelerate import force_accelerate_hooks

    @force_accelerate_hooks("conv1d")
    def forward(
        self: Any,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        *,
        packing: Packing | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        cache = one_of(cache_params, cache)
        qkv, gate, a, b = family.project(self, hidden_states)
        if attention_mask is not None:
            # Padding writes nothing and forgets nothing: zero inputs to the convolution, beta = 0, g = 0.
            hidden = (attention_mask == 0).unsqueeze(-1)
            qkv, a, b = qkv.masked_fill(hidden, 0), a.masked_fill(hidden, -math.inf), b.masked_fill(hidden, -math.inf)
        past = None if cache is None else cache.get_conv_state(self.layer_idx, state_idx=0)
        if past is None and self.conv1d.bias is None:
            o = _from_the_start(self, qkv, a, b, cache, packing)
        else:
            q, k, v = _convolve(self, qkv, past, cache, packing).split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
            q, k = q.unflatten(-1, (self.num_k_heads, -1)), k.unflatten(-1, (self.num_k_heads, -1))
            o = _recall(self, q, k, v.unflatten(-1, (self.num_v_heads, -1)), a, b, cache, packing)
        o = getattr(self, family.output_norm)(o, gate.unflatten(-1, o.shape[2:]))
        return getattr(self, family.output)(o.flatten(2))

    return forward


def _from_the_start(layer: Any, qkv: Tensor, a: Tensor, b: Tensor, cache: Any, packing: Packing | None) -> Tensor:
    """With nothing read before: queries and keys are normalised in the pass of the convolution. A cache keeps what comes of it."""
    heads = layer.num_k_heads
    q, k, v = convolved_qkv(qkv, layer.conv1d.weight.squeeze(1), heads=heads, head_dim=layer.key_dim // heads, packing=packing)
    A_log, dt_bias, top = _gates(layer, q)
    g, beta = decay_gate(a, A_log, dt_bias), write_gate(b, top=top)
    o, end = gated_delta_rule(q, k, v.unflatten(-1, (layer.num_v_heads, -1)), g, beta, packing=packing)
    if cache is not None:
        _keep_inputs(layer, qkv, cache)
        cache.update_recurrent_state(end, layer.layer_idx)
    return o


def _convolve(layer: Any, qkv: Tensor, past: Tensor | None, cache: Any, packing: Packing | None) -> Tensor:
    """The short convolution from the cache's last inputs `[B, D, W]`, which are kept up to date."""
    weight, bias = layer.conv1d.weight.squeeze(1), layer.conv1d.bias
    if cache is None:
        return causal_conv1d(qkv, weight, bias=bias, activation="silu", packing=packing)[0]
    taps, recording = weight.shape[1], cache.is_recording_past(layer.layer_idx)
    if past is not None and qkv.shape[1] == 1 and not recording and not torch.is_grad_enabled():
        past[..., 0] = past[..., 1]  # the oldest of W inputs, one more than the filter reaches back to
        return causal_conv1d_step(qkv, weight, past.transpose(1, 2)[:, 1 - taps :], bias=bias, activation="silu")
    start = None if past is None else _last_inputs(past, taps - 1)
    y = causal_conv1d(qkv, weight, bias=bias, activation="silu", initial_state=start, packing=packing)[0]
    _keep_inputs(layer, qkv, cache)
    return y


def _keep_inputs(layer: Any, qkv: Tensor, cache: Any) -> None:
    """The last inputs of the convolution, or all where the cache records them."""
    kept = qkv if cache.is_recording_past(layer.layer_idx) else qkv[:, -layer.conv1d.weight.shape[-1] :]
    cache.update_conv_state(kept.transpose(1, 2), layer.layer_idx, conv_kernel_size=layer.conv_kernel_size)


def _last_inputs(past: Tensor, count: int) -> Tensor:
    """The last inputs `[B, count, D]` in `past [B, D, any]`, zeros where it begins later: a cache that records its past starts short."""
    missing = max(0, count - past.shape[-1])
    last = F.pad(past, (missing, 0)) if missing else past[..., past.shape[-1] - count :]
    last = last.transpose(1, 2)
    return last.clone() if torch.is_grad_enabled() else last  # the backward pass needs it as it is; the cache is written to


def _gates(layer: Any, q: Tensor) -> tuple[Tensor, Tensor, float]:
    """A_log and dt_bias, wide enough for sums, and the largest beta."""
    wide = accumulate_dtype(q.dtype)
    return layer.A_log.to(wide), layer.dt_bias.to(wide), 2.0 if getattr(layer, "allow_neg_eigval", False) else 1.0


def _recall(layer: Any, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, cache: Any, packing: Packing | None) -> Tensor:
    """The gated delta rule from the cache's memory `[B, HV, K, V]`, which is kept up to date."""
    A_log, dt_bias, top = _gates(layer, q)
    start = None if cache is None else cache.get_recurrent_state(layer.layer_idx, state_idx=0)
    start = None if start is None else start.to(A_log.dtype)
    if start is not None and q.shape[1] <= STEP_LENGTH and not torch.is_grad_enabled():
        o = gated_delta_step(l2norm(q), l2norm(k), v, decay_gate(a, A_log, dt_bias), write_gate(b, top=top), start)
        end = start
    else:
        if start is not None and torch.is_grad_enabled():
            start = start.clone()  # the backward pass needs it as it is; the cache is written to below
        o, end = delta_core(q, k, v, a, b, GateParameters(A_log, dt_bias, top), initial_state=start, packing=packing)
    if cache is not None:
        cache.update_recurrent_state(end, layer.layer_idx)
    return o
