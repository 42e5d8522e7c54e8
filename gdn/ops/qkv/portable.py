"""In Triton, any GPU from sm_80 on: one pass forward, one backward.

The walk along a piece of a sequence is that of `gdn.ops.short_conv.portable`. A program has whole heads of queries or keys, or as many
channels of the values; what leaves the convolution stays in registers until its length is known. The backward makes it again from x, so that
neither the convolution's output nor lengths are kept, and reads the gradients where the rule left them, so that nobody puts them side by side.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import Opaque
from gdn.core.packing import Packing
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64, sigmoid_for
from gdn.core.portable_rows import power_of_two
from gdn.ops.qkv import EPS
from gdn.ops.short_conv.portable import (
    AT_ONCE,
    dense,
    filtered,
    inputs_from,
    past_inputs,
    place,
    push,
    reach,
    restart,
    sum_taps,
    taps,
    tokens_of_a_piece,
)


@triton.jit
def channels(block, H: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr):
    """Of a block: which part it belongs to (0 queries, 1 keys, 2 values), its channels `[BH, BK]` within the part, and which of them exist."""
    blocks: tl.constexpr = (H + BH - 1) // BH
    part = tl.minimum(block // blocks, 2)
    h = (block - part * blocks) * BH + tl.arange(0, BH)[:, None]
    c = tl.arange(0, BK)[None, :]
    values = part == 2
    if K == BK:
        i = h * K + c
    else:
        i = h * tl.where(values, BK, K) + c
    return part, i, tl.where(values, i < VD, (h < H) & (c < K))


@triton.jit
def choose(part, q, k):
    if part == 0:
        pointer = q
    else:
        pointer = k
    return pointer


@triton.jit
def forward_kernel(
    x, weight, q, k, v, documents, positions, T, pieces, x_row, x_token, eps,
    H: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr,
    L: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """L tokens. Grid [rows * pieces * NB blocks of channels]."""
    program = tl.program_id(0)
    part, i, inside = channels(program % NB, H, K, VD, BH, BK)
    row = int64(program // NB // pieces)
    begin = program // NB % pieces * L
    x += row * x_row
    d = part * (H * K) + i
    if part == 2:
        walk(
            x, weight, v + row * T * VD + i, documents, positions, row, begin, T, x_token, d, inside, eps, 2 * H * K + VD, VD, W, L, U, False
        )  # fmt: skip
    else:
        walk(
            x, weight, choose(part, q, k) + row * T * (H * K) + i, documents, positions, row, begin, T, x_token, d, inside, eps,
            2 * H * K + VD, H * K, W, L, U, True,
        )  # fmt: skip


@triton.jit
def walk(
    x, weight, y, documents, positions, row, begin, T, x_token, d, inside, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, L: tl.constexpr, U: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The tokens from `begin` on of channels d of a row x; y, where their results are, is WIDTH wide. UNIT: as vectors of length one."""
    filters = taps(weight, d, inside, W)
    n, p = place(documents, positions, row, begin, T)
    window = past_inputs(x + int64(begin) * x_token, None, n, p, x_token, 0, d, inside, D, W)
    coming = inputs_from(x + int64(begin) * x_token + d, begin, T, x_token, inside, U)
    for start in range(begin, tl.minimum(begin + L, T), U):
        inputs = coming
        coming = inputs_from(x + int64(start + U) * x_token + d, start + U, T, x_token, inside, U)
        for u in tl.static_range(U):
            t = start + u
            now = inputs[u].to(tl.float32)
            if documents is not None:
                n, p = place(documents, positions, row, t, T)
                window = restart(window, None, n, p, x, 0, d, inside, D, W)
            z = filtered(now, window, filters, 0.0, W)
            z *= sigmoid_for(z, y.dtype.element_ty)
            if UNIT:
                z *= tl.rsqrt(tl.sum(z * z, 1) + eps)[:, None]
            tl.store(y + int64(t) * WIDTH, z.to(y.dtype.element_ty), mask=inside & (t < T))
            window = push(now, window)


@triton.jit
def backward_kernel(
    x, weight, dq, dk, dv, dx, partial, documents, positions, T, pieces, x_row, x_token, eps,
    H: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr,
    L: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """dx of L tokens, and what they add to the gradient of the filter: partial [rows * pieces, W, D]. Grid as forward."""
    D: tl.constexpr = 2 * H * K + VD
    program = tl.program_id(0)
    part, i, inside = channels(program % NB, H, K, VD, BH, BK)
    d = part * (H * K) + i
    piece = program // NB
    row = int64(piece // pieces)
    begin = piece % pieces * L
    x += row * x_row
    dx += row * T * D + d
    partial += int64(piece) * W * D + d
    if part == 2:
        walk_back(
            x, weight, dv + row * T * VD + i, dx, partial, documents, positions, row, begin, T, x_token, d, inside, eps, D, VD, W, L, U, False
        )  # fmt: skip
    else:
        walk_back(
            x, weight, choose(part, dq, dk) + row * T * (H * K) + i, dx, partial, documents, positions, row, begin, T, x_token, d, inside, eps,
            D, H * K, W, L, U, True,
        )  # fmt: skip


@triton.jit
def walk_back(
    x, weight, dy, dx, partial, documents, positions, row, begin, T, x_token, d, inside, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, W: tl.constexpr, L: tl.constexpr, U: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """The tokens from `begin` on of channels d of a row x; dy, the gradient of their results, is WIDTH wide.

    L is a multiple of U: the loop ends with the piece or, past the end of the row, among tokens whose gradient is zero. The W - 1 tokens after
    it reach back into the piece, but belong to the next one's filter.
    """
    end = tl.minimum(begin + L, T)
    filters = taps(weight, d, inside, W)
    n, p = place(documents, positions, row, begin, T)
    window = past_inputs(x + int64(begin) * x_token, None, n, p, x_token, 0, d, inside, D, W)
    waiting = ()
    sums = (tl.zeros(d.shape, tl.float32),)
    for _ in tl.static_range(1, W):
        waiting = waiting + (tl.zeros(d.shape, tl.float32),)
        sums = sums + (tl.zeros(d.shape, tl.float32),)
    coming = inputs_from(x + int64(begin) * x_token + d, begin, T, x_token, inside, U)
    coming_slopes = inputs_from(dy + int64(begin) * WIDTH, begin, T, WIDTH, inside, U)
    for start in range(begin, end, U):
        inputs, slopes = coming, coming_slopes
        coming = inputs_from(x + int64(start + U) * x_token + d, start + U, T, x_token, inside, U)
        coming_slopes = inputs_from(dy + int64(start + U) * WIDTH, start + U, T, WIDTH, inside, U)
        target = dx + int64(start) * D
        for u in tl.static_range(U):
            t = start + u
            now = inputs[u].to(tl.float32)
            if documents is not None:
                n, p = place(documents, positions, row, t, T)
                window = restart(window, None, n, p, x, 0, d, inside, D, W)
            dz = through(slopes[u].to(tl.float32), filtered(now, window, filters, 0.0, W), eps, dx.dtype.element_ty, UNIT)
            sums = sum_taps(sums, dz, now, window, W)
            reached = reach(dz, filters, waiting, None if documents is None else p, W)
            done = t - (W - 1)
            tl.store(target + (u - (W - 1)) * D, reached[W - 1].to(dx.dtype.element_ty), mask=inside & (done >= begin) & (done < end))
            waiting = pop(reached)
            window = push(now, window)
    after = begin + (end - begin + U - 1) // U * U
    for u in tl.static_range(W - 1):
        t = after + u
        there = inside & (t < T)
        now = tl.load(x + int64(t) * x_token + d, mask=there, other=0.0).to(tl.float32)
        slope = tl.load(dy + int64(t) * WIDTH, mask=there, other=0.0).to(tl.float32)
        if documents is not None:
            n, p = place(documents, positions, row, t, T)
            window = restart(window, None, n, p, x, 0, d, inside, D, W)
        dz = through(slope, filtered(now, window, filters, 0.0, W), eps, dx.dtype.element_ty, UNIT)
        reached = reach(dz, filters, waiting, None if documents is None else p, W)
        done = t - (W - 1)
        tl.store(dx + int64(done) * D, reached[W - 1].to(dx.dtype.element_ty), mask=inside & (done >= begin) & (done < end))
        waiting = pop(reached)
        window = push(now, window)
    for j in tl.static_range(W):
        tl.store(partial + (W - 1 - j) * D, sums[j], mask=inside)


@triton.jit
def through(slope, z, eps, dtype: tl.constexpr, UNIT: tl.constexpr):
    """The gradient of z from that of y = silu(z), or of the vector of length one u = y r: of y it is r (du - u <u, du>)."""
    s = sigmoid_for(z, dtype)
    y = z * s
    if UNIT:
        scale = tl.rsqrt(tl.sum(y * y, 1) + eps)
        along = tl.sum(slope * y, 1) * scale * scale
        slope = (slope - y * along[:, None]) * scale[:, None]
    return slope * (s + y * (1.0 - s))


@triton.jit
def pop(reached):
    """Those that wait for more."""
    waiting = ()
    for j in tl.static_range(len(reached) - 1):
        waiting = waiting + (reached[j],)
    return waiting


def convolved_qkv(x: Tensor, weight: Tensor, heads: int, head_dim: int, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor]:
    """See `gdn.ops.convolved_qkv`."""
    bounds = (None, None) if packing is None else (packing.documents, packing.positions)
    q, k, v = _QKV(x, weight, *bounds, heads, head_dim)
    return q, k, v


def _forward(
    x: Tensor, weight: Tensor, documents: Tensor | None, positions: Tensor | None, heads: int, head_dim: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _fake(x, weight, documents, positions, heads, head_dim, keep)
    x, weight = dense(x, documents is not None), weight.contiguous()
    programs, _, length, constants, warps = _sizes(x, weight, documents, heads, head_dim)
    launch(
        forward_kernel, (programs,), x, weight, q, k, v, documents, positions, *length, x.stride(0), x.stride(1), EPS, *constants,
        warps=warps // 2,
    )  # fmt: skip
    return q, k, v


def _fake(
    x: Tensor, weight: Tensor, documents: Tensor | None, positions: Tensor | None, heads: int, head_dim: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    B, T, D = x.shape
    of_head = (B, T, heads, head_dim)
    return x.new_empty(of_head), x.new_empty(of_head), x.new_empty(B, T, D - 2 * heads * head_dim)


def _backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor]:
    x, weight, documents, positions, heads, head_dim = args
    x, filters = dense(x, documents is not None), weight.contiguous()
    B, T, D = x.shape
    width = heads * head_dim
    slopes = [
        x.new_zeros((B, T, size)) if slope is None else slope.contiguous()
        for slope, size in zip(grads, (width, width, D - 2 * width), strict=True)
    ]
    programs, parts, length, constants, warps = _sizes(x, weight, documents, heads, head_dim)
    dx = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    partial = torch.empty((parts, weight.shape[1], D), dtype=torch.float32, device=x.device)
    launch(
        backward_kernel, (programs,), x, filters, *slopes, dx, partial, documents, positions, *length, x.stride(0), x.stride(1), EPS,
        *constants, warps=warps,
    )  # fmt: skip
    return [dx, partial.sum(0).T.to(weight.dtype)]


def _sizes(
    x: Tensor, weight: Tensor, documents: Tensor | None, heads: int, head_dim: int
) -> tuple[int, int, tuple[int, int], tuple[int, ...], int]:
    """Programs, pieces of all rows, tokens and pieces of a row, constants of the kernels, warps."""
    B, T, D = x.shape
    rows, length = (B, T) if documents is None else (1, B * T)
    BK = max(32, power_of_two(head_dim))
    BH = max(1, 512 // BK)
    values = D - 2 * heads * head_dim
    blocks = 2 * -(-heads // BH) + -(-values // (BH * BK))
    warps = BH * BK // 128  # 4 or 8
    L = tokens_of_a_piece(rows, length, blocks * warps)
    pieces = -(-length // L)
    constants = (heads, head_dim, values, weight.shape[1], BH, BK, blocks, L, AT_ONCE)
    return rows * pieces * blocks, rows * pieces, (length, pieces), constants, warps


_QKV = Opaque("gdn::convolved_qkv_portable", _forward, _backward, fake=_fake, results=3, differentiable=("x", "weight"), replay=True)
