"""Triton kernel that solves the triangular systems of chunks whose pairs of keys are at hand. Any GPU from sm_80 on.

With M the products of keys with decay, strictly below the diagonal, as `channels_kernel` of linear attention finds them: Phi = (I + M diag(beta))^-1 M.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import int64
from gdn.ops.delta_rule.portable_prepare import C, chunk_rows, substitute
from gdn.ops.linear_recurrence.portable_channels import load_square, parted


@triton.jit
def load_strength(beta, start, rows, hv, HV):
    """beta of the tokens of a chunk; 0 beyond the last, so that what stands there is not written."""
    i = tl.arange(0, C)
    return tl.load(beta + (start + i) * HV + hv, mask=i < rows, other=0.0).to(tl.float32)


@triton.jit
def solve_kernel(
    pairs,
    beta,
    phi,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    HV,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """phi [chunks, HV, 64, 64] from pairs, M in fp32 with the squared lengths of keys on the diagonal. Grid [chunks * HV].

    As in `pair_kernel` of the gated delta rule, where the errors are written down: solved diagonal blocks are joined in fp16 with fp32 sums, keys
    divided by their lengths, and one step of correction follows; for fp32 inputs by substitution.
    """
    hv = tl.program_id(0) % HV
    chunk = tl.program_id(0) // HV
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    tile = int64(chunk) * HV + hv
    i = tl.arange(0, C)
    j = tl.arange(0, C)
    strength = load_strength(beta, start, rows, hv, HV)
    kk = load_square(pairs, tile)
    square = tl.sum(tl.where(i[:, None] == j[None, :], kk, 0.0), 1)
    length = tl.sqrt(tl.maximum(square, 1e-30))
    m = tl.where(i[:, None] > j[None, :], kk * (1.0 / length)[:, None] * (1.0 / length)[None, :], 0.0)
    negative = m * (-strength * square)[None, :]
    if WIDE:
        solved = substitute(m, negative)
    else:
        high = negative.to(tl.float16)
        low = (negative - high.to(tl.float32)).to(tl.float16)
        e = _diagonal(pairs + tile * (C * C), beta, start, rows, hv, HV)
        for level in tl.static_range(4, 6):
            narrow = e.to(tl.float16)
            below = parted(tl.dot(narrow, high), level)
            e = tl.dot(below.to(tl.float16), narrow, e.to(tl.float32))
        narrow = e.to(tl.float16)
        rough = tl.dot(narrow, m.to(tl.float16)).to(tl.float16)
        wrong = tl.dot(low, rough, m - rough.to(tl.float32))
        wrong = tl.dot(high, rough, wrong)
        solved = tl.dot(narrow, wrong.to(tl.float16), rough.to(tl.float32))
    solved = solved * length[:, None] * length[None, :]
    tl.store(phi + tile * (C * C) + (i[:, None] * C + j[None, :]), solved.to(phi.dtype.element_ty))


@triton.jit
def _diagonal(pairs, beta, start, rows, hv, HV):
    """(I + M diag(beta))^-1, lengths of keys taken out, of the four 16 x 16 blocks on the diagonal, 0 elsewhere, [64, 64]: small products, four at a time."""
    b = tl.arange(0, 4)
    i = tl.arange(0, 16)
    row = b[:, None] * 16 + i[None, :]
    kk = tl.load(pairs + row[:, :, None] * C + row[:, None, :])
    square = tl.load(pairs + row * (C + 1))
    inverse = 1.0 / tl.sqrt(tl.maximum(square, 1e-30))
    strength = tl.load(beta + (start + row) * HV + hv, mask=row < rows, other=0.0).to(tl.float32)
    below = (i[:, None] > i[None, :])[None, :, :]
    negative = tl.where(below, kk * inverse[:, :, None] * inverse[:, None, :] * (-strength * square)[:, None, :], 0.0).to(tl.float16)
    e = tl.where((i[:, None] == i[None, :])[None, :, :], 1.0, 0.0) + _joint(negative.to(tl.float32), i, 0)
    for level in tl.static_range(1, 4):
        narrow = e.to(tl.float16)
        joint = _joint(tl.dot(narrow, negative), i, level)
        e = tl.dot(joint.to(tl.float16), narrow, e)
    same = (b[:, None] == b[None, :])[:, None, :, None]
    e = tl.where(same, tl.reshape(e.to(tl.float16), (4, 16, 1, 16)), 0.0)
    return tl.reshape(e, (C, C))


@triton.jit
def _joint(blocks, i, level: tl.constexpr):
    """The parts of lower triangular blocks that join two solved ones of 2^level."""
    return tl.where((((i >> level)[:, None] ^ (i >> level)[None, :]) == 1)[None, :, :], blocks, 0.0)
