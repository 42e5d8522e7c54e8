"""The step in Triton, any GPU from sm_80 on: each memory is read once and written once, in its place.

A program holds some columns of one memory in registers for all its tokens. With d = exp(g), both products with the memory are taken before
it changes, so that neither waits for the other:

    u = beta (v - d k^T S)          o = scale (d q^T S + (q.k) u)          S <- d S + k u^T

The columns are few: a block row of them is one 128-byte line, and one sequence already gives more programs than a GPU has multiprocessors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import InPlace
from gdn.core.portable_launch import launch
from gdn.core.portable_math import exp, int64

LINE = 128
"""Bytes of a row of a program's block of the memory."""


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
    k_token,
    v_batch,
    v_token,
    state_row,
    pool,
    HV: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """All tokens of one sequence, one value head and BV columns of its memory. Grid [B * HV * column blocks]. A row that the pool does not
    have is nobody's memory: what is read of it is no number."""
    blocks: tl.constexpr = (V + BV - 1) // BV
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
        gate = b * T * HV + hv
        for t in range(T):
            query = tl.load(q + int64(t) * q_token + i, mask=i < K, other=0.0).to(tl.float32)
            key = tl.load(k + int64(t) * k_token + i, mask=i < K, other=0.0).to(tl.float32)
            value = tl.load(v + int64(t) * v_token, mask=inside, other=0.0).to(tl.float32)
            decay = exp(tl.load(g + gate + int64(t) * HV).to(tl.float32))
            strength = tl.load(beta + gate + int64(t) * HV).to(tl.float32)
            recalled = tl.sum(key[:, None] * memory, 0)
            read = tl.sum(query[:, None] * memory, 0)
            update = strength * (value - decay * recalled)
            out = scale * (decay * read + tl.sum(query * key, 0) * update)
            tl.store(o + int64(t) * (HV * V), out.to(o.dtype.element_ty), mask=inside)
            memory = decay * memory + key[:, None] * update[None, :]
        tl.store(at, memory.to(state.dtype.element_ty), mask=valid)


def gated_delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    scale: float,
    slots: Tensor | None,
) -> Tensor:
    """See `gdn.ops.gated_delta_step`."""
    return _STEP(q, k, v, g, beta, state, scale, slots)


def _run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    B, T, HV, V = v.shape
    H, K = k.shape[2:]
    o = torch.empty((B, T, HV, V), dtype=v.dtype, device=v.device)
    if T == 0:
        return o
    q, k, v = _dense_heads(q), _dense_heads(k), _dense_heads(v)
    memory = state if state.stride()[1:] == (K * V, V, 1) else state.contiguous()
    slots = None if slots is None else slots.contiguous()
    columns, warps = block(K, V, memory.element_size())
    launch(
        step_kernel, (B * HV * -(-V // columns),), q, k, v, g.contiguous(), beta.contiguous(), memory, slots, o, scale, T,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), memory.stride(0), memory.shape[0],
        HV, HV // H, K, V, _power_of_two(K), columns, warps=warps,
    )  # fmt: skip
    if memory is not state:
        state.copy_(memory)
    return o


def block(K: int, V: int, itemsize: int) -> tuple[int, int]:
    """Columns of a program, and its warps: 32 numbers of the memory a thread, and more than one line's worth only for a tiny memory."""
    columns = min(max(LINE // itemsize, 16), max(16, _power_of_two(V)))
    return columns, min(max(_power_of_two(K) * columns // 1024, 1), 8)


def _power_of_two(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _dense_heads(x: Tensor) -> Tensor:
    """x [B, T, heads, width], copied unless the numbers of a token are dense."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    return v.new_empty(v.shape)


_STEP = InPlace("gdn::gated_delta_step_portable", _run, mutates=("state",), fake=_fake, replay=True)
