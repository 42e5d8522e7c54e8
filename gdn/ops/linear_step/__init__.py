"""One or a few tokens of linear attention for many sequences, memories updated in place: contracts and tables."""

from __future__ import annotations

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.replay import replayed

LINEAR = Op(
    "linear_attention_step",
    (
        Impl("portable", "gdn.ops.delta_step.portable:linear_attention_step", triton_gpu(K=range(1, 513))),
        Impl("torch", "gdn.ops.linear_step.plain:linear_attention_step"),
        Impl("reference", "gdn.ops.linear_step.reference:linear_attention_step"),
    ),
)

GATED = Op(
    "gated_linear_attention_step",
    (
        Impl("portable", "gdn.ops.delta_step.portable:gated_linear_attention_step", triton_gpu(K=range(1, 513))),
        Impl("torch", "gdn.ops.linear_step.plain:gated_linear_attention_step"),
        Impl("reference", "gdn.ops.linear_step.reference:gated_linear_attention_step"),
    ),
)

VALUE_GATED = Op(
    "value_gated_linear_attention_step",
    (
        Impl("portable", "gdn.ops.delta_step.portable:value_gated_linear_attention_step", triton_gpu(K=range(1, 513))),
        Impl("torch", "gdn.ops.linear_step.plain:value_gated_linear_attention_step"),
        Impl("reference", "gdn.ops.linear_step.reference:value_gated_linear_attention_step"),
    ),
)
"""Rows of all three take `(q, k, v, g, state, scale, slots)`, write into `state` and return `o`."""


@replayed
def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, *, scale: float | None = None, slots: Tensor | None = None
) -> Tensor:
    r"""`linear_attention` for a few more tokens of each of many sequences, their memories updated in place: decoding.

    For sequence b and each value head, with `S = state[slots[b]]`, for each token t in order:

        S   = exp(g_t) S + k_t v_t^T
        o_t = scale S^T q_t

    and S is stored back into the same row. A negative slot skips the sequence: its o is zero and no memory is touched. No gradients.

    Args:
        q, k: `[B, T, H, K]`, T of 1 or some; any T works.
        v: `[B, T, HV, V]`, the dtype of q. HV is a multiple of H: value head i reads query/key head `i // (HV // H)`.
        g: log decay `[B, T, HV]`, at most 0; any floating dtype.
        state: memories `[N, HV, K, V]`, updated in place. float32, or bfloat16 or float16 storage: the arithmetic is float32 all the same,
            rounded once a call. float64 with float64 inputs.
        scale: factor on the read. Default `K ** -0.5`.
        slots: integers `[B]` below N, no row twice. Default: row b for sequence b, then N = B. On a GPU, where values are not looked at, a
            sequence with a slot that is not below N touches no memory, and its o is no number.

    Returns:
        o `[B, T, HV, V]` in the dtype of v.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, g is positive or slots are wrong (values are looked at on the CPU only), or
            gradients are enabled and an argument requires one.

    Example:
        The second token of the example of `linear_attention`: the memory goes from 3 to 4.5.

        >>> import math, torch
        >>> one, state = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
        >>> o = linear_attention_step(one, one, 3 * one, torch.full((1, 1, 1), -math.log(2)), state)
        >>> o.item(), state.item()
        (4.5, 4.5)
    """
    return _call(LINEAR, "B T HV", q, k, v, g, state, scale, slots)


@replayed
def gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, *, scale: float | None = None, slots: Tensor | None = None
) -> Tensor:
    r"""`gated_linear_attention` for a few more tokens of each of many sequences, their memories updated in place: decoding.

    As `linear_attention_step` with

        S = diag(exp(g_t)) S + k_t v_t^T

    Args:
        q, k, v, state, scale, slots: as in `linear_attention_step`.
        g: log decay of each key channel `[B, T, H, K]`, at most 0; any floating dtype.

    Returns:
        o `[B, T, HV, V]` in the dtype of v.

    Raises:
        ArgumentError: as in `linear_attention_step`.

    Example:
        >>> import math, torch
        >>> one, state = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
        >>> gated_linear_attention_step(one, one, 3 * one, torch.full((1, 1, 1, 1), -math.log(2)), state).item(), state.item()
        (4.5, 4.5)
    """
    return _call(GATED, "B T H K", q, k, v, g, state, scale, slots)


@replayed
def value_gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, *, scale: float | None = None, slots: Tensor | None = None
) -> Tensor:
    r"""`value_gated_linear_attention` for a few more tokens of each of many sequences, their memories updated in place: decoding.

    As `linear_attention_step` with

        S = S diag(exp(g_t)) + k_t v_t^T

    Args:
        q, k, v, state, scale, slots: as in `linear_attention_step`.
        g: log decay of each value channel `[B, T, HV, V]`, at most 0; any floating dtype.

    Returns:
        o `[B, T, HV, V]` in the dtype of v.

    Raises:
        ArgumentError: as in `linear_attention_step`.

    Example:
        >>> import math, torch
        >>> one, state = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 3.0)
        >>> value_gated_linear_attention_step(one, one, 3 * one, torch.full((1, 1, 1, 1), -math.log(2)), state).item(), state.item()
        (4.5, 4.5)
    """
    return _call(VALUE_GATED, "B T HV V", q, k, v, g, state, scale, slots)


def _call(
    op: Op, gates: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float | None, slots: Tensor | None
) -> Tensor:
    """Check the arguments and ask the table. `gates` are the dimensions of g."""
    sizes = checks.shapes(("q", q, "B T H K"), ("k", k, "B T H K"), ("v", v, "B T HV V"), ("g", g, gates), ("state", state, "N HV K V"))
    checks.value_heads(sizes)
    checks.same_dtype(("q", q), ("k", k), ("v", v))
    checks.floating(("g", g))
    checks.memory(state, q.dtype)
    checks.same_device(("q", q), ("k", k), ("v", v), ("g", g), ("state", state), ("slots", slots))
    checks.not_positive("g", g, "a log decay")
    checks.slots(slots, sizes["B"], sizes["N"])
    checks.no_gradient(("q", q), ("k", k), ("v", v), ("g", g), ("state", state))
    scale = checks.scale(scale, sizes["K"])
    return op.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, g, state, scale, slots)
