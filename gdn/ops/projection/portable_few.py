"""A few tokens in Triton, as in decoding: a product takes as long as reading the matrix does, and the host longer.

For one or two, what stands before the matrix and the product are one kernel: a program has some rows of the matrix and goes along them, and
makes again what stands before, which is cheap, saves a kernel and the way through memory, and takes the GPU 7 to 9 tenths of both. For up to
`MOST_TOKENS` of 16 bits the product is a kernel that takes the GPU at most 6 % more than cuBLAS, and the host less: a replay hands it to the
driver together with the kernel before. Torch multiplies where a user has put a kernel in place of its own (`may_multiply`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core import device
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64, sigmoid_for
from gdn.core.portable_rows import power_of_two, rows
from gdn.core.replay import may_multiply

FUSED_TOKENS, MOST_TOKENS = 2, 64
ROWS, COLUMNS, STAGES = 8, 512, 3
"""Of the matrix, a program's at a time where all is one kernel, and how many times ahead it reads. For 2048 rows of 5632 columns, one token and
two 14.1 and 14.9 us on an H200; with twice the columns and warps 13.7 and 15.3, and 15.9 and 18.1 without reading ahead."""
PRODUCT_ROWS, PRODUCT_COLUMNS, PRODUCT_STAGES = 16, 256, 4
"""Of the kernel that multiplies alone; half of the columns where shared memory is small. For 2048 rows of 5632 columns and 8, 32, 64 and 128
tokens 16.5, 16.4, 17.4 and 27.6 us on an H200, cuBLAS 16.6, 16.2, 16.4 and 17.5; of 2048 columns 9.8, 9.7, 9.9 and 13.6, cuBLAS 9.8, 9.7, 10.0
and 10.0."""
LEAST_DOT = 16
"""Tokens of a product on tensor cores."""


@triton.jit
def write(y, total, count, M, BT: tl.constexpr, BM: tl.constexpr):
    """y [count, M] out of numbers [BT, BM, columns] that are to be added up."""
    t = int64(tl.arange(0, BT))
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    tl.store(y + t[:, None] * M + m[None, :], tl.sum(total, 2).to(y.dtype.element_ty), mask=(t < count)[:, None] & (m < M)[None, :])


@triton.jit
def swiglu_linear_kernel(x, weight, y, count, N, M, BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """x [count, 2 N], weight [M, N], y [count, M]. Grid [blocks of M]."""
    t = int64(tl.arange(0, BT))
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BT, BM, BN), tl.float32)
    for start in tl.range(0, N, BN, num_stages=STAGES):
        c = start + tl.arange(0, BN)
        w = tl.load(weight + int64(m)[:, None] * N + c[None, :], mask=(m < M)[:, None] & (c < N)[None, :], other=0.0)
        valid = (t < count)[:, None] & (c < N)[None, :]
        gate = tl.load(x + t[:, None] * 2 * N + c[None, :], mask=valid, other=0.0).to(tl.float32)
        up = tl.load(x + t[:, None] * 2 * N + N + c[None, :], mask=valid, other=0.0).to(tl.float32)
        h = (gate * sigmoid_for(gate, x.dtype.element_ty) * up).to(x.dtype.element_ty)
        total += h.to(tl.float32)[:, None, :] * w.to(tl.float32)[None, :, :]
    write(y, total, count, M, BT, BM)


@triton.jit
def gated_rms_norm_linear_kernel(
    x, gate, norm_weight, weight, y, eps, count, heads, M, x_group, x_outer, x_inner, gate_group, gate_outer, gate_inner,
    D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr, SILU: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """x, gate [count, heads, D] by rows (`gdn.core.portable_rows`), weight [M, heads D], y [count, M]. Grid [blocks of M]."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    d = tl.arange(0, BD)
    i = tl.arange(0, BT * BH)
    j = tl.arange(0, BH * BD)
    factor = tl.load(norm_weight + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BT, BM, BH * BD), tl.float32)
    for start in tl.range(0, heads, BH, num_stages=STAGES):
        column = start * D + j if D == BD else (start + j // BD) * D + j % BD
        exists = (start + j // BD < heads) & (j % BD < D)
        w = tl.load(weight + int64(m)[:, None] * heads * D + column[None, :], mask=(m < M)[:, None] & exists[None, :], other=0.0)
        head = start + i % BH
        r = int64(i // BH) * heads + head
        valid = ((i // BH < count) & (head < heads))[:, None] & (d < D)[None, :]
        value = tl.load(x + (r // x_group * x_outer + r % x_group * x_inner)[:, None] + d[None, :], mask=valid, other=0.0).to(tl.float32)
        z = tl.load(gate + (r // gate_group * gate_outer + r % gate_group * gate_inner)[:, None] + d[None, :], mask=valid, other=0.0)
        z = z.to(tl.float32)
        square = tl.where(head < heads, tl.sum(value * value, 1) / D + eps, 1.0)  # eps may be 0 in float32
        s = sigmoid_for(z, x.dtype.element_ty)
        h = value * (1.0 / tl.sqrt(square))[:, None] * factor * (z * s if SILU else s)
        h = tl.reshape(h.to(x.dtype.element_ty), (BT, BH * BD)).to(tl.float32)
        total += h[:, None, :] * w.to(tl.float32)[None, :, :]
    write(y, total, count, M, BT, BM)


@triton.jit
def linear_kernel(h, weight, y, count, N, M, BT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """h [count, N], weight [M, N], y [count, M]. Grid [blocks of M]."""
    t = int64(tl.arange(0, BT))
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    total = tl.zeros((BT, BM), tl.float32)
    for start in range(0, N, BN):
        c = start + tl.arange(0, BN)
        w = tl.load(weight + int64(m)[:, None] * N + c[None, :], mask=(m < M)[:, None] & (c < N)[None, :], other=0.0)
        of_tokens = tl.load(h + t[:, None] * N + c[None, :], mask=(t < count)[:, None] & (c < N)[None, :], other=0.0)
        total = tl.dot(of_tokens, tl.trans(w), total)
    tl.store(y + t[:, None] * M + m[None, :], total.to(y.dtype.element_ty), mask=(t < count)[:, None] & (m < M)[None, :])


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor | None:
    """See `gdn.ops.swiglu_linear`; None where this is not the way."""
    M, N = weight.shape
    count = x.shape[:-1].numel()
    if not _few(count, FUSED_TOKENS, weight):
        return None
    y = torch.empty((*x.shape[:-1], M), dtype=x.dtype, device=x.device)
    launch(
        swiglu_linear_kernel, (-(-M // ROWS),), x.contiguous(), weight, y, count, N, M, power_of_two(count), ROWS, COLUMNS, STAGES,
        warps=4, stages=STAGES,
    )  # fmt: skip
    return y


def gated_rms_norm_linear(x: Tensor, gate: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor | None:
    """See `gdn.ops.gated_rms_norm_linear`; None where this is not the way."""
    H, D = x.shape[-2:]
    M, BD = weight.shape[0], power_of_two(D)
    count = x.shape[:-2].numel()
    if BD > COLUMNS or not _few(count, FUSED_TOKENS, weight):
        return None
    y = torch.empty((*x.shape[:-2], M), dtype=x.dtype, device=x.device)
    x, *layout = rows(x)
    gate, *gate_layout = rows(gate)
    launch(
        gated_rms_norm_linear_kernel, (-(-M // ROWS),), x, gate, norm_weight.contiguous(), weight, y, eps, count, H, M,
        *layout, *gate_layout, D, BD, COLUMNS // BD, power_of_two(count), ROWS, silu, STAGES, warps=4, stages=STAGES,
    )  # fmt: skip
    return y


def linear(h: Tensor, weight: Tensor) -> Tensor:
    """`h weight^T` of a dense h `[..., N]`."""
    M, N = weight.shape
    count = h.shape[:-1].numel()
    if h.dtype not in (torch.float16, torch.bfloat16) or not _few(count, MOST_TOKENS, weight):
        return torch.matmul(h, weight.T)
    y = torch.empty((*h.shape[:-1], M), dtype=h.dtype, device=h.device)
    columns = PRODUCT_COLUMNS if device.room(h.device.index or 0) > device.SMALL else PRODUCT_COLUMNS // 2
    launch(
        linear_kernel, (-(-M // PRODUCT_ROWS),), h, weight, y, count, N, M, max(LEAST_DOT, power_of_two(count)), PRODUCT_ROWS, columns,
        warps=4, stages=PRODUCT_STAGES,
    )  # fmt: skip
    return y


def _few(count: int, most: int, weight: Tensor) -> bool:
    """Whether there are no more tokens, and a matrix that need not be copied."""
    return count <= most and weight.is_contiguous() and may_multiply()
