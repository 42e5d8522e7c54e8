"""`fla.ops.gated_delta_rule` of flash-linear-attention 0.6.0, argument for argument.

Mind the three orders of g and beta: (g, beta), (g, gk, gv, beta), and (beta, g) in the naive recurrence.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from gdn import ops
from gdn.core.checks import accumulate_dtype
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.ops.delta_rule import chunked, reference

STEP_LENGTH = 64
"""Up to this many tokens without gradients `fused_recurrent_gated_delta_rule` goes token by token."""


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`gdn.ops.gated_delta_rule` with FLA's arguments.

    Args:
        q, k: `[B, T, H, K]`.
        v: `[B, T, HV, V]`, HV a multiple of H.
        g: log decay `[B, T, HV]`; with `use_gate_in_kernel` the raw input of the gate.
        beta: writing strength `[B, T, HV]`; with `use_beta_sigmoid_in_kernel` its logit.
        scale: factor on the read, `K ** -0.5` by default.
        initial_state: `[N, HV, K, V]`, or `[N, HV, V, K]` with `state_v_first`; any floating dtype.
        output_final_state: whether to return the final state, in the layout of the initial one, float32.
        use_qk_l2norm_in_kernel: normalise q and k.
        use_beta_sigmoid_in_kernel: beta is a logit.
        allow_neg_eigval: with `use_beta_sigmoid_in_kernel`: beta from 0 to 2.
        state_v_first: states hold the value dimension before that of keys.
        cu_seqlens: `[N + 1]`, documents packed into a batch of one row.
        cu_seqlens_cpu: the same on the host, which spares a transfer.
        chunk_indices: taken and not needed, boundaries come from `cu_seqlens`.
        cp_context: refused unless None.
        kwargs: `use_gate_in_kernel`, `A_log` `[HV]`, `dt_bias` `[HV]` (optional): decay from a raw gate; `chunk_size`, 16, 32 or 64
            (results do not depend on it); `transpose_state_layout`, the old name of `state_v_first`. `head_first` raises as in FLA.
            Others are refused.

    Returns:
        o `[B, T, HV, V]`, and the final state or None. Differentiable, the initial state included.
    """
    state_v_first = _old_layout_name(kwargs, state_v_first)
    if "head_first" in kwargs:
        raise DeprecationWarning("head_first: removed in FLA 0.6; expected inputs [B, T, H, ...]")
    _chunk_size(kwargs.pop("chunk_size", 64))
    gate, A_log, dt_bias = kwargs.pop("use_gate_in_kernel", False), kwargs.pop("A_log", None), kwargs.pop("dt_bias", None)
    _refuse_others(kwargs)
    _refuse("cp_context", cp_context, "context parallelism")
    q, k = _keys(q, k, use_qk_l2norm_in_kernel)
    o, state = ops.gated_delta_rule(
        q,
        k,
        v,
        _decay(g, gate, A_log, dt_bias),
        _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval),
        scale=scale,
        initial_state=_state_in(initial_state, state_v_first, q),
        packing=_packing(q, cu_seqlens, cu_seqlens_cpu),
    )
    return o, _state_out(state, state_v_first) if output_final_state else None


chunk_gdn = chunk_gated_delta_rule


def fused_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    gk: Tensor | None = None,
    gv: Tensor | None = None,
    beta: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The same function as `chunk_gated_delta_rule`, for decoding and short sequences; with gradients, which FLA's does not have.

    Args:
        g: None forgets nothing.
        gk, gv: refused unless None: a decay for each channel is another recurrence.
        beta: `[B, T, HV]`, None is one; a strength for each value channel is refused.
        kwargs: `transpose_state_layout`, the old name of `state_v_first`. Others are refused.

    The other arguments and the results are those of `chunk_gated_delta_rule`. The initial state is not written to.
    """
    state_v_first = _old_layout_name(kwargs, state_v_first)
    _refuse_others(kwargs)
    _refuse("gk", gk, "a decay for each key channel")
    _refuse("gv", gv, "a decay for each value channel")
    if use_gate_in_kernel and g is None:
        raise ArgumentError("g: expected the raw input of the gate with use_gate_in_kernel=True, got None")
    g = torch.zeros(v.shape[:3], dtype=torch.float32, device=v.device) if g is None else _decay(g, use_gate_in_kernel, A_log, dt_bias)
    if beta is not None and beta.ndim == 4:
        raise ArgumentError(f"beta: expected [B, T, HV], got {list(beta.shape)}; one for each value channel is not supported")
    if beta is None:
        beta = torch.ones(v.shape[:3], dtype=torch.float32, device=v.device)
    beta = _strength(beta, use_beta_sigmoid_in_kernel, allow_neg_eigval)
    q, k = _keys(q, k, use_qk_l2norm_in_kernel)
    start, packing = _state_in(initial_state, state_v_first, q), _packing(q, cu_seqlens, None)
    if packing is None and q.shape[1] <= STEP_LENGTH and not torch.is_grad_enabled():
        shape = (q.shape[0], v.shape[2], k.shape[3], v.shape[3])
        state = q.new_zeros(shape, dtype=accumulate_dtype(q.dtype)) if start is None else start.clone(memory_format=torch.contiguous_format)
        o = ops.gated_delta_step(q, k, v, g, beta, state, scale=scale)
    else:
        o, state = ops.gated_delta_rule(q, k, v, g, beta, scale=scale, initial_state=start, packing=packing)
    return o, _state_out(state, state_v_first) if output_final_state else None


fused_recurrent_gdn = fused_recurrent_gated_delta_rule


def naive_recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Our reference, token by token in float32. beta comes before g."""
    return _naive(reference.gated_delta_rule, q, k, v, g, beta, scale, initial_state, output_final_state)


def naive_chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    chunk_size: int = 64,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Our plain torch implementation by chunks, in float32. Any `chunk_size` of at least 1 is taken; results do not depend on it."""
    if chunk_size < 1:
        raise ArgumentError(f"chunk_size: expected at least 1, got {chunk_size}")
    return _naive(chunked.gated_delta_rule, q, k, v, g, beta, scale, initial_state, output_final_state)


def _naive(
    rule: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    start = None if initial_state is None else initial_state.float()
    o, state = rule(q, k, v, g, beta, q.shape[-1] ** -0.5 if scale is None else scale, start, None)
    return o, state if output_final_state else None


def _old_layout_name(kwargs: dict[str, Any], state_v_first: bool) -> bool:
    if "transpose_state_layout" not in kwargs:
        return state_v_first
    if state_v_first:
        raise ArgumentError("transpose_state_layout: cannot be given together with state_v_first, whose old name it is")
    warnings.warn("transpose_state_layout is now called state_v_first", DeprecationWarning, stacklevel=3)
    return bool(kwargs.pop("transpose_state_layout"))


def _chunk_size(size: int) -> None:
    if size not in (16, 32, 64):
        raise ArgumentError(f"chunk_size: expected 16, 32 or 64, got {size}")


def _refuse(name: str, value: Any, what: str) -> None:
    if value is not None:
        raise ArgumentError(f"{name}: {what} is not supported by gdn.compat.fla; expected None, got {type(value).__name__}")


def _refuse_others(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        raise ArgumentError(f"{name}: gdn.compat.fla knows no such argument of FLA 0.6.0")


def _keys(q: Tensor, k: Tensor, normalise: bool) -> tuple[Tensor, Tensor]:
    return (ops.l2norm(q), ops.l2norm(k)) if normalise else (q, k)


def _decay(g: Tensor, raw: bool, A_log: Tensor | None, dt_bias: Tensor | None) -> Tensor:
    if not raw:
        return g
    if A_log is None:
        raise ArgumentError("A_log: expected [HV] with use_gate_in_kernel=True, got None")
    wide = accumulate_dtype(g.dtype)
    return ops.decay_gate(g, A_log.to(wide), torch.zeros_like(A_log, dtype=wide) if dt_bias is None else dt_bias.to(wide))


def _strength(beta: Tensor, logit: bool, negative: bool) -> Tensor:
    if negative and not logit:
        raise ArgumentError("allow_neg_eigval: expected only together with use_beta_sigmoid_in_kernel=True, as in FLA")
    return ops.write_gate(beta, top=2.0 if negative else 1.0) if logit else beta


def _state_in(state: Tensor | None, v_first: bool, q: Tensor) -> Tensor | None:
    if state is None:
        return None
    return (state.mT if v_first else state).to(accumulate_dtype(q.dtype))


def _state_out(state: Tensor, v_first: bool) -> Tensor:
    return state.mT.contiguous() if v_first else state


def _packing(q: Tensor, cu_seqlens: Tensor | None, on_host: Tensor | None) -> Packing | None:
    if cu_seqlens is None:
        return None
    if q.shape[0] != 1:
        raise ArgumentError(f"cu_seqlens: expected a batch of one row, got {q.shape[0]}; flatten the rows first")
    return Packing.from_cu_seqlens(cu_seqlens if on_host is None else on_host, device=q.device)
