"""Linear attention with decay over a sequence: contracts and tables. The derivation is in README.md beside this file.

Three operators differ in what a token forgets: each head by one number, each channel of the keys by its own, or each channel of the values.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.replay import replayed

TRITON = triton_gpu(K=range(1, 257))
"""What the Triton row with one decay per head needs."""
TRITON_KEYS = dataclasses.replace(TRITON, dtypes=(torch.bfloat16, torch.float32))
"""What it needs with decay on the keys. Not float16: gradients times decays are held in the dtype of the inputs, under a strong decay they
are below its least number, and there is no one factor to take out of them as with one decay per head."""
TRITON_VALUES = dataclasses.replace(TRITON_KEYS, dims={"V": range(1, 257)})
"""With decay on the values, keys and values change places."""

LINEAR = Op(
    "linear_attention",
    (
        Impl("portable", "gdn.ops.linear_recurrence.portable:linear_attention", TRITON),
        Impl("chunked", "gdn.ops.linear_recurrence.chunked:linear_attention"),
        Impl("reference", "gdn.ops.linear_recurrence.reference:linear_attention"),
    ),
)

GATED = Op(
    "gated_linear_attention",
    (
        Impl("portable", "gdn.ops.linear_recurrence.portable_gated:gated_linear_attention", TRITON_KEYS),
        Impl("chunked", "gdn.ops.linear_recurrence.channels:gated_linear_attention"),
        Impl("reference", "gdn.ops.linear_recurrence.reference:gated_linear_attention"),
    ),
)

VALUE_GATED = Op(
    "value_gated_linear_attention",
    (
        Impl("portable", "gdn.ops.linear_recurrence.portable_value_gated:value_gated_linear_attention", TRITON_VALUES),
        Impl("chunked", "gdn.ops.linear_recurrence.channels:value_gated_linear_attention"),
        Impl("reference", "gdn.ops.linear_recurrence.reference:value_gated_linear_attention"),
    ),
)
"""Rows of all three take `(q, k, v, g, scale, initial_state, packing)`."""


@replayed
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A memory `S` that forgets by one number per head and adds every token, read at every token.

    For each sequence and value head, from `S = initial_state` (or 0), for each token t in order:

        S   = exp(g_t) S + k_t v_t^T                    forget, then write
        o_t = scale S^T q_t                             read, after the write

    The recurrence of Mamba2 (arXiv 2405.21060, with q = C, k = B, v = dt x, g = dt A) and of RetNet (arXiv 2307.08621, with g constant);
    `gated_delta_rule` without the correction.

    Args:
        q, k: queries and keys `[B, T, H, K]`.
        v: values `[B, T, HV, V]`, the dtype of q. HV is a multiple of H: value head i reads query/key head `i // (HV // H)`.
        g: log decay `[B, T, HV]`, at most 0; any floating dtype. Minus infinity clears the memory. Values below -64 act as -64.
        scale: factor on the read. Default `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, float32 (float64 with float64 inputs).
        packing: boundaries of N packed documents over the `B * T` tokens; state starts anew at each. Without it N = B.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]` in float32 (float64 with float64 inputs).
        Both are differentiable with respect to q, k, v, g and initial_state.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or g is positive (values are looked at on the CPU only).

    Example:
        One head, K = V = 1: q = k = 1, v = 3, half forgotten at each of two tokens. The memory goes 0 -> 3 -> 4.5.

        >>> import math, torch
        >>> one = torch.ones(1, 2, 1, 1)
        >>> o, state = linear_attention(one, one, 3 * one, torch.full((1, 2, 1), -math.log(2)))
        >>> o.flatten().tolist(), state.item()
        ([3.0, 4.5], 4.5)
    """
    return _call(LINEAR, "B T HV", q, k, v, g, scale, initial_state, packing)


@replayed
def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    r"""`linear_attention` whose rows, one for each channel of the keys, forget at their own rates.

    For each sequence and value head, from `S = initial_state` (or 0), for each token t in order:

        S   = diag(exp(g_t)) S + k_t v_t^T
        o_t = scale S^T q_t

    Gated Linear Attention (arXiv 2312.06635); HGRN2 (arXiv 2404.07904) with k = 1 - exp(g); the second pass of Gated Slot Attention
    (arXiv 2409.07146).

    Args:
        q, k: queries and keys `[B, T, H, K]`.
        v: values `[B, T, HV, V]`, the dtype of q. HV is a multiple of H: value head i reads query/key head `i // (HV // H)`.
        g: log decay of each key channel `[B, T, H, K]`, at most 0; any floating dtype. Minus infinity clears a row of the memory. Values
            below -64 act as -64.
        scale: factor on the read. Default `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, float32 (float64 with float64 inputs).
        packing: boundaries of N packed documents over the `B * T` tokens; state starts anew at each. Without it N = B.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]` in float32 (float64 with float64 inputs).
        Both are differentiable with respect to q, k, v, g and initial_state.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or g is positive (values are looked at on the CPU only).

    Example:
        Two key channels: the first keeps everything, the second nothing of what was there before.

        >>> import math, torch
        >>> one = torch.ones(1, 2, 1, 2)
        >>> g = torch.tensor([0.0, -math.inf]).expand(1, 2, 1, 2)
        >>> o, state = gated_linear_attention(one, one, torch.ones(1, 2, 1, 1), g, scale=1.0)
        >>> o.flatten().tolist(), state.flatten().tolist()
        ([2.0, 3.0], [2.0, 1.0])
    """
    return _call(GATED, "B T H K", q, k, v, g, scale, initial_state, packing)


@replayed
def value_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    r"""`linear_attention` whose columns, one for each channel of the values, forget at their own rates.

    For each sequence and value head, from `S = initial_state` (or 0), for each token t in order:

        S   = S diag(exp(g_t)) + k_t v_t^T
        o_t = scale S^T q_t

    The first pass of Gated Slot Attention (arXiv 2409.07146), where the channels of the values are slots.

    Args:
        q, k: queries and keys `[B, T, H, K]`.
        v: values `[B, T, HV, V]`, the dtype of q. HV is a multiple of H: value head i reads query/key head `i // (HV // H)`.
        g: log decay of each value channel `[B, T, HV, V]`, at most 0; any floating dtype. Minus infinity clears a column of the memory.
            Values below -64 act as -64.
        scale: factor on the read. Default `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, float32 (float64 with float64 inputs).
        packing: boundaries of N packed documents over the `B * T` tokens; state starts anew at each. Without it N = B.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]` in float32 (float64 with float64 inputs).
        Both are differentiable with respect to q, k, v, g and initial_state.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or g is positive (values are looked at on the CPU only).

    Example:
        Two value channels: the first keeps everything, the second nothing of what was there before.

        >>> import math, torch
        >>> one = torch.ones(1, 2, 1, 1)
        >>> g = torch.tensor([0.0, -math.inf]).expand(1, 2, 1, 2)
        >>> o, state = value_gated_linear_attention(one, one, torch.ones(1, 2, 1, 2), g)
        >>> o[0, :, 0].tolist(), state.flatten().tolist()
        ([[1.0, 1.0], [2.0, 1.0]], [2.0, 1.0])
    """
    return _call(VALUE_GATED, "B T HV V", q, k, v, g, scale, initial_state, packing)


def _call(
    op: Op,
    gates: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """Check the arguments and ask the table. `gates` are the dimensions of g."""
    sizes = checks.shapes(("q", q, "B T H K"), ("k", k, "B T H K"), ("v", v, "B T HV V"), ("g", g, gates))
    checks.value_heads(sizes)
    checks.same_dtype(("q", q), ("k", k), ("v", v))
    checks.floating(("g", g))
    checks.same_device(("q", q), ("k", k), ("v", v), ("g", g), ("initial_state", initial_state))
    checks.not_positive("g", g, "a log decay")
    checks.boundaries(packing, sizes["B"], sizes["T"], q.device)
    if initial_state is not None:
        documents = sizes["B"] if packing is None else packing.num_documents
        checks.shapes(("initial_state", initial_state, "N HV K V"), N=documents, **sizes)
        expected = checks.accumulate_dtype(q.dtype)
        if initial_state.dtype != expected:
            raise ArgumentError(f"initial_state: expected {expected}, got {initial_state.dtype}")
    scale = checks.scale(scale, sizes["K"])
    return op.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, g, scale, initial_state, packing)
