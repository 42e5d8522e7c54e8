"""Triton kernels of linear attention with a decay for each channel: outputs and gradients. Any GPU from sm_80 on.

Letters as in README.md and channels.py: x and y have the channels that decay, a and b the others, and a memory is the decayed sum of y b^T. One
chunk of C = 64 tokens and one head:

    P      pairs, P_ij = scale a_i.b_j for i >= j
    A      scores, A_ij = scale (sum over channels of x_i y_j exp(g_{j+1} + ... + g_i)) for i >= j
    S      memory before the chunk                  dS     gradient of the memory after it

Chunks are halved again and again, as in intervals.py. At a level with halves of 2^level tokens every token has one exponent, from the border in
the middle of its pair of halves up to it, or from after it up to the border. Which g it sums is a matrix of zeros and ones (`between_kernel`),
so sums of g are products of matrices, and so is the way back to the gradient of g, by the transposed matrix. All pairs that borders of a level part are one
product of 64 x 64, masked (`parted`). Nothing is subtracted and no exponent is positive.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import exp, int64
from gdn.ops.delta_rule.portable_prepare import SMALLEST_LOG_DECAY, C, bounded, chunk_rows, load_rows, load_rows_again
from gdn.ops.delta_rule.portable_scan import add_dot, document_bounds, dot, program_place, run_bounds
from gdn.ops.linear_recurrence.portable_states import load_block, store_block, store_tokens

LEVELS = tl.constexpr(6)
"""Halves of 1, 2, 4, ... 32 tokens."""
TAIL = tl.constexpr(6)
"""The sums from after a token to the chunk's end, after those of the levels."""
GAMMA = tl.constexpr(7)
"""The sums from the chunk's begin up to a token."""


@triton.jit
def between_kernel(sums):
    """sums [8, 64, 64], zeros and ones: whether the exponent of token i (row) holds g of token t. Grid [8]; of a program:

    0 to 5: t lies in the half of i at this level, up to i right of a border and after it left of one. 6: t comes after i. 7: t comes up to i.
    """
    level = tl.program_id(0)
    i = tl.arange(0, C)[:, None]
    t = tl.arange(0, C)[None, :]
    right = (((i >> level) & 1) == 1) | (level > LEVELS)
    held = ((i >> level) == (t >> level)) & ((right & (t <= i)) | (~right & (t > i)))
    tl.store(sums + level * (C * C) + (i * C + t), tl.where(held, 1.0, 0.0).to(sums.dtype.element_ty))


@triton.jit
def load_log_decay(g, start, rows, stride, first, X: tl.constexpr, W: tl.constexpr):
    return bounded(load_rows(g, start, rows, stride, first, X, W).to(tl.float32))


@triton.jit
def apart(x, WIDE: tl.constexpr):
    """x as two numbers that products take exactly, or in 16 bits with an error of 2^-17. For fp32 the first is a multiple of 1/256, so that
    its sums are exact."""
    if WIDE:
        high = tl.floor(x * 256.0) * 0.00390625
        return high, x - high
    else:
        high = x.to(tl.bfloat16)
        return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def decay(x, WIDE: tl.constexpr):
    return exp(x) if WIDE else tl.exp(x)


@triton.jit
def load_square(base, tile):
    """A dense matrix of 64 x 64."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return tl.load(base + tile * (C * C) + (i * C + j))


@triton.jit
def decays(held, high, low, WIDE: tl.constexpr):
    """exp of the sums of g that a matrix of `between_kernel` names."""
    return decay(add_dot(dot(held, high, WIDE), held, low, WIDE), WIDE)


@triton.jit
def add_sums(acc, held, x, WIDE: tl.constexpr):
    """The way back: acc with the x of the exponents that hold a g added to it. In 16 bits x is rounded to bfloat16."""
    return add_dot(acc, tl.trans(held), x.to(held.dtype), WIDE)


@triton.jit
def parted(pairs, level):
    """The pairs of tokens, below the diagonal, that a border of this level parts; others are 0."""
    i = tl.arange(0, C)[:, None] >> level
    j = tl.arange(0, C)[None, :] >> level
    return tl.where((i ^ j) == 1, pairs, 0.0).to(pairs.dtype)


@triton.jit
def channels_kernel(
    y,
    x,
    g,
    sums,
    read,
    written,
    last,
    scores,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    scale,
    x_stride,
    y_stride,
    H,
    GROUP: tl.constexpr,
    X: tl.constexpr,
    W: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    WIDE: tl.constexpr,
):
    """What a chunk and a head of g needs of its channels alone; GROUP heads of g share one of x and y. Grid [chunks * H].

    read, written [tokens, H, X]: x from the begin of the chunk, times scale, and y up to the end of the chunk. last [chunks, H, X]: the decay
    over the chunk, of written. scores [chunks, H, 64, 64]: A, EXACT in fp32 without the rounding of tensor cores. Each but x is left out where
    it is None, and read and scores need x.
    """
    h = tl.program_id(0) % H
    chunk = tl.program_id(0) // H
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    tile = int64(chunk) * H + h
    y += h // GROUP * X
    if x is not None:
        x += h // GROUP * X
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    total = tl.zeros((C, C), tl.float32)
    for first in tl.range(0, X, W, num_stages=1):
        log = load_log_decay(g + h * X, start, rows, H * X, first, X, W)
        high, low = apart(log, WIDE)
        y_rows = load_rows(y, start, rows, y_stride, first, X, W)
        wide_y = y_rows.to(tl.float32)
        if written is not None:
            tail = decays(load_square(sums, TAIL), high, low, WIDE)
            store_tokens(written + h * X, wide_y * tail, start, rows, H * X, first, X, W)
            column = first + tl.arange(0, W)
            whole = tl.sum(tl.where(i == 0, tail * decay(log, WIDE), 0.0), 0)
            tl.store(last + tile * X + column, whole, mask=column < X)
        if x is not None:
            x_rows = load_rows(x, start, rows, x_stride, first, X, W)
            wide_x = x_rows.to(tl.float32)
            gamma = decays(load_square(sums, GAMMA), high, low, WIDE)
            store_tokens(read + h * X, wide_x * gamma * scale, start, rows, H * X, first, X, W)
            if scores is not None:
                total += tl.where(i == j, tl.sum(wide_x * wide_y, 1)[:, None], 0.0)
                for level in tl.range(0, LEVELS, num_stages=1):
                    factor = decays(load_square(sums, level), high, low, WIDE)
                    left = (wide_x * factor).to(x_rows.dtype)
                    right = tl.trans((wide_y * factor).to(x_rows.dtype))
                    total += parted(tl.dot(left, right, input_precision="ieee") if EXACT and WIDE else dot(left, right, WIDE), level)
    if scores is not None:
        tl.store(scores + tile * (C * C) + (i * C + j), (tl.where(i >= j, total, 0.0) * scale).to(scores.dtype.element_ty))


@triton.jit
def load_part(base, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """Rows row .. row + BR and columns column .. column + BC of a dense [ROWS, COLUMNS] matrix."""
    r = (row + tl.arange(0, BR))[:, None]
    c = (column + tl.arange(0, BC))[None, :]
    return tl.load(base + (r * COLUMNS + c), mask=(r < ROWS) & (c < COLUMNS), other=0.0)


@triton.jit
def channel_output_kernel(
    read,
    written,
    last,
    scores,
    v,
    o,
    initial,
    entering,
    final,
    cu_seqlens,
    chunk_table,
    chunk_offsets,
    T,
    per_row,
    chunks,
    documents,
    S,
    v_stride,
    H,
    HV,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o and the final memories for decay on the keys. Grid [runs * HV * column blocks]; a program walks over a run with its columns of the
    memory in registers: O = read S + A V, then S <- last S + written^T V.
    """
    block, hv, index = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    h = hv // GROUP
    begin, end, d0, d1 = run_bounds(index, chunk_table, chunks, per_row, documents, S, SEGMENTS, PACKED)
    channel = tl.arange(0, BK)
    for document in range(d0, d1 + 1):
        c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
        low = tl.maximum(begin, c0)
        high = tl.minimum(end, c1)
        slot = (int64(document) * HV + hv) * (K * V)
        state = tl.zeros((BK, BV), tl.float32)
        if low > c0:
            if SEGMENTS:
                state = load_block(entering + (int64(index) * HV + hv) * (K * V), first, K, V, BK, BV)
        else:
            if initial is not None:
                state = load_block(initial + slot, first, K, V, BK, BV)
        for chunk in tl.range(low, high, num_stages=STAGES):
            inside = (chunk - c0) * C
            start = token + inside
            rows = length - inside
            tile = int64(chunk) * H + h
            reading = load_rows_again(read + h * K, start, rows, H * K, 0, K, BK)
            writing = load_rows_again(written + h * K, start, rows, H * K, 0, K, BK)
            v_rows = load_rows(v + hv * V, start, rows, v_stride, first, V, BV)
            out = dot(reading, state.to(reading.dtype), WIDE)
            out = add_dot(out, load_square(scores, tile), v_rows, WIDE)
            store_tokens(o + hv * V, out, start, rows, HV * V, first, V, BV)
            keep = tl.load(last + tile * K + channel, mask=channel < K, other=0.0)
            state = add_dot(state * keep[:, None], tl.trans(writing), v_rows, WIDE)
        if (low < high and high == c1) or c0 == c1:
            store_block(final + slot, state, first, K, V, BK, BV)


@triton.jit
def other_gradient_kernel(
    decayed,
    scores,
    other,
    states,
    gradient,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    stride,
    H,
    HV,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    TURNED: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Some columns of the gradients of a or b of one chunk and head: da = read S + A b, or TURNED db = written dS + A^T a.
    Grid [chunks * HV * column blocks]."""
    block, hv, chunk = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    h = hv // GROUP
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    left = load_rows(decayed + h * K, start, rows, H * K, 0, K, BK)
    state = load_block(states + (int64(chunk) * HV + hv) * (K * V), first, K, V, BK, BV)
    other_rows = load_rows(other + hv * V, start, rows, stride, first, V, BV)
    A = load_square(scores, int64(chunk) * H + h)
    total = dot(left, state, WIDE)
    total = add_dot(total, tl.trans(A) if TURNED else A, other_rows, WIDE)
    store_tokens(gradient + hv * V, total, start, rows, HV * V, first, V, BV)


@triton.jit
def channel_read_kernel(
    y,
    g,
    sums,
    a,
    b,
    states,
    o,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    scale,
    y_stride,
    a_stride,
    b_stride,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o for decay on the values, W channels of one chunk and head: scale gamma a S^T + (P read with decay from y). Grid [chunks * H * channel blocks]."""
    block, h, chunk = program_place((K + W - 1) // W, H)
    first = block * W
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    pairs = tl.zeros((C, C), tl.float32)
    total = tl.zeros((C, W), tl.float32)
    for column in tl.range(0, V, BV, num_stages=STAGES):
        a_rows = load_rows(a + h * V, start, rows, a_stride, column, V, BV)
        b_rows = load_rows(b + h * V, start, rows, b_stride, column, V, BV)
        state = load_part(states + (int64(chunk) * H + h) * (K * V), first, column, K, V, W, BV)
        pairs = add_dot(pairs, a_rows, tl.trans(b_rows), WIDE)
        total = add_dot(total, a_rows, tl.trans(state), WIDE)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    pairs = tl.where(i >= j, pairs * scale, 0.0)
    high, low = apart(load_log_decay(g + h * K, start, rows, H * K, first, K, W), WIDE)
    y_rows = load_rows(y + h * K, start, rows, y_stride, first, K, W)
    total *= decays(load_square(sums, GAMMA), high, low, WIDE) * scale
    total += tl.sum(tl.where(i == j, pairs, 0.0), 1)[:, None] * y_rows.to(tl.float32)
    narrow = pairs.to(y_rows.dtype)
    for level in tl.range(0, LEVELS, num_stages=1):
        factor = decays(load_square(sums, level), high, low, WIDE)
        brought = (y_rows.to(tl.float32) * factor).to(narrow.dtype)
        total += dot(parted(narrow, level), brought, WIDE) * factor
    store_tokens(o + h * K, total, start, rows, H * K, first, K, W)


@triton.jit
def channel_gradient_kernel(
    x,
    y,
    g,
    sums,
    a,
    b,
    states,
    d_states,
    dx,
    dy,
    dg,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    scale,
    x_stride,
    y_stride,
    a_stride,
    b_stride,
    H,
    HV,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    W: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx, dy and dg of W channels of one chunk and head. Grid [chunks * H * channel blocks].

        dx = scale gamma a S^T + (P read with decay from y)         dy = tail b dS^T + (the same from x, from i to j)

    The gradient of an exponent is x dx, or y dy, of what passes through it; log decays get those of the exponents that they stand in. Pairs of
    a token with itself have no exponent.
    """
    block, h, chunk = program_place((K + W - 1) // W, H)
    first = block * W
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    BLOCKS: tl.constexpr = (V + BV - 1) // BV
    pairs = tl.zeros((C, C), tl.float32)
    total_x = tl.zeros((C, W), tl.float32)
    total_y = tl.zeros((C, W), tl.float32)
    overlap = tl.zeros((W,), tl.float32)
    for step in tl.range(0, GROUP * BLOCKS, num_stages=STAGES):
        hv = h * GROUP + step // BLOCKS
        column = step % BLOCKS * BV
        memory = (int64(chunk) * HV + hv) * (K * V)
        a_rows = load_rows(a + hv * V, start, rows, a_stride, column, V, BV)
        b_rows = load_rows(b + hv * V, start, rows, b_stride, column, V, BV)
        state = load_part(states + memory, first, column, K, V, W, BV)
        d_state = load_part(d_states + memory, first, column, K, V, W, BV)
        pairs = add_dot(pairs, a_rows, tl.trans(b_rows), WIDE)
        total_x = add_dot(total_x, a_rows, tl.trans(state), WIDE)
        total_y = add_dot(total_y, b_rows, tl.trans(d_state), WIDE)
        overlap += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    pairs = tl.where(i >= j, pairs * scale, 0.0)
    itself = tl.sum(tl.where(i == j, pairs, 0.0), 1)[:, None]
    log = load_log_decay(g + h * K, start, rows, H * K, first, K, W)
    high, low = apart(log, WIDE)
    x_rows = load_rows(x + h * K, start, rows, x_stride, first, K, W)
    y_rows = load_rows(y + h * K, start, rows, y_stride, first, K, W)
    held = load_square(sums, TAIL)
    tail = decays(held, high, low, WIDE)
    whole = tl.sum(tl.where(i == 0, tail * decay(log, WIDE), 0.0), 0)
    total_g = tl.zeros((C, W), tl.float32) + (whole * overlap)[None, :]
    total_y *= tail
    total_g = add_sums(total_g, held, total_y * y_rows.to(tl.float32), WIDE)
    held = load_square(sums, GAMMA)
    total_x *= decays(held, high, low, WIDE) * scale
    total_g = add_sums(total_g, held, total_x * x_rows.to(tl.float32), WIDE)
    narrow = pairs.to(x_rows.dtype)
    total_x += itself * y_rows.to(tl.float32)
    total_x, total_g = _add_pairs(total_x, total_g, narrow, x_rows, y_rows, sums, high, low, WIDE)
    if dx is not None:
        store_tokens(dx + h * K, total_x, start, rows, H * K, first, K, W)
    total_y += itself * x_rows.to(tl.float32)
    total_y, total_g = _add_pairs(total_y, total_g, tl.trans(narrow), y_rows, x_rows, sums, high, low, WIDE)
    store_tokens(dy + h * K, total_y, start, rows, H * K, first, K, W)
    kept = load_rows(g + h * K, start, rows, H * K, first, K, W).to(tl.float32) >= SMALLEST_LOG_DECAY
    store_tokens(dg + h * K, tl.where(kept, total_g, 0.0), start, rows, H * K, first, K, W)


@triton.jit
def _add_pairs(total, total_g, pairs, mine, other, sums, high, low, WIDE: tl.constexpr):
    """With the gradients of tokens on one side of the borders, the rows of `pairs`, and of their exponents added."""
    for level in tl.range(0, LEVELS, num_stages=1):
        held = load_square(sums, level)
        factor = decays(held, high, low, WIDE)
        brought = (other.to(tl.float32) * factor).to(pairs.dtype)
        found = dot(parted(pairs, level), brought, WIDE) * factor
        total += found
        total_g = add_sums(total_g, held, found * mine.to(tl.float32), WIDE)
    return total, total_g
