"""Triton kernels for what depends on one chunk alone: the solved key matrix, the score matrix and the gates. Any GPU from sm_80 on.

Letters of one chunk of C = 64 tokens and one value head (derivation in portable.py):

    G      running sum of g inside the chunk, gamma = exp(G)
    M      strictly lower, M_ij = exp(G_i - G_j) k_i.k_j
    Phi    strictly lower, (I + M diag(beta))^-1 M
    A      lower, A_ij = scale exp(G_i - G_j) q_i.k_j

Where a token writes WRITES times (gdn/ops/delta_product), tokens are writes here, but for q, do, o and g, which have one row for each token that
is read: after its last write. A chunk has 64 writes and up to READS such rows, a power of two (`chunk_reads`), and A is [READS, 64]. A token's
decay belongs to its first write. With WRITES = 1 nothing of this is compiled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import exp, int64

C = tl.constexpr(64)
GATES = tl.constexpr(5)
ONE = tl.constexpr(1)
SMALLEST_LOG_DECAY = tl.constexpr(-64.0)


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
def chunk_reads(start, rows, WRITES: tl.constexpr):
    """The first token of a chunk that begins at write `start` and has `rows` writes left (maybe more than 64), and how many tokens are read in
    it: row j of its reads is token + j. The last of these tokens may have its other writes in the chunk before. A chunk of 64 writes may have no read if
    a token has more."""
    if WRITES == 1:
        return start, rows
    else:
        token = start // WRITES
        return token, (writes_before(start, WRITES) + tl.minimum(rows, C)) // WRITES


@triton.jit
def writes_before(start, WRITES: tl.constexpr):
    """How many writes of its token lie before write `start`."""
    return (start % WRITES).to(tl.int32)


@triton.jit
def read_places(start, rows, WRITES: tl.constexpr, READS: tl.constexpr):
    """The write in a chunk after which each of its rows is read; -1 for rows beyond the last."""
    j = tl.arange(0, READS)
    _, reads = chunk_reads(start, rows, WRITES)
    return tl.where(j < reads, j * WRITES + (WRITES - 1 - writes_before(start, WRITES)), -1)


@triton.jit
def decays_at(start, i, rows, HV, hv, WRITES: tl.constexpr):
    """Where the log decays of writes i of a chunk lie in g [tokens, HV], and which writes have one: the first of each token."""
    if WRITES == 1:
        return (start + i) * HV + hv, i < rows
    else:
        place = writes_before(start, WRITES) + i
        return (start // WRITES + place // WRITES) * HV + hv, (i < rows) & (place % WRITES == 0)


@triton.jit
def load_rows(base, start, rows, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr = C):
    """Columns first .. first + BLOCK of the [ROWS, WIDTH] rows of a chunk; zero beyond the last token and beyond WIDTH.

    Strides are multiples of 8 elements, and said to be: a stride of 1800 alone would not be known to keep 16-byte alignment, and the
    loads would go element by element, four times slower.
    """
    i = tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    stride = stride // 8 * 8
    at = base + start * stride + first + (i[:, None] * stride + c[None, :])
    mask = (i < rows)[:, None]
    if WIDTH % BLOCK != 0:
        mask = mask & (c + first < WIDTH)[None, :]
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def load_rows_again(base, start, rows, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr = C):
    """The same, but rows beyond the last token repeat it: one comparison less for each load. For products in which such rows meet a zero."""
    if ROWS == C:
        i = tl.minimum(tl.arange(0, ROWS), rows - 1)
    else:
        i = tl.minimum(tl.arange(0, ROWS), tl.maximum(rows - 1, 0))  # a chunk may have no read
    c = tl.arange(0, BLOCK)
    stride = stride // 8 * 8
    at = base + start * stride + first + (i[:, None] * stride + c[None, :])
    if WIDTH % BLOCK != 0:
        return tl.load(at, mask=(c + first < WIDTH)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def bounded(g):
    """Log decays, the least as SMALLEST_LOG_DECAY. What is no number stays so: a GPU's maximum would make a bound of it."""
    return tl.maximum(g, SMALLEST_LOG_DECAY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def chunk_gates(g, valid):
    """G, gamma = exp(G), D = exp(G_last - G) and the low part of G from the log decays of a chunk's tokens, along the first axis, any type.

    Of G stands here the running sum of g rounded down to multiples of 1/256, which is exact, and the low part is that of the rest, below 1/4.
    gamma is 0 beyond the last token of a document, where g must be 0.
    """
    decay = bounded(g.to(tl.float32))
    coarse = tl.floor(decay * 256.0) * 0.00390625
    both = tl.join(coarse, decay - coarse)  # one sum over warps instead of two
    sums = tl.cumsum(both, 0)
    G, G_low = tl.split(sums)
    after, after_low = tl.split(tl.sum(both, 0, keep_dims=True) - sums)
    return G, tl.where(valid, exp(G + G_low), 0.0), exp(after + after_low), G_low


@triton.jit
def load_gate(gates, tile, WHICH: tl.constexpr):
    """One row of the gates of a chunk and value head: 0 G, 1 gamma, 2 beta, 3 D, 4 the low part of G."""
    return tl.load(gates + tile * (GATES * C) + WHICH * C + tl.arange(0, C))


@triton.jit
def load_read_gate(gates, tile, start, rows, WHICH: tl.constexpr, WRITES: tl.constexpr, READS: tl.constexpr):
    """The same where the tokens of a chunk are read; 0 beyond the last."""
    if WRITES == 1:
        return load_gate(gates, tile, WHICH)
    else:
        place = read_places(start, rows, WRITES, READS)
        return tl.load(gates + tile * (GATES * C) + WHICH * C + place, mask=place >= 0, other=0.0)


@triton.jit
def divisor(beta, dtype: tl.constexpr):
    """beta, or 1 where it is tiny: what may be divided by after a product with it was rounded to dtype. 1 in fp16, where what is below 2^-14
    loses digits: a gradient sooner if it is multiplied by beta."""
    if dtype == tl.float16:
        return tl.full(beta.shape, 1.0, tl.float32)
    else:
        return tl.where(tl.abs(beta) < 0.00390625, 1.0, beta)


@triton.jit
def load_last(gates, tile):
    """The decay over the whole chunk: gamma D of its first token."""
    gate = gates + tile * (GATES * C)
    return tl.load(gate + C) * tl.load(gate + 3 * C)


@triton.jit
def store_gates(g, gates, cu_seqlens, chunk_table, T, per_row, HV, BH: tl.constexpr, PACKED: tl.constexpr, WRITES: tl.constexpr = ONE):
    """The gates of BH value heads of a chunk, but for beta. Grid [chunks * head blocks].

    Returns where the heads' tokens (their writes) are [64, BH], whether they are, and where their gates lie."""
    blocks = (HV + BH - 1) // BH
    chunk = tl.program_id(0) // blocks
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    i = tl.arange(0, C)[:, None]
    hv = tl.program_id(0) % blocks * BH + tl.arange(0, BH)[None, :]
    valid = (i < rows) & (hv < HV)
    at = start * HV + (i * HV + hv)
    if WRITES == 1:
        log_decay = tl.load(g + at, mask=valid, other=0.0)
    else:
        g_at, decaying = decays_at(start, i, rows, HV, hv, WRITES)
        log_decay = tl.load(g + g_at, mask=decaying & (hv < HV), other=0.0)
    G, gamma, D, G_low = chunk_gates(log_decay, valid)
    out = gates + (int64(chunk) * HV * (GATES * C) + hv * (GATES * C) + i)
    tl.store(out, G, mask=hv < HV)
    tl.store(out + C, gamma, mask=hv < HV)
    tl.store(out + 3 * C, D, mask=hv < HV)
    tl.store(out + 4 * C, G_low, mask=hv < HV)
    return at, valid, out


@triton.jit
def gates_kernel(
    g,
    beta,
    gates,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    HV,
    BH: tl.constexpr,
    PACKED: tl.constexpr,
    WRITES: tl.constexpr,
):
    """The gates of `pair_kernel`, for BH value heads of a chunk. Grid [chunks * head blocks].

    Where a multiprocessor has many programs of the pair kernel one after another, each waits twice for a sum over its warps; here all heads
    wait once.
    """
    at, valid, out = store_gates(g, gates, cu_seqlens, chunk_table, T, per_row, HV, BH, PACKED, WRITES)
    hv = tl.program_id(0) % ((HV + BH - 1) // BH) * BH + tl.arange(0, BH)[None, :]
    tl.store(out + 2 * C, tl.load(beta + at, mask=valid, other=0.0).to(tl.float32), mask=hv < HV)


@triton.jit
def pair_kernel(
    q,
    k,
    g,
    beta,
    phi,
    units,
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
    HV,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    PACKED: tl.constexpr,
    APART: tl.constexpr,
    NORMS: tl.constexpr,
    WIDE: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
):
    """Phi = (I + M diag(beta))^-1 M, A and the gates of one chunk and value head. Grid [chunks * HV]. APART: `gates_kernel` found the gates, as
    it must where tokens have several writes.

    phi [chunks, HV, 64, 64] is Phi, in fp16 in units of a power of two, units [chunks, HV] (which are made for all inputs of 16 bits).

    gates [chunks, HV, 5, 64] fp32, rows: G, gamma, beta, D, the low part of G. Beyond the last token of a document g, beta and gamma are 0,
    so that whatever stands there is neither written nor read.

    With L = M diag(beta), E = (I + L)^-1 is found by joining solved diagonal blocks, 2 to 4 to 8 ... to 64: the block under two solved ones
    becomes -E F E, F its part of L. Then Phi = E M. Products are fp16 with fp32 sums. Keys are divided by their length first, so that any
    length fits fp16. Then Phi is corrected once by its residual, Phi + E (M - Phi - L Phi), L in two parts: the error is 3e-7 of the norm
    for random keys and 2e-4 for one key repeated with beta = 2. For fp32 inputs Phi is found by substitution.

    norms [chunks, HV] (if NORMS) bounds the logarithm of the spectral norm of the chunk's map from state to state, for keys of any length:
    the sum of g + log max(1, |1 - beta |k|^2|).
    """
    hv = tl.program_id(0) % HV
    chunk = tl.program_id(0) // HV
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    i = tl.arange(0, C)
    tile = int64(chunk) * HV + hv
    at = (start + i) * HV + hv
    if APART:
        strength = load_gate(gates, tile, 2)
    else:
        tl.static_assert(WRITES == 1)
        log_decay = tl.load(g + at, mask=i < rows, other=0.0)
        strength = tl.load(beta + at, mask=i < rows, other=0.0).to(tl.float32)
    q += hv // GROUP * K
    k += hv // GROUP * K
    token, reads = chunk_reads(start, rows, WRITES)
    k_rows = load_rows(k, start, rows, k_stride, 0, K, BK)
    q_rows = load_rows(q, token, reads, q_stride, 0, K, BK, READS)
    kk = tl.dot(k_rows, tl.trans(k_rows), input_precision="ieee" if WIDE else "tf32")
    if WRITES == 1:
        qk = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee" if WIDE else "tf32")
    else:  # turned, since products on Hopper have 64 rows
        qk = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee" if WIDE else "tf32")
    for first in tl.static_range(BK, K, BK):
        k_rows = load_rows(k, start, rows, k_stride, first, K, BK)
        q_rows = load_rows(q, token, reads, q_stride, first, K, BK, READS)
        kk = tl.dot(k_rows, tl.trans(k_rows), kk, input_precision="ieee" if WIDE else "tf32")
        if WRITES == 1:
            qk = tl.dot(q_rows, tl.trans(k_rows), qk, input_precision="ieee" if WIDE else "tf32")
        else:
            qk = tl.dot(k_rows, tl.trans(q_rows), qk, input_precision="ieee" if WIDE else "tf32")
    if APART:
        G, G_low = load_gate(gates, tile, 0), load_gate(gates, tile, 4)
    else:
        G, gamma, D, G_low = chunk_gates(log_decay, i < rows)  # not before the products: a sum over warps waits for what it adds
        gate = gates + tile * (GATES * C) + i
        tl.store(gate, G)
        tl.store(gate + C, gamma)
        tl.store(gate + 2 * C, strength)
        tl.store(gate + 3 * C, D)
        tl.store(gate + 4 * C, G_low)
    square = tl.sum(tl.where(i[:, None] == i[None, :], kk, 0.0), 1)
    length = tl.sqrt(tl.maximum(square, 1e-30))
    kk = kk * (1.0 / length)[:, None] * (1.0 / length)[None, :]
    at = tile * (C * C) + (i[:, None] * C + i[None, :])
    decay = pair_decay(G, G_low, WIDE)
    if WRITES == 1:
        tl.store(scores + at, (qk * decay * scale).to(scores.dtype.element_ty))
    if NORMS:
        growth = tl.log(tl.maximum(tl.abs(1.0 - strength * square), 1.0, propagate_nan=tl.PropagateNan.ALL))
        tl.store(norms + tile, tl.sum(growth, 0) + tl.sum(tl.where(i == C - 1, G + G_low, 0.0), 0))
    if WRITES > 1:
        place = read_places(start, rows, WRITES, READS)
        here = i[:, None] == place[None, :]
        if WIDE:
            read_G, read_low = tl.sum(tl.where(here, G[:, None], 0.0), 0), tl.sum(tl.where(here, G_low[:, None], 0.0), 0)
        else:
            read_G, read_low = tl.sum(tl.where(here, (G + G_low)[:, None], 0.0), 0), tl.zeros((READS,), tl.float32)
        store_scores(scores, qk * read_decay(G, G_low, read_G, read_low, place, WIDE) * scale, tile, READS)
    m = tl.where(i[:, None] > i[None, :], kk * decay, 0.0)
    negative = m * (-strength * square)[None, :]
    if WIDE:
        solved = substitute(m, negative)
    else:
        high = negative.to(tl.float16)
        low = (negative - high.to(tl.float32)).to(tl.float16)
        e = _diagonal(negative)
        for level in tl.static_range(4, 6):
            narrow = e.to(tl.float16)
            below = tl.where(_under(i, level), tl.dot(narrow, high), 0.0)
            e = tl.dot(below.to(tl.float16), narrow, e.to(tl.float32))
        narrow = e.to(tl.float16)
        rough = tl.dot(narrow, m.to(tl.float16)).to(tl.float16)
        wrong = tl.dot(low, rough, m - rough.to(tl.float32))
        wrong = tl.dot(high, rough, wrong)
        solved = tl.dot(narrow, wrong.to(tl.float16), rough.to(tl.float32))
    solved = solved * length[:, None] * length[None, :]
    if not WIDE:
        up, unit = fitting(tl.maximum(tl.max(tl.max(tl.abs(solved), 1), 0), 2.0**-20))
        tl.store(units + tile, unit)
        if phi.dtype.element_ty == tl.float16:
            solved *= up
    tl.store(phi + at, solved.to(phi.dtype.element_ty))


@triton.jit
def fitting(largest):
    """Powers of two, one the inverse of the other, of which the first takes numbers as large as this to 2^14 .. 2^15, where fp16 ends at 2^16.
    What is no number or infinite comes out so. Below 2^-78 all are taken alike, and Phi below 2^-20: so products of two units are normal."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 49)
    return ((268 - exponent) << 23).to(tl.float32, bitcast=True), ((exponent - 14) << 23).to(tl.float32, bitcast=True)


@triton.jit
def pair_decay(G, G_low, WIDE: tl.constexpr):
    """exp(G_i - G_j) for i >= j, else 0. fp32 inputs need both parts of G, or the decay would be off by 2^-24 |G|, and an exp that is right
    to the last bit but one."""
    i = tl.arange(0, C)
    if WIDE:
        between = (G[:, None] - G[None, :]) + (G_low[:, None] - G_low[None, :])
        return tl.where(i[:, None] >= i[None, :], exp(between), 0.0)
    else:
        between = (G + G_low)[:, None] - (G + G_low)[None, :]
        return tl.exp(tl.where(i[:, None] >= i[None, :], between, float("-inf")))


@triton.jit
def read_decay(G, G_low, read_G, read_low, place, WIDE: tl.constexpr):
    """The decay between write and read, turned: exp(G_place - G_i) for i <= place, else 0."""
    later = tl.arange(0, C)[:, None] <= place[None, :]
    if WIDE:
        between = (read_G[None, :] - G[:, None]) + (read_low[None, :] - G_low[:, None])
        return tl.where(later, exp(between), 0.0)
    else:
        between = (read_G + read_low)[None, :] - (G + G_low)[:, None]
        return tl.exp(tl.where(later, between, float("-inf")))


@triton.jit
def store_scores(base, x, tile, READS: tl.constexpr):
    """Store [64, READS], turned."""
    at = tile * (READS * C) + (tl.arange(0, READS)[None, :] * C + tl.arange(0, C)[:, None])
    tl.store(base + at, x.to(base.dtype.element_ty))


@triton.jit
def _under(i, level: tl.constexpr):
    """The blocks of size 2^level under the diagonal that join two diagonal blocks: odd block of rows, even block of columns to its left."""
    block = i >> level
    left = tl.where(block % 2 == 1, block - 1, -1)
    return left[:, None] == block[None, :]


@triton.jit
def substitute(m, negative):
    """Phi = M + negative Phi, row after row in fp32. Neither joins of blocks nor the inverse times M will do: where keys repeat with beta = 2
    the entries of the inverse alternate, and the norms of 64 and more of what it is multiplied with make two digits of its rounding."""
    i = tl.arange(0, C)
    phi = tl.zeros((C, C), tl.float32)
    for r in tl.range(1, C, num_stages=1):
        here = (i == r)[:, None]
        row = tl.sum(tl.where(here, negative, 0.0), 0)
        phi += tl.where(here, m + tl.sum(row[:, None] * phi, 0)[None, :], 0.0)
    return phi


@triton.jit
def _diagonal(negative):
    """(I + L)^-1 of the four 16 x 16 blocks on the diagonal of L, 0 elsewhere, [64, 64], as small products of four at a time."""
    b = tl.arange(0, 4)
    i = tl.arange(0, 16)
    same = (b[:, None] == b[None, :])[:, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(negative, (4, 16, 4, 16)), 0.0), 2).to(tl.float16)
    e = tl.where((i[:, None] == i[None, :])[None, :, :], 1.0, tl.where(_under(i, 0)[None, :, :], blocks.to(tl.float32), 0.0))
    for level in tl.static_range(1, 4):
        narrow = e.to(tl.float16)
        below = tl.where(_under(i, level)[None, :, :], tl.dot(narrow, blocks), 0.0)
        e = tl.dot(below.to(tl.float16), narrow, e)
    e = tl.where(same, tl.reshape(e.to(tl.float16), (4, 16, 1, 16)), 0.0)
    return tl.reshape(e, (C, C))
