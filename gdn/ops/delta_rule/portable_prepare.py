"""Triton kernel for what depends on one chunk alone: the solved key matrix, the score matrix and the gates. Any GPU from sm_80 on.

Letters of one chunk of C = 64 tokens and one value head (derivation in portable.py):

    G      running sum of g inside the chunk, gamma = exp(G)
    M      strictly lower, M_ij = exp(G_i - G_j) k_i.k_j
    Phi    strictly lower, (I + M diag(beta))^-1 M
    A      lower, A_ij = scale exp(G_i - G_j) q_i.k_j
"""

from __future__ import annotations

import triton
import triton.language as tl

C = tl.constexpr(64)
GATES = tl.constexpr(5)
SMALLEST_LOG_DECAY = tl.constexpr(-64.0)


@triton.jit
def int64(x):
    """A scalar as int64: offsets into whole tensors pass 2^31."""
    return x + tl.full((), 0, tl.int64)


@triton.jit
def chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED: tl.constexpr):
    """First token of a chunk of the flattened list (int64) and how many of its 64 rows are tokens."""
    if PACKED:
        document = tl.load(chunk_table + 2 * chunk)
        inside = tl.load(chunk_table + 2 * chunk + 1) * C
        first = tl.load(cu_seqlens + document)
        length = tl.load(cu_seqlens + document + 1) - first
        start = int64(first) + inside
    else:
        row = chunk // per_row
        inside = (chunk - row * per_row) * C
        length = T
        start = int64(row) * T + inside
    return start, tl.minimum(length - inside, C)


@triton.jit
def load_rows(base, start, rows, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Columns first .. first + BLOCK of the [64, WIDTH] rows of a chunk; zero beyond the last token and beyond WIDTH."""
    i = tl.arange(0, C)
    c = tl.arange(0, BLOCK)
    at = base + start * stride + first + (i[:, None] * stride + c[None, :])
    mask = (i < rows)[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (c + first < WIDTH)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def prepare_kernel(
    q,
    k,
    g,
    beta,
    phi,
    scores,
    gates,
    norms,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    scale,
    q_stride,
    k_stride,
    H,
    HV,
    K: tl.constexpr,
    BK: tl.constexpr,
    PACKED: tl.constexpr,
    SOLVE: tl.constexpr,
    SCORES: tl.constexpr,
    NORMS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Phi (if SOLVE) and A (if SCORES) of one chunk and value head. Grid [chunks * HV].

    gates [chunks, HV, 5, 64] fp32 holds G, gamma = exp(G), beta (0 beyond the last token), D = exp(G_last - G) and the low part of G:
    written with SOLVE, read without.
    norms [chunks, HV] (if NORMS) bounds the logarithm of the spectral norm of the chunk's map from state to state, for keys of any length:
    the sum of g + log max(1, |1 - beta |k|^2|).
    """
    pid = tl.program_id(0)
    chunk = pid // HV
    hv = pid - chunk * HV
    h = hv // (HV // H)
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    i = tl.arange(0, C)
    at = i[:, None] * C + i[None, :]
    tile = int64(pid) * (C * C)
    gate = gates + int64(pid) * (GATES * C)
    if SOLVE:
        g_row = tl.load(g + start * HV + hv + i * HV, mask=i < rows, other=0.0).to(tl.float32)
        beta_row = tl.load(beta + start * HV + hv + i * HV, mask=i < rows, other=0.0).to(tl.float32)
        g_row = tl.maximum(g_row, SMALLEST_LOG_DECAY)
        coarse = tl.floor(g_row * 256.0) * 0.00390625
        G = tl.cumsum(coarse, 0)
        G_low = tl.cumsum(g_row - coarse, 0)
        tl.store(gate + i, G)
        tl.store(gate + C + i, tl.exp(G + G_low))
        tl.store(gate + 2 * C + i, beta_row)
        tl.store(gate + 3 * C + i, tl.exp((tl.sum(coarse, 0) - G) + (tl.sum(g_row - coarse, 0) - G_low)))
        tl.store(gate + 4 * C + i, G_low)
    else:
        G = tl.load(gate + i)
        G_low = tl.load(gate + 4 * C + i)
    if SOLVE:
        kk = _products(k, k, start, rows, h, k_stride, k_stride, K, BK, WIDE)
        square = tl.sum(tl.where(i[:, None] == i[None, :], kk, 0.0), 1)
        if NORMS:
            growth = tl.log(tl.maximum(tl.abs(1.0 - beta_row * square), 1.0))
            tl.store(norms + pid, tl.sum(g_row + growth, 0))
        solved = _solve(kk, G, G_low, beta_row, square, phi.dtype.element_ty, WIDE)
        tl.store(phi + tile + at, solved)
    if SCORES:
        a = _products(q, k, start, rows, h, q_stride, k_stride, K, BK, WIDE)
        a *= tl.exp(tl.where(i[:, None] >= i[None, :], log_decay(G, G_low, WIDE), float("-inf"))) * scale
        tl.store(scores + tile + at, a.to(scores.dtype.element_ty))


@triton.jit
def log_decay(G, G_low, WIDE: tl.constexpr):
    """G_i - G_j. G is the running sum of g rounded down to multiples of 1/256, which is exact, and G_low that of the rest, below 1/4: fp32
    inputs need both, or the decay would be off by 2^-24 |G|."""
    if WIDE:
        return (G[:, None] - G[None, :]) + (G_low[:, None] - G_low[None, :])
    else:
        return (G + G_low)[:, None] - (G + G_low)[None, :]


@triton.jit
def _products(x, y, start, rows, h, x_stride, y_stride, K: tl.constexpr, BK: tl.constexpr, WIDE: tl.constexpr):
    """x y^T of one chunk and head, [64, 64] fp32."""
    acc = tl.zeros((C, C), tl.float32)
    for first in tl.static_range(0, K, BK):
        y_rows = load_rows(y + h * K, start, rows, y_stride, first, K, BK)
        x_rows = load_rows(x + h * K, start, rows, x_stride, first, K, BK)
        acc = tl.dot(x_rows, tl.trans(y_rows), acc, input_precision="tf32x3" if WIDE else "tf32")
    return acc


@triton.jit
def _solve(kk, G, G_low, beta, square, dtype, WIDE: tl.constexpr):
    """Phi = (I + M diag(beta))^-1 M.

    With L = M diag(beta), E = (I + L)^-1 is found by joining solved diagonal blocks, 2 to 4 to 8 ... to 64: the block under two solved ones
    becomes -E F E, F its part of L. Then Phi = E M. Products are fp16 with fp32 sums (fp32 for fp32 inputs): on 64 unit keys the error is
    6e-5 of the norm for random keys and 5.7e-3 for beta = 2 and keys of correlation 0.9, as with substitution and tf32 joins, without
    their serial steps. Keys are divided by their length first, so that any length fits fp16.
    """
    i = tl.arange(0, C)
    length = tl.sqrt(tl.maximum(square, 1e-30))
    log_length = tl.log(length)
    exponent = log_decay(G, G_low, WIDE) - (log_length[:, None] + log_length[None, :])
    m = kk * tl.exp(tl.where(i[:, None] > i[None, :], exponent, float("-inf")))
    negative = _narrow(m * (-beta * square)[None, :], WIDE)
    m = _narrow(m, WIDE)
    e = tl.where(i[:, None] == i[None, :], 1.0, tl.where(_under(i, 0), negative.to(tl.float32), 0.0))
    for level in tl.static_range(1, 6):
        narrow = _narrow(e, WIDE)
        below = tl.where(_under(i, level), tl.dot(narrow, negative, input_precision="tf32x3"), 0.0)
        e = tl.dot(_narrow(below, WIDE), narrow, e, input_precision="tf32x3")
    solved = tl.dot(_narrow(e, WIDE), m, input_precision="tf32x3")
    return (solved * (length[:, None] * length[None, :])).to(dtype)


@triton.jit
def _under(i, level: tl.constexpr):
    """The blocks of size 2^level under the diagonal that join two diagonal blocks: odd block of rows, even block of columns to its left."""
    block = i >> level
    left = tl.where(block % 2 == 1, block - 1, -1)
    return left[:, None] == block[None, :]


@triton.jit
def _narrow(x, WIDE: tl.constexpr):
    if WIDE:
        return x
    else:
        return x.to(tl.float16)
