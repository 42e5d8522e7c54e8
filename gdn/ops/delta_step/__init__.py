"""One or a few tokens of the gated delta rule for many sequences, memories updated in place: contract and table."""

from __future__ import annotations

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.replay import replayed

OP = Op(
    "gated_delta_step",
    (
        Impl("portable", "gdn.ops.delta_step.portable:gated_delta_step", triton_gpu(K=range(1, 513))),
        Impl("torch", "gdn.ops.delta_step.plain:gated_delta_step"),
        Impl("reference", "gdn.ops.delta_step.reference:gated_delta_step"),
    ),
)
"""Rows take `(q, k, v, g, beta, state, scale, slots)`, write into `state` and return `o`."""


@replayed
def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    r"""`gated_delta_rule` for a few more tokens of each of many sequences, their memories updated in place: decoding.

    For sequence b and each value head, with `S = state[slots[b]]`, for each token t in order:

        S   = exp(g_t) S
        S   = S + beta_t k_t (v_t - k_t^T S)
        o_t = scale S^T q_t

    and S is stored back into the same row. A negative slot skips the sequence: its o is zero and no memory is touched. No gradients.

    Args:
        q, k: `[B, T, H, K]`, T of 1 or some (1 to 8 in speculative decoding; any T works).
        v: `[B, T, HV, V]`, the dtype of q. HV is a multiple of H: value head i reads query/key head `i // (HV // H)`.
        g: log decay `[B, T, HV]`, at most 0; any floating dtype.
        beta: writing strength `[B, T, HV]`, from 0 to 2; any floating dtype.
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
        The second token of the example of `gated_delta_rule`: the memory goes from 1.5 to 2.25.

        >>> import torch
        >>> one, state = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1.5)
        >>> o = gated_delta_step(one, one, 3 * one, torch.zeros(1, 1, 1), torch.full((1, 1, 1), 0.5), state)
        >>> o.item(), state.item()
        (2.25, 2.25)
    """
    sizes = _check(q, k, v, g, beta, state, slots)
    scale = checks.scale(scale, sizes["K"])
    return OP.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, g, beta, state, scale, slots)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: Tensor | None) -> dict[str, int]:
    sizes = checks.shapes(
        ("q", q, "B T H K"),
        ("k", k, "B T H K"),
        ("v", v, "B T HV V"),
        ("g", g, "B T HV"),
        ("beta", beta, "B T HV"),
        ("state", state, "N HV K V"),
    )
    checks.value_heads(sizes)
    checks.same_dtype(("q", q), ("k", k), ("v", v))
    checks.floating(("g", g), ("beta", beta))
    checks.memory(state, q.dtype)
    checks.same_device(("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("state", state), ("slots", slots))
    checks.not_positive("g", g, "a log decay")
    checks.slots(slots, sizes["B"], sizes["N"])
    checks.no_gradient(("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("state", state))
    return sizes
