"""The steps in Triton, any GPU from sm_80 on: each memory is read once and written once, in its place.

A program holds some columns of one memory in registers for all its tokens. With d = exp(g), both products with the memory are taken before
it changes, so that neither waits for the other:

    u = beta (v - d k^T S)          o = scale (d q^T S + (q.k) u)          S <- d S + k u^T

Without the delta rule u = v. A decay of each value has one d a column, in the same places. One of each key stands between k or q and S, and of
several writes a token all but the first meet a memory that was changed: there S <- d S comes first, and d is 1 from then on.

The columns are few, so that one sequence already gives each multiprocessor a program, and so are the warps of a program
(notes/decoding_step.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import InPlace
from gdn.core.portable_launch import launch
from gdn.core.portable_math import exp, int64

FEW = 256
"""Programs of 32 columns, about two for each multiprocessor of an H200. Half as wide ones are faster for 128 and slower for 1024; between
them nothing was measured."""


@triton.jit
def _faded(memory, decay, DECAY: tl.constexpr):
    if DECAY == "key":
        return decay[:, None] * memory
    elif DECAY == "value":
        return decay[None, :] * memory
    else:
        return decay * memory


@triton.jit(do_not_specialize=["pool"])
def step_kernel(
    q,
    k,
    v,
    g,
    beta,
    state,
    slots,
    o,
    scale,
    T,
    q_batch,
    q_token,
    k_batch,
    k_write,
    v_batch,
    v_write,
    state_row,
    pool,
    HV: tl.constexpr,
    GROUP: tl.constexpr,
    GATES: tl.constexpr,
    WRITES: tl.constexpr,
    DECAY: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """All tokens of one sequence, one value head and BV columns of its memory. Grid [B * HV * column blocks]. A row that the pool does not
    have is nobody's memory: what is read of it is no number. Tokens have WRITES writes and one decay, DECAY ("head", "key" or "value") a
    number, K or V for each of GATES heads. Without beta what is written is the value."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    WIDTH: tl.constexpr = K if DECAY == "key" else V if DECAY == "value" else 1
    FADE_FIRST: tl.constexpr = DECAY == "key" or WRITES > 1
    program = tl.program_id(0)
    column = program % blocks * BV + tl.arange(0, BV)
    hv = program // blocks % HV
    b = int64(program // (blocks * HV))
    inside = column < V
    q += b * q_batch + hv // GROUP * K
    k += b * k_batch + hv // GROUP * K
    v += b * v_batch + hv * V + column
    o += b * T * (HV * V) + hv * V + column
    if slots is not None:
        row = int64(tl.load(slots + b))
    else:
        row = b
    if (row < 0) | (row >= pool):
        nothing = tl.where(row < 0, 0.0, float("nan"))
        for t in range(T):
            tl.store(o + int64(t) * (HV * V), (tl.zeros((BV,), tl.float32) + nothing).to(o.dtype.element_ty), mask=inside)
    else:
        i = tl.arange(0, BK)
        valid = (i < K)[:, None] & inside[None, :]
        at = state + row * state_row + hv * (K * V) + (i[:, None] * V + column[None, :])
        memory = tl.load(at, mask=valid, other=0.0).to(tl.float32)
        gate = b * T * (GATES * WIDTH) + hv // (HV // GATES) * WIDTH
        strengths = b * T * (WRITES * HV) + hv
        for t in range(T):
            write = int64(t) * WRITES + (WRITES - 1)
            query = tl.load(q + int64(t) * q_token + i, mask=i < K, other=0.0).to(tl.float32)
            key = tl.load(k + write * k_write + i, mask=i < K, other=0.0).to(tl.float32)
            update = tl.load(v + write * v_write, mask=inside, other=0.0).to(tl.float32)
            if DECAY == "key":
                decay = exp(tl.load(g + gate + int64(t) * (GATES * WIDTH) + i, mask=i < K, other=0.0).to(tl.float32))
            elif DECAY == "value":
                decay = exp(tl.load(g + gate + int64(t) * (GATES * WIDTH) + column, mask=inside, other=0.0).to(tl.float32))
            else:
                decay = exp(tl.load(g + gate + int64(t) * GATES).to(tl.float32))
            if FADE_FIRST:
                memory = _faded(memory, decay, DECAY)
            if WRITES > 1:
                for earlier in range(WRITES - 1):
                    one = int64(t) * WRITES + earlier
                    other = tl.load(k + one * k_write + i, mask=i < K, other=0.0).to(tl.float32)
                    value = tl.load(v + one * v_write, mask=inside, other=0.0).to(tl.float32)
                    if beta is not None:
                        value = tl.load(beta + strengths + one * HV).to(tl.float32) * (value - tl.sum(other[:, None] * memory, 0))
                    memory = memory + other[:, None] * value[None, :]
            if beta is not None:
                strength = tl.load(beta + strengths + write * HV).to(tl.float32)
                recalled = tl.sum(key[:, None] * memory, 0)
                read = tl.sum(query[:, None] * memory, 0)
                update = strength * (update - (recalled if FADE_FIRST else decay * recalled))
            else:
                read = tl.sum(query[:, None] * memory, 0)
            out = scale * ((read if FADE_FIRST else decay * read) + tl.sum(query * key, 0) * update)
            tl.store(o + int64(t) * (HV * V), out.to(o.dtype.element_ty), mask=inside)
            memory = (memory if FADE_FIRST else _faded(memory, decay, DECAY)) + key[:, None] * update[None, :]
        tl.store(at, memory.to(state.dtype.element_ty), mask=valid)


def _run(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, scale: float, slots: Tensor | None, decay: str
) -> Tensor:
    """k, v and beta as in the contract of one write a token, or of several."""
    (B, T, H, K), (HV, V) = q.shape, v.shape[-2:]
    writes = k.shape[2] if k.ndim == 5 else 1
    o = torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device)
    if T == 0:
        return o
    q, k, v = _even(q), _even(k), _even(v)
    memory = state if state.stride()[1:] == (K * V, V, 1) else state.contiguous()
    slots = None if slots is None else slots.contiguous()
    beta = None if beta is None else beta.contiguous()
    columns, warps = block(K, V, T * writes, B * HV)
    launch(
        step_kernel, (B * HV * -(-V // columns),), q, k, v, g.contiguous(), beta, memory, slots, o, scale, T,
        q.stride(0), q.stride(1), k.stride(0), _distance(k), v.stride(0), _distance(v), memory.stride(0), memory.shape[0],
        HV, HV // H, g.shape[2], writes, decay, K, V, _power_of_two(K), columns, warps=warps,
    )  # fmt: skip
    if memory is not state:
        state.copy_(memory)
    return o


def block(K: int, V: int, writes: int, memories: int) -> tuple[int, int]:
    """Columns of a program, and its warps: at most 128 numbers of the memory a thread, so one warp with keys of 128, whose sums over keys wait
    for no other. For one write a sequence rows of 32 numbers, if there are programs enough; for several, whose arithmetic takes longer than
    the memory, of 16."""
    many = writes == 1 and memories * -(-V // 32) > FEW
    columns = min(32 if many else 16, max(16, _power_of_two(V)))
    return columns, min(max(_power_of_two(K) * columns // 4096, 1), 8)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _even(x: Tensor) -> Tensor:
    """x `[B, T, heads, width]` or `[B, T, n, heads, width]`, copied unless the numbers of a write are dense and its writes evenly apart."""
    apart = x.ndim == 4 or 1 in x.shape[1:3] or x.stride(1) == x.shape[2] * x.stride(2)
    return x if apart and x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] else x.contiguous()


def _distance(x: Tensor) -> int:
    """From one write to the next."""
    return x.stride(-3) if x.shape[-3] > 1 else x.stride(1)


def _fake(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, scale: float, slots: Tensor | None, decay: str
) -> Tensor:
    return v.new_empty((*q.shape[:2], *v.shape[-2:]))


_STEP = InPlace("gdn::delta_step_portable", _run, mutates=("state",), fake=_fake, replay=True)


def _corrected(decay: str) -> Callable[..., Tensor]:
    """A row of the delta rule."""

    def row(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
        return _STEP(q, k, v, g, beta, state, scale, slots, decay)

    return row


def _summed(decay: str) -> Callable[..., Tensor]:
    """A row of linear attention."""

    def row(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
        return _STEP(q, k, v, g, None, state, scale, slots, decay)

    return row


# See `gdn.ops`, by these names.
gated_delta_step = gated_delta_product_step = _corrected("head")
channel_delta_step = _corrected("key")
linear_attention_step = _summed("head")
gated_linear_attention_step = _summed("key")
value_gated_linear_attention_step = _summed("value")
