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
from gdn.core.portable_math import int64
from gdn.core.portable_rows import power_of_two
from gdn.ops.qkv import EPS
from gdn.ops.short_conv.portable import (
    AT_ONCE,
    dense,
    filtered,
    past_inputs,
    place,
    push,
    reach,
    restart,
    sigmoid,
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
def choose(part, q, k, v):
    if part == 0:
        pointer = q
    elif part == 1:
        pointer = k
    else:
        pointer = v
    return pointer


@triton.jit
def forward_kernel(
    x, weight, q, k, v, documents, positions, T, pieces, x_row, x_token, eps,
    H: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr,
    L: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """L tokens. Grid [rows * pieces * NB blocks of channels]."""
    D: tl.constexpr = 2 * H * K + VD
    program = tl.program_id(0)
    part, i, inside = channels(program % NB, H, K, VD, BH, BK)
    d = part * (H * K) + i
    row = int64(program // NB // pieces)
    begin = program // NB % pieces * L
    width = tl.where(part == 2, VD, H * K)
    x += row * x_row
    y = choose(part, q, k, v) + row * T * width
    filters = taps(weight, d, inside, W)
    n, p = place(documents, positions, row, begin, T)
    window = past_inputs(x + int64(begin) * x_token, None, n, p, x_token, 0, d, inside, D, W)
    for start in range(begin, tl.minimum(begin + L, T), U):
        inputs = ()
        for u in tl.static_range(U):
            inputs = inputs + (tl.load(x + int64(start + u) * x_token + d, mask=inside & (start + u < T), other=0.0),)
        for u in tl.static_range(U):
            t = start + u
            now = inputs[u].to(tl.float32)
            if documents is not None:
                n, p = place(documents, positions, row, t, T)
                window = restart(window, None, n, p, x, 0, d, inside, D, W)
            z = filtered(now, window, filters, 0.0, W)
            z *= sigmoid(z)
            scale = tl.where(part == 2, 1.0, 1.0 / tl.sqrt(tl.sum(z * z, 1) + eps))
            tl.store(y + int64(t) * width + i, (z * scale[:, None]).to(y.dtype.element_ty), mask=inside & (t < T))
            window = push(now, window)


@triton.jit
def backward_kernel(
    x, weight, dq, dk, dv, dx, partial, documents, positions, T, pieces, x_row, x_token, eps,
    H: tl.constexpr, K: tl.constexpr, VD: tl.constexpr, W: tl.constexpr, BH: tl.constexpr, BK: tl.constexpr, NB: tl.constexpr,
    L: tl.constexpr, U: tl.constexpr,
):  # fmt: skip
    """dx of L tokens, and what they add to the gradient of the filter: partial [rows * pieces, W, D]. Grid as forward.

    From the gradient of a unit vector u = y r, that of y is r (du - u <u, du>).
    """
    D: tl.constexpr = 2 * H * K + VD
    program = tl.program_id(0)
    part, i, inside = channels(program % NB, H, K, VD, BH, BK)
    d = part * (H * K) + i
    piece = program // NB
    row = int64(piece // pieces)
    begin = piece % pieces * L
    end = tl.minimum(begin + L, T)
    width = tl.where(part == 2, VD, H * K)
    x += row * x_row
    dy = choose(part, dq, dk, dv) + row * T * width
    dx += row * T * D + d
    filters = taps(weight, d, inside, W)
    n, p = place(documents, positions, row, begin, T)
    window = past_inputs(x + int64(begin) * x_token, None, n, p, x_token, 0, d, inside, D, W)
    nothing = tl.zeros((BH, BK), tl.float32)
    waiting = ()
    sums = (nothing,)
    for _ in tl.static_range(1, W):
        waiting = waiting + (nothing,)
        sums = sums + (nothing,)
    for start in range(begin, end + W - 1, U):
        inputs = ()
        slopes = ()
        for u in tl.static_range(U):
            there = inside & (start + u < T)
            inputs = inputs + (tl.load(x + int64(start + u) * x_token + d, mask=there, other=0.0),)
            slopes = slopes + (tl.load(dy + int64(start + u) * width + i, mask=there, other=0.0),)
        for u in tl.static_range(U):
            t = start + u
            now = inputs[u].to(tl.float32)
            p = t
            if documents is not None:
                n, p = place(documents, positions, row, t, T)
                window = restart(window, None, n, p, x, 0, d, inside, D, W)
            z = filtered(now, window, filters, 0.0, W)
            s = sigmoid(z)
            y = z * s
            slope = slopes[u].to(tl.float32)
            square = 1.0 / (tl.sum(y * y, 1) + eps)
            along = tl.where(part == 2, 0.0, tl.sum(slope * y, 1) * square)
            scale = tl.where(part == 2, 1.0, tl.sqrt(square))
            dz = (slope - y * along[:, None]) * scale[:, None] * (s + y * (1.0 - s))
            sums = sum_taps(sums, tl.where(t < end, dz, 0.0), now, window, W)
            reached = reach(dz, filters, waiting, p, W)
            done = t - (W - 1)
            tl.store(dx + int64(done) * D, reached[W - 1].to(dx.dtype.element_ty), mask=inside & (done >= begin) & (done < end))
            waiting = ()
            for j in tl.static_range(W - 1):
                waiting = waiting + (reached[j],)
            window = push(now, window)
    for j in tl.static_range(W):
        tl.store(partial + (int64(piece) * W + (W - 1 - j)) * D + d, sums[j], mask=inside)


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
        forward_kernel, (programs,), x, weight, q, k, v, documents, positions, *length, x.stride(0), x.stride(1), EPS, *constants, warps=warps,
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
    warps = max(1, BH * BK // 128)
    L = tokens_of_a_piece(rows, length, blocks * warps)
    pieces = -(-length // L)
    constants = (heads, head_dim, values, weight.shape[1], BH, BK, blocks, L, AT_ONCE)
    return rows * pieces * blocks, rows * pieces, (length, pieces), constants, warps


_QKV = Opaque("gdn::convolved_qkv_portable", _forward, _backward, fake=_fake, results=3, differentiable=("x", "weight"), foreseen=True)
