"""The delta rule with a decay for each key channel: contracts and tables. The derivation is in README.md beside this file."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.replay import replayed

TRITON = dataclasses.replace(triton_gpu(K=range(1, 257), V=range(1, 513)), dtypes=(torch.bfloat16, torch.float32))
"""What the Triton row needs. Not float16, as for linear attention with decay: gradients times strong decays are below its least number."""

OP = Op(
    "channel_delta_rule",
    (
        Impl("portable", "gdn.ops.delta_channel.portable:channel_delta_rule", TRITON),
        Impl("chunked", "gdn.ops.delta_channel.chunked:channel_delta_rule"),
        Impl("reference", "gdn.ops.delta_channel.reference:channel_delta_rule"),
    ),
)
"""Rows take `(q, k, v, g, beta, scale, initial_state, packing)` and return `(o, final_state)`."""

STEP = Op(
    "channel_delta_step",
    (
        Impl("portable", "gdn.ops.delta_step.portable:channel_delta_step", triton_gpu(K=range(1, 513))),
        Impl("torch", "gdn.ops.delta_step.plain:channel_delta_step"),
        Impl("reference", "gdn.ops.delta_channel.reference:channel_delta_step"),
    ),
)
"""Rows take `(q, k, v, g, beta, state, scale, slots)`, write into `state` and return `o`."""


@replayed
def channel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A memory `S` each of whose rows, the channels of the keys, forgets by a gate of its own, and that corrects itself by the delta rule.

    For each sequence and value head, from `S = initial_state` (or 0), for each token t in order:

        S   = diag(exp(g_t)) S                          forget, channel by channel
        S   = S + beta_t k_t (v_t - k_t^T S)            write the error of what the memory recalls for k_t
        o_t = scale S^T q_t                             read, after the write

    The memory of Kimi Delta Attention (arXiv 2510.26692). With g the same for all channels it is `gated_delta_rule`.

    Args:
        q, k: queries and keys `[B, T, H, K]`. Keys should have norm at most 1 (see `l2norm`) when beta can exceed 1.
        v: values `[B, T, HV, V]`, the dtype of q. HV is a multiple of H: value head i reads query/key head `i // (HV // H)`.
        g: log decay `[B, T, HV, K]`, at most 0; any floating dtype. Minus infinity clears a channel. Values below -64 act as -64.
        beta: writing strength `[B, T, HV]`, from 0 to 2; any floating dtype.
        scale: factor on the read. Default `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, float32 (float64 with float64 inputs).
        packing: boundaries of N packed documents over the `B * T` tokens; state starts anew at each. Without it N = B.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]` in float32 (float64 with float64 inputs).
        Both are differentiable with respect to q, k, v, g, beta and initial_state.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or g is positive (values are looked at on the CPU only).

    Example:
        Two channels hold 8 and 8; the first is halved, the second cleared; the token writes nothing and reads their sum.

        >>> import math, torch
        >>> g = torch.tensor([math.log(0.5), -math.inf]).reshape(1, 1, 1, 2)
        >>> q, zero = torch.ones(1, 1, 1, 2), torch.zeros(1, 1, 1)
        >>> o, state = channel_delta_rule(q, q, q[..., :1], g, zero, scale=1.0, initial_state=torch.full((1, 1, 2, 1), 8.0))
        >>> o.item(), [round(x, 6) for x in state.flatten().tolist()]
        (4.0, [4.0, 0.0])
    """
    sizes = _check(q, k, v, g, beta)
    checks.same_device(("q", q), ("initial_state", initial_state))
    checks.boundaries(packing, sizes["B"], sizes["T"], q.device)
    if initial_state is not None:
        documents = sizes["B"] if packing is None else packing.num_documents
        checks.shapes(("initial_state", initial_state, "N HV K V"), N=documents, **sizes)
        expected = checks.accumulate_dtype(q.dtype)
        if initial_state.dtype != expected:
            raise ArgumentError(f"initial_state: expected {expected}, got {initial_state.dtype}")
    scale = checks.scale(scale, sizes["K"])
    return OP.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, g, beta, scale, initial_state, packing)


@replayed
def channel_delta_step(
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
    r"""`channel_delta_rule` for a few more tokens of each of many sequences, their memories updated in place: decoding.

    For sequence b and each value head, with `S = state[slots[b]]`: the tokens in order as in `channel_delta_rule`, and S is stored back
    into the same row. A negative slot skips the sequence: its o is zero and no memory is touched. No gradients.

    Args:
        q, k: `[B, T, H, K]`, T of 1 or some; any T works.
        v: `[B, T, HV, V]`, the dtype of q. HV is a multiple of H.
        g: log decay `[B, T, HV, K]`, at most 0; any floating dtype.
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
        >>> import math, torch
        >>> g = torch.tensor([math.log(0.5), -math.inf]).reshape(1, 1, 1, 2)
        >>> q, state = torch.ones(1, 1, 1, 2), torch.full((1, 1, 2, 1), 8.0)
        >>> channel_delta_step(q, q, q[..., :1], g, torch.zeros(1, 1, 1), state, scale=1.0).item(), state.flatten().tolist()
        (4.0, [4.0, 0.0])
    """
    sizes = _check(q, k, v, g, beta)
    checks.shapes(("state", state, "N HV K V"), HV=sizes["HV"], K=sizes["K"], V=sizes["V"])
    checks.memory(state, q.dtype)
    checks.same_device(("q", q), ("state", state), ("slots", slots))
    checks.slots(slots, sizes["B"], state.shape[0])
    checks.no_gradient(("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("state", state))
    scale = checks.scale(scale, sizes["K"])
    return STEP.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, g, beta, state, scale, slots)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> dict[str, int]:
    letters = (("q", q, "B T H K"), ("k", k, "B T H K"), ("v", v, "B T HV V"), ("g", g, "B T HV K"), ("beta", beta, "B T HV"))
    sizes = checks.shapes(*letters)
    checks.value_heads(sizes)
    checks.same_dtype(("q", q), ("k", k), ("v", v))
    checks.floating(("g", g), ("beta", beta))
    checks.same_device(("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta))
    checks.not_positive("g", g, "a log decay")
    return sizes
