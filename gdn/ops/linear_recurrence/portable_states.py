"""Triton kernels that carry the memory of linear attention from chunk to chunk, either way. Any GPU from sm_80 on.

A program owns BV columns of the memory of one head and walks over a run of chunks: a document, or with segments S consecutive chunks of the
flattened list, wherever documents begin and end. Forward, with x = k and y = v, a chunk does S <- decay S + x^T (w y), w the decay from a
token to the chunk's end; backward, with x = q and y the gradient of o, chunks go from the last to the first and w is the decay from the
chunk's begin to a token. With one decay per channel of x, the tokens come with their decays multiplied in, and w is 1. In float16, whose least number is
6e-8, the decay of the first token is left out of the w of a chunk and multiplied in afterwards: under a strong decay nothing else would be seen of w.

With segments, `states_kernel` first finds what each adds to a memory that enters it and what it leaves of it (SUMMARY), `handover_kernel`
chains these, and the runs start from the results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import int64
from gdn.ops.delta_rule.portable_prepare import GATES, C, load_gate, load_last, load_rows, load_rows_again
from gdn.ops.delta_rule.portable_scan import add_dot, document_bounds, dot, program_place, run_bounds


@triton.jit
def load_block(base, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    """All rows and columns first .. first + BC of a dense [ROWS, COLUMNS] matrix."""
    row = tl.arange(0, BR)[:, None]
    column = (first + tl.arange(0, BC))[None, :]
    if ROWS % BR != 0:
        return tl.load(base + (row * COLUMNS + column), mask=(row < ROWS) & (column < COLUMNS), other=0.0)
    elif COLUMNS % BC != 0:
        return tl.load(base + (row * COLUMNS + column), mask=column < COLUMNS, other=0.0)
    else:
        return tl.load(base + (row * COLUMNS + column))


@triton.jit
def store_block(base, x, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr):
    row = tl.arange(0, BR)[:, None]
    column = (first + tl.arange(0, BC))[None, :]
    tl.store(base + (row * COLUMNS + column), x.to(base.dtype.element_ty), mask=(row < ROWS) & (column < COLUMNS))


@triton.jit
def store_tokens(base, x, start, rows, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store [64, BLOCK] as columns first .. of the tokens of a chunk."""
    i = tl.arange(0, C)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    at = base + start * stride + first + (i * stride + c)
    tl.store(at, x.to(base.dtype.element_ty), mask=(i < rows) & (c + first < WIDTH))


@triton.jit
def load_kept(gates, last, chunk, hv, HV, GROUP: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, CHANNEL: tl.constexpr):
    """The factor of a chunk on what it meets, for each row of the memory, [BK]. Channels decay alike in all heads of a group."""
    i = tl.arange(0, BK)
    if CHANNEL:
        return tl.load(last + (int64(chunk) * (HV // GROUP) + hv // GROUP) * K + i, mask=i < K, other=0.0)
    else:
        return load_last(gates, int64(chunk) * HV + hv) + tl.zeros((BK,), tl.float32)


@triton.jit
def states_kernel(
    x,
    y,
    gates,
    last,
    states,
    edge,
    entering,
    out,
    added,
    carried,
    cu_seqlens,
    chunk_table,
    chunk_offsets,
    T,
    per_row,
    chunks,
    documents,
    S,
    scale,
    x_stride,
    y_stride,
    HV,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    CHANNEL: tl.constexpr,
    BACKWARD: tl.constexpr,
    SUMMARY: tl.constexpr,
    TURNED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The memory that each chunk meets, states [chunks, HV, K, V], and the one at the end of each document, out [documents, HV, K, V], or with
    TURNED [documents, HV, V, K]. Grid [runs * HV * column blocks].

    It starts from edge [documents, HV, K, V] (or 0) where a document begins, from entering [segments, HV, K, V] where a segment does.
    Backwards, begins and ends change places.

    With SUMMARY (grid [(segments - 1) * HV * column blocks], without the last segment of the way): added [segments, HV, K, V] is what the segment hands on when nothing enters it, and
    carried [segments, HV, K] the factor on what enters; both 0 where a document's end keeps it from the next one.
    """
    block, hv, index = program_place((V + BV - 1) // BV, HV)
    if SUMMARY and BACKWARD:
        index += 1
    first = block * BV
    x += hv // GROUP * K
    y += hv * V
    begin, end, d0, d1 = run_bounds(index, chunk_table, chunks, per_row, documents, S, SEGMENTS, PACKED)
    if SUMMARY:
        if BACKWARD:
            if PACKED:
                d0 = tl.load(chunk_table + 2 * begin)
            d1 = d0
        else:
            if PACKED:
                d1 = tl.load(chunk_table + 2 * (end - 1))
            d0 = d1
    for document in range(d0, d1 + 1):
        c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
        low = tl.maximum(begin, c0)
        high = tl.minimum(end, c1)
        slot = (int64(document) * HV + hv) * (K * V)
        state = tl.zeros((BK, BV), tl.float32)
        kept = tl.zeros((BK,), tl.float32) + 1.0
        if BACKWARD:
            cut = high < c1
            leaves = low > c0
            ends = (low < high) & (low == c0)
        else:
            cut = low > c0
            leaves = high < c1
            ends = (low < high) & (high == c1)
        if cut:
            if SEGMENTS and not SUMMARY:
                state = load_block(entering + (int64(index) * HV + hv) * (K * V), first, K, V, BK, BV)
        else:
            if edge is not None:
                state = load_block(edge + slot, first, K, V, BK, BV)
        for step in tl.range(0, high - low, num_stages=STAGES):
            chunk = high - 1 - step if BACKWARD else low + step
            inside = (chunk - c0) * C
            tile = int64(chunk) * HV + hv
            x_rows = load_rows_again(x, token + inside, length - inside, x_stride, 0, K, BK)
            y_rows = load_rows(y, token + inside, length - inside, y_stride, first, V, BV)
            if not SUMMARY:
                store_block(states + tile * (K * V), state, first, K, V, BK, BV)
            SCALED: tl.constexpr = BACKWARD and not CHANNEL and x_rows.dtype == tl.float16
            if not CHANNEL:
                if BACKWARD:
                    weight = load_gate(gates, tile, 1) * scale
                else:
                    weight = load_gate(gates, tile, 3)
                if SCALED:
                    common = tl.load(gates + tile * (GATES * C) + C)
                    weight /= common
                y_rows = (y_rows.to(tl.float32) * weight[:, None]).to(x_rows.dtype)
            keep = load_kept(gates, last, chunk, hv, HV, GROUP, K, BK, CHANNEL)
            if SUMMARY:
                kept *= keep
            if SCALED:
                state = state * keep[:, None] + dot(tl.trans(x_rows), y_rows, WIDE) * common
            else:
                state = add_dot(state * keep[:, None], tl.trans(x_rows), y_rows, WIDE)
        if SUMMARY:
            at = int64(index) * HV + hv
            store_block(added + at * (K * V), tl.where(leaves, state, 0.0), first, K, V, BK, BV)
            if block == 0:
                i = tl.arange(0, BK)
                tl.store(carried + at * K + i, tl.where(cut & leaves, kept, 0.0), mask=i < K)
        else:
            if out is not None:
                if ends | (c0 == c1):
                    if TURNED:
                        i = tl.arange(0, BK)[:, None]
                        c = (first + tl.arange(0, BV))[None, :]
                        tl.store(out + slot + (c * K + i), state, mask=(i < K) & (c < V))
                    else:
                        store_block(out + slot, state, first, K, V, BK, BV)


@triton.jit
def handover_kernel(
    added,
    carried,
    out,
    segments,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    """What enters each segment, out [segments, HV, K, V], from what `states_kernel` found. Grid [HV * column blocks]."""
    block, hv, _ = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    i = tl.arange(0, BK)
    memory = tl.zeros((BK, BV), tl.float32)
    for step in range(segments - 1):
        s = segments - 1 - step if BACKWARD else step
        slot = int64(s) * HV + hv
        kept = tl.load(carried + slot * K + i, mask=i < K, other=0.0)
        memory = memory * kept[:, None] + load_block(added + slot * (K * V), first, K, V, BK, BV)
        store_block(out + (slot - HV if BACKWARD else slot + HV) * (K * V), memory, first, K, V, BK, BV)
