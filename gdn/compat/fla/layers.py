"""`fla.layers.GatedDeltaNet` of flash-linear-attention 0.6.0: the same arguments, parameter names and cache; its state dict loads here."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.compat.fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.nn import GatedRMSNorm, RMSNorm
from gdn.ops import causal_conv1d, rms_norm

STEP_LENGTH = 64
"""Up to this many tokens without gradients go through `fused_recurrent_gated_delta_rule`, as in FLA."""


class GatedDeltaNet(nn.Module):
    """Gated DeltaNet (arXiv 2412.06464) with the interface of FLA.

    Args:
        hidden_size: channels of the residual stream.
        expand_v: width of a value head over that of a key head.
        head_dim: width of a query/key head.
        num_heads: query/key heads.
        num_v_heads: value heads, a multiple of `num_heads`; default as many.
        mode: "chunk" or "fused_recurrent", without gradients and beyond 64 tokens; with gradients it is always "chunk".
        use_gate: multiply the output by an activation of `g_proj`.
        use_short_conv: convolve q, k and v.
        allow_neg_eigval: beta from 0 to 2.
        conv_size, conv_bias: taps and bias of the convolutions.
        layer_idx: the layer's place in a cache.
        norm_eps: of the output norm.
        output_gate_activation: "swish", "silu" (the same) or "sigmoid".
    """

    def __init__(
        self,
        hidden_size: int = 2048,
        expand_v: float = 2,
        head_dim: int = 256,
        num_heads: int = 6,
        num_v_heads: int | None = None,
        mode: str = "chunk",
        use_gate: bool = True,
        use_short_conv: bool = True,
        allow_neg_eigval: bool = False,
        conv_size: int = 4,
        conv_bias: bool = False,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
        output_gate_activation: str = "swish",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name in kwargs:
            raise ArgumentError(f"{name}: GatedDeltaNet of FLA 0.6.0 knows no such argument")
        if mode not in ("chunk", "fused_recurrent"):
            raise ArgumentError(f'mode: expected "chunk" or "fused_recurrent", got "{mode}"')
        if output_gate_activation not in ("swish", "silu", "sigmoid"):
            raise ArgumentError(f'output_gate_activation: expected "swish", "silu" or "sigmoid", got "{output_gate_activation}"')
        self.hidden_size, self.expand_v, self.head_dim = hidden_size, expand_v, head_dim
        self.num_heads, self.num_v_heads = num_heads, num_heads if num_v_heads is None else num_v_heads
        self.mode, self.layer_idx, self.allow_neg_eigval = mode, layer_idx, allow_neg_eigval
        self.use_gate, self.use_short_conv, self.conv_size, self.conv_bias = use_gate, use_short_conv, conv_size, conv_bias
        self.output_gate_activation = output_gate_activation
        self.head_k_dim, self.head_v_dim = head_dim, int(head_dim * expand_v)
        self.key_dim, self.value_dim = num_heads * head_dim, self.num_v_heads * self.head_v_dim
        if self.num_v_heads % num_heads:
            raise ArgumentError(f"num_v_heads: expected a multiple of num_heads={num_heads}, got {self.num_v_heads}")
        if not math.isclose(head_dim * expand_v, self.head_v_dim, rel_tol=1e-5):
            raise ArgumentError(f"expand_v: expected head_dim * expand_v to be a whole number, got {head_dim * expand_v}")
        self._build(norm_eps)

    def _build(self, norm_eps: float) -> None:
        width, heads = self.hidden_size, self.num_v_heads
        self.q_proj = nn.Linear(width, self.key_dim, bias=False)
        self.k_proj = nn.Linear(width, self.key_dim, bias=False)
        self.v_proj = nn.Linear(width, self.value_dim, bias=False)
        self.a_proj = nn.Linear(width, heads, bias=False)
        self.b_proj = nn.Linear(width, heads, bias=False)
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0, 16).clamp(min=1e-4).log())  # log 0 would freeze the head for ever
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True  # type: ignore[attr-defined]
        if self.use_short_conv:
            self.q_conv1d = _depthwise(self.key_dim, self.conv_size, self.conv_bias)
            self.k_conv1d = _depthwise(self.key_dim, self.conv_size, self.conv_bias)
            self.v_conv1d = _depthwise(self.value_dim, self.conv_size, self.conv_bias)
        if self.use_gate:
            self.g_proj = nn.Linear(width, self.value_dim, bias=False)
        gated = self.use_gate and self.output_gate_activation != "sigmoid"
        self.o_norm = (GatedRMSNorm if gated else RMSNorm)(self.head_v_dim, norm_eps)
        self.o_proj = nn.Linear(self.value_dim, width, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None, Any]:
        """
        Args:
            hidden_states: `[B, T, hidden_size]`.
            attention_mask: `[B, T or more]`, 0 at padding; its last T columns count. Masked tokens are taken out, their output is 0.
            past_key_values: `gdn.compat.fla.Cache` or FLA's own, updated in place.
            use_cache: whether to store states in it.
            output_attentions: refused when True, there are none.
            kwargs: `cu_seqlens` `[N + 1]`, documents packed into a batch of one row; `attention_mask` is then not looked at. FLA's models
                hand on other keywords too; like FLA's layer, this one does not look at them, but refuses a `cp_context`.

        Returns:
            The output `[B, T, hidden_size]`, None, and the cache.
        """
        if output_attentions:
            raise ArgumentError("output_attentions: expected False, a recurrent layer has none")
        if kwargs.get("cp_context") is not None:
            raise ArgumentError("cp_context: context parallelism is not supported by gdn.compat.fla; expected None")
        past = self._past(past_key_values)
        batch, length = hidden_states.shape[:2]
        x, bounds, kept = hidden_states, kwargs.get("cu_seqlens"), None
        if bounds is None and attention_mask is not None:
            x, bounds, kept = _without_padding(hidden_states, attention_mask)
        qkv, conv_state = self._convolve(x, None if past is None else past.get("conv_state"), bounds, bool(use_cache))
        o, memory = self._recall(x, qkv, None if past is None else past.get("recurrent_state"), bounds, bool(use_cache))
        if past_key_values is not None:
            past_key_values.update(layer_idx=self.layer_idx, recurrent_state=memory, conv_state=conv_state, offset=length)
        y = self.o_proj(self._output(o, x).flatten(2))
        if kept is not None:
            y = y.new_zeros(batch * length, y.shape[2]).index_copy(0, kept, y[0]).view(batch, length, -1)
        return y, None, past_key_values

    def _past(self, cache: Any) -> Any:
        if cache is None:
            return None
        if self.layer_idx is None:
            raise ArgumentError("layer_idx: expected the layer's place in past_key_values, got None")
        return cache[self.layer_idx] if len(cache) > self.layer_idx else None

    def _convolve(self, x: Tensor, past: Any, bounds: Tensor | None, keep: bool) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Queries, keys and values side by side, activated; and the last W inputs of each, `[N, D, W]` as FLA keeps them."""
        qkv = torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)
        if not self.use_short_conv:
            return F.silu(qkv), None
        filters = (self.q_conv1d, self.k_conv1d, self.v_conv1d)
        weight = torch.cat([f.weight.squeeze(1) for f in filters])
        bias = torch.cat([f.bias for f in filters if f.bias is not None]) if self.conv_bias else None
        weight = F.pad(weight, (1, 0)) if keep or past is not None else weight  # FLA's state holds an input more than the filter needs
        start = None if past is None else torch.cat(list(past), dim=1).transpose(1, 2)
        packing = None if bounds is None else Packing.from_cu_seqlens(bounds, device=x.device)
        y, state = causal_conv1d(qkv, weight, bias=bias, activation="silu", initial_state=start, packing=packing)
        if not keep:
            return y, None
        return y, state.transpose(1, 2).split((self.key_dim, self.key_dim, self.value_dim), dim=1)

    def _recall(self, x: Tensor, qkv: Tensor, past: Tensor | None, bounds: Tensor | None, keep: bool) -> tuple[Tensor, Tensor | None]:
        q, k, v = qkv.split((self.key_dim, self.key_dim, self.value_dim), dim=-1)
        short = not torch.is_grad_enabled() and (self.mode == "fused_recurrent" or (x.shape[1] <= STEP_LENGTH and not self.training))
        rule = fused_recurrent_gated_delta_rule if short else chunk_gated_delta_rule
        return rule(
            q.unflatten(-1, (self.num_heads, -1)),
            k.unflatten(-1, (self.num_heads, -1)),
            v.unflatten(-1, (self.num_v_heads, -1)),
            g=self.a_proj(x),
            beta=self.b_proj(x),
            initial_state=past,
            output_final_state=keep,
            use_qk_l2norm_in_kernel=True,
            use_gate_in_kernel=True,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            use_beta_sigmoid_in_kernel=True,
            allow_neg_eigval=self.allow_neg_eigval,
            state_v_first=True,
            cu_seqlens=bounds,
        )

    def _output(self, o: Tensor, x: Tensor) -> Tensor:
        if not self.use_gate:
            return self.o_norm(o)
        gate = self.g_proj(x).unflatten(-1, o.shape[2:])
        if self.output_gate_activation == "sigmoid":
            return rms_norm(o, self.o_norm.weight, eps=self.o_norm.eps) * gate.sigmoid()
        return self.o_norm(o, gate)


def _depthwise(channels: int, taps: int, bias: bool) -> nn.Conv1d:
    """Holds the filters under the names of FLA's `ShortConvolution`."""
    return nn.Conv1d(channels, channels, taps, groups=channels, padding=taps - 1, bias=bias)


def _without_padding(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The unmasked tokens in one row, the bounds of the rows they come from, and their places among all tokens."""
    if mask.ndim != 2:
        raise ArgumentError(f"attention_mask: expected [B, T], 0 at padding, got {list(mask.shape)}")
    mask = mask[:, -x.shape[1] :].bool()
    if mask.shape != x.shape[:2]:
        raise ArgumentError(f"attention_mask: expected [B, T] with B={x.shape[0]} and T of at least {x.shape[1]}, got {list(mask.shape)}")
    kept = mask.flatten().nonzero().squeeze(1)
    return x.flatten(0, 1)[kept].unsqueeze(0), F.pad(mask.sum(1).cumsum(0), (1, 0)), kept
