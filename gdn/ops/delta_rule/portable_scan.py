"""Triton kernels that carry the state from chunk to chunk, forward and backward. Any GPU from sm_80 on.

A program owns BV columns of the state of one value head and walks over a run of chunks. It holds the state transposed, [BV, K] fp32 in
registers, so that the state and every product made from it is the first operand of the next product and never passes through memory.

Runs: without segments, one document each; with segments, S consecutive chunks of the flattened chunk list, wherever documents begin and
end. What crosses from one segment into the next is handed over: `summary_kernel` finds for each segment the affine map S -> R S + N of the
part of it that matters to the next one, `handover_kernel` chains the maps, and the runs start from the results. The gradient goes the other
way through the same R, transposed. Chunks whose product of maps has norm below exp(FORGOTTEN) are left out of a summary: the bound is exact
for any key (`norms` of portable_prepare.py), and 2e-9 of a state is far below its own rounding.

Letters as in portable_prepare.py. One chunk, with Z = v - gamma K S:

    U = beta (Z - Phi (beta Z))       what is written        O = scale gamma Q S + A U        S <- gamma_last S + K^T (D U)

and backward, from the gradient dS of the state after the chunk, with X = A^T dO + D (K dS):

    dU = X - Phi^T (beta X)           dv = beta dU           dS <- gamma_last dS + Q^T (scale gamma dO) - K^T (gamma beta dU)
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import int64
from gdn.ops.delta_rule.portable_prepare import C, chunk_reads, divisor, fitting, load_gate, load_last, load_read_gate, load_rows_again

FORGOTTEN = tl.constexpr(-20.0)


@triton.jit
def program_place(blocks, HV):
    """Block of columns, value head and run of a program: blocks vary fastest, then heads. One axis, since the others end at 65535."""
    program = tl.program_id(0)
    head = program // blocks
    return program % blocks, head % HV, head // HV


@triton.jit
def run_bounds(index, chunk_table, chunks, per_row, documents, S, SEGMENTS: tl.constexpr, PACKED: tl.constexpr):
    """Chunks [begin, end) of a run and the documents [first, last] that have a chunk in it or are empty and lie around it."""
    if SEGMENTS:
        begin = index * S
        end = tl.minimum(begin + S, chunks)
        if PACKED:
            first = tl.load(chunk_table + 2 * tl.maximum(begin - 1, 0))
            last = tl.load(chunk_table + 2 * (end - 1))
            first = tl.where(index == 0, 0, first)
            last = tl.where(end == chunks, documents - 1, last)
        else:
            first = begin // per_row
            last = (end - 1) // per_row
    else:
        begin = 0
        end = chunks
        first = index
        last = index
    return begin, end, first, last


@triton.jit
def slab_bounds(index, slab, width, chunk_table, chunks, per_row, documents, S, SEGMENTS: tl.constexpr, PACKED: tl.constexpr):
    """Like run_bounds, for one slab of a run, `width` chunks; then the end of the run and the place of chunk 0 in the buffers of the slab."""
    begin, end, first, last = run_bounds(index, chunk_table, chunks, per_row, documents, S, SEGMENTS, PACKED)
    offset = 0
    if SEGMENTS or not PACKED:
        if not SEGMENTS:
            begin = index * per_row
            end = begin + per_row
        run_end = end
        begin = tl.minimum(begin + slab * width, run_end)
        end = tl.minimum(begin + width, run_end)
        offset = index * width - begin
        if SEGMENTS:
            if PACKED:
                first = tl.load(chunk_table + 2 * tl.maximum(begin - 1, 0))
                last = tl.load(chunk_table + 2 * (tl.maximum(end, 1) - 1))
                first = tl.where(begin == 0, 0, first)
                last = tl.where(end == chunks, documents - 1, last)
            else:
                first = begin // per_row
                last = (end - 1) // per_row
            last = tl.where(begin < end, last, first - 1)
    else:
        run_end = end
    return begin, end, first, last, run_end, offset


@triton.jit
def document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED: tl.constexpr):
    """A document's chunks [c0, c1) in the flattened list, its first token (int64) and its length."""
    if PACKED:
        c0 = tl.load(chunk_offsets + document)
        c1 = tl.load(chunk_offsets + document + 1)
        token = int64(tl.load(cu_seqlens + document))
        length = tl.load(cu_seqlens + document + 1) - token.to(tl.int32)
    else:
        c0 = document * per_row
        c1 = c0 + per_row
        token = int64(document) * T
        length = T
    return c0, c1, token, length


@triton.jit
def load_state(base, first, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """Columns first .. first + BV of a [K, V] fp32 state, transposed: [BV, BK]."""
    at = tl.arange(0, BK)[:, None]
    columns = (first + tl.arange(0, BV))[None, :]
    return tl.trans(tl.load(base + at * V + columns, mask=(at < K) & (columns < V), other=0.0))


@triton.jit
def store_state(base, state, first, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    at = tl.arange(0, BK)[:, None]
    columns = (first + tl.arange(0, BV))[None, :]
    tl.store(base + at * V + columns, tl.trans(state), mask=(at < K) & (columns < V))


@triton.jit
def load_tile(base, tile, first, V: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr):
    """Rows first .. first + BV of a [V, WIDTH] tile of a chunk and value head."""
    row = (first + tl.arange(0, BV))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    return tl.load(base + tile * (V * WIDTH) + (row * WIDTH + column), mask=(row < V) & (column < WIDTH), other=0.0)


@triton.jit
def store_tile(base, x, tile, first, V: tl.constexpr, WIDTH: tl.constexpr, BV: tl.constexpr, BLOCK: tl.constexpr):
    row = (first + tl.arange(0, BV))[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    at = base + tile * (V * WIDTH) + (row * WIDTH + column)
    tl.store(at, x.to(base.dtype.element_ty), mask=(row < V) & (column < WIDTH))


@triton.jit
def store_rows(base, x, start, rows, stride, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr = C):
    """Store [BLOCK, ROWS], transposed, as columns first .. of the rows of a chunk."""
    i = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    at = base + start * stride + first + (i * stride + c)
    tl.store(at, tl.trans(x).to(base.dtype.element_ty), mask=(i < rows) & (c + first < WIDTH))


@triton.jit
def load_square(base, tile, ROWS: tl.constexpr = C):
    """A [64, 64] tile, or one of fewer rows."""
    i = tl.arange(0, ROWS)
    j = tl.arange(0, C)
    return tl.load(base + tile * (ROWS * C) + (i[:, None] * C + j[None, :]))


@triton.jit
def dot(x, y, WIDE: tl.constexpr):
    return tl.dot(x, y, input_precision="tf32x3" if WIDE else "tf32")


@triton.jit
def add_dot(acc, x, y, WIDE: tl.constexpr):
    return tl.dot(x, y, acc, input_precision="tf32x3" if WIDE else "tf32")


@triton.jit
def exact_dot(x, y, WIDE: tl.constexpr):
    """A product whose sums are rounded to nearest in fp32. Tensor cores cut theirs, so that all errors have the sign of the sum; where keys repeat,
    little of X is left in `X - Phi^T beta X`, and all of its error."""
    return tl.dot(x, y, input_precision="ieee" if WIDE else "tf32")


@triton.jit
def minus_solved(acc, x, phi, units, tile, WIDE: tl.constexpr, BACKWARD: tl.constexpr = False):
    """acc - x [BV, 64] Phi, or its transpose. Phi in fp16 is kept in units of a power of two of the chunk, and each row of x is taken in
    units of its own: so all numbers fit fp16, whose products are eight times as exact as those of bfloat16. Where keys repeat with beta near
    2, this rounding would be most of the error of all results. A row is one column of values over 64 tokens: less than 2^-29 of its largest
    loses digits, less than 2^-40 all. The product is summed into the registers of acc, which a thread is short of;
    with keys wider than 128 so short that units made `states_kernel` take 1269 us for 709: there Phi of bfloat16 inputs is bfloat16.
    In fp32 the sums of the backward's product are rounded to nearest (`exact_dot`); the forward would gain next to nothing."""
    if WIDE:
        return acc - (exact_dot(x, phi, WIDE) if BACKWARD else dot(x, phi, WIDE))
    elif phi.dtype == tl.bfloat16:
        return tl.dot((-x).to(tl.bfloat16), phi, acc)
    else:
        up, unit = fitting(tl.max(tl.maximum(tl.abs(x), tl.abs(acc)), 1))
        size = tl.load(units + tile)
        inverse = ((254 << 23) - size.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
        return tl.dot((x * -up[:, None]).to(tl.float16), phi, acc * (up * inverse)[:, None]) * (unit * size)[:, None]


@triton.jit
def turned_less(rows, x, PRODUCT: tl.constexpr, SUMMED: tl.constexpr):
    """rows^T - x in fp32. As a product with the identity, which is exact, rows^T lies as the results of products do: the rows go ahead of
    time from global to shared memory and from there into the product, instead of through registers and back to be transposed. Not for
    8 warps and less than 128 columns (notes/triton_pipelines.md), so not for wide keys with these. SUMMED onto -x, where that takes less
    registers."""
    if PRODUCT:
        i = tl.arange(0, C)
        one = tl.where(i[:, None] == i[None, :], 1.0, 0.0).to(rows.dtype)
        if SUMMED:
            return tl.dot(tl.trans(rows), one, -x)
        else:
            return tl.dot(tl.trans(rows), one) - x
    else:
        return tl.trans(rows).to(tl.float32) - x


@triton.jit
def output_kernel(
    q,
    k,
    v,
    phi,
    units,
    scores,
    gates,
    o,
    initial,
    entering,
    midway,
    final,
    cu_seqlens,
    chunk_table,
    chunk_offsets,
    T,
    per_row,
    chunks,
    documents,
    S,
    width,
    scale,
    q_stride,
    k_stride,
    v_stride,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    MIDWAY: tl.constexpr,
    WIDE: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o and the final states; with MIDWAY also midway [slabs - 1, runs, HV, K, V], the states inside a run where a slab of the backward
    begins. Grid [runs * HV * value blocks].

    O = gamma scale Q S + A (beta V');  S <- gamma_last S + K^T (D beta V').
    """
    block, hv, index = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    h = hv // (HV // H)
    begin, end, d0, d1 = run_bounds(index, chunk_table, chunks, per_row, documents, S, SEGMENTS, PACKED)
    for document in range(d0, d1 + 1):
        c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
        low = tl.maximum(begin, c0)
        high = tl.minimum(end, c1)
        slot = int64(document) * HV + hv
        state = tl.zeros((BV, BK), tl.float32)
        if low > c0:
            if SEGMENTS:
                state = load_state(entering + (int64(index) * HV + hv) * (K * V), first, K, V, BK, BV)
        else:
            if INITIAL:
                state = load_state(initial + slot * (K * V), first, K, V, BK, BV)
        run = begin if SEGMENTS else c0
        parts = (high - 1 - run) // width if MIDWAY else 0
        for part in range((low - run) // width if MIDWAY else 0, parts + 1):  # stores in the loop over chunks would take its registers
            part_low = low
            part_high = high
            if MIDWAY:
                part_low = tl.maximum(low, run + part * width)
                part_high = tl.minimum(high, run + (part + 1) * width)
                if part_low > low:
                    runs = (chunks + S - 1) // S if SEGMENTS else documents
                    store_state(midway + (int64((part - 1) * runs + index) * HV + hv) * (K * V), state, first, K, V, BK, BV)
            for chunk in tl.range(part_low, part_high, num_stages=STAGES):
                inside = (chunk - c0) * C
                start = token + inside
                rows = length - inside
                tile = int64(chunk) * HV + hv
                v_rows = load_rows_again(v + hv * V, start, rows, v_stride, first, V, BV)
                k_rows = load_rows_again(k + h * K, start, rows, k_stride, 0, K, BK)
                narrow = state.to(k_rows.dtype)
                recalled = dot(narrow, tl.trans(k_rows), WIDE) * load_gate(gates, tile, 1)[None, :]
                beta = load_gate(gates, tile, 2)[None, :]
                z = turned_less(v_rows, recalled, not WIDE and (BV >= 128 or BK <= 128), BK <= 128)
                u = minus_solved(z, z * beta, tl.trans(load_square(phi, tile)), units, tile, WIDE) * beta
                first_read, reads = chunk_reads(start, rows, WRITES)
                q_rows = load_rows_again(q + h * K, first_read, reads, q_stride, 0, K, BK, READS)
                out_scale = scale
                if BK > 128:  # rounded once more, as halves to be another number: kept, it takes registers that are needed in between
                    narrow = (state * 0.5).to(k_rows.dtype)
                    out_scale = scale * 2.0
                gamma = load_read_gate(gates, tile, start, rows, 1, WRITES, READS)
                out = dot(narrow, tl.trans(q_rows), WIDE) * (gamma * out_scale)[None, :]
                out = add_dot(out, u.to(k_rows.dtype), tl.trans(load_square(scores, tile, READS)), WIDE)
                u *= load_gate(gates, tile, 3)[None, :]
                state = add_dot(state * load_last(gates, tile), u.to(k_rows.dtype), k_rows, WIDE)
                store_rows(o + hv * V, out, first_read, reads, HV * V, first, V, BV, READS)
        if (low < high and high == c1) or (c0 == c1 and low == c0):  # chunks beyond the end may bring an empty last document up again
            store_state(final + slot * (K * V), state, first, K, V, BK, BV)


@triton.jit(do_not_specialize=["slab"])
def states_kernel(
    k,
    v,
    phi,
    units,
    gates,
    states,
    errors,
    initial,
    entering,
    midway,
    cu_seqlens,
    chunk_table,
    chunk_offsets,
    T,
    per_row,
    chunks,
    documents,
    S,
    width,
    slab,
    k_stride,
    v_stride,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """For the backward: the state before each chunk of a slab, states [slots, HV, V, K], and the errors U / beta,
    [slots, HV, V, 64]. Grid [runs * HV * value blocks]."""
    block, hv, index = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    h = hv // (HV // H)
    begin, end, d0, d1, _, offset = slab_bounds(index, slab, width, chunk_table, chunks, per_row, documents, S, SEGMENTS, PACKED)
    for document in range(d0, d1 + 1):
        c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
        low = tl.maximum(begin, c0)
        high = tl.minimum(end, c1)
        state = tl.zeros((BV, BK), tl.float32)
        if low > c0:
            if slab > 0:
                runs = (chunks + S - 1) // S if SEGMENTS else documents
                state = load_state(midway + (int64((slab - 1) * runs + index) * HV + hv) * (K * V), first, K, V, BK, BV)
            else:
                if SEGMENTS:
                    state = load_state(entering + (int64(index) * HV + hv) * (K * V), first, K, V, BK, BV)
        else:
            if INITIAL:
                state = load_state(initial + (int64(document) * HV + hv) * (K * V), first, K, V, BK, BV)
        for chunk in tl.range(low, high, num_stages=STAGES):
            inside = (chunk - c0) * C
            tile = int64(chunk) * HV + hv
            slot = int64(chunk + offset) * HV + hv
            v_rows = load_rows_again(v + hv * V, token + inside, length - inside, v_stride, first, V, BV)
            k_rows = load_rows_again(k + h * K, token + inside, length - inside, k_stride, 0, K, BK)
            narrow = state.to(k_rows.dtype)
            store_tile(states, narrow, slot, first, V, K, BV, BK)
            recalled = dot(narrow, tl.trans(k_rows), WIDE) * load_gate(gates, tile, 1)[None, :]
            z = turned_less(v_rows, recalled, not WIDE and (BV >= 128 or BK < 128), False)  # else two programs would not fit
            beta = load_gate(gates, tile, 2)[None, :]
            error = minus_solved(z, z * beta, tl.trans(load_square(phi, tile)), units, tile, WIDE)
            store_tile(errors, error, slot, first, V, C, BV, C)
            u = error * beta * load_gate(gates, tile, 3)[None, :]
            state = add_dot(state * load_last(gates, tile), u.to(k_rows.dtype), k_rows, WIDE)


@triton.jit
def summary_kernel(
    k,
    v,
    phi,
    units,
    gates,
    norms,
    initial,
    added,
    carried,
    crosses,
    cu_seqlens,
    chunk_table,
    chunk_offsets,
    T,
    per_row,
    chunks,
    S,
    k_stride,
    v_stride,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What a segment hands to the next: the state R S + N at its end. Grid [(segments - 1) * HV * (value blocks + key blocks)].

    added [segments, HV, K, V] is N, carried [segments, HV, K, K] is R, crosses [segments, HV] whether R is needed: the whole segment lies
    inside one document and does not forget what came before. R is the state that grows from the identity with values 0. For inputs of 16
    bits carried [segments, HV, 2, K, K] is R in two parts in bfloat16, R rounded and the rest, whose sum has 16 bits.
    Segments at whose end a document ends write crosses alone.
    """
    VALUE_BLOCKS: tl.constexpr = (V + BV - 1) // BV
    block, hv, index = program_place(VALUE_BLOCKS + (K + BV - 1) // BV, HV)
    h = hv // (HV // H)
    begin = index * S
    end = begin + S
    if PACKED:
        document = tl.load(chunk_table + 2 * (end - 1))
    else:
        document = (end - 1) // per_row
    c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
    low = tl.maximum(begin, c0)
    place = begin + tl.arange(0, BS)
    valid = (place >= low) & (place < end)
    norm = tl.load(norms + place * HV + hv, mask=valid, other=0.0)
    after = tl.cumsum(norm, 0, reverse=True)
    start = tl.min(tl.where(valid & ~(after - norm < FORGOTTEN), place, end - 1), 0)
    cross = (start == begin) & (begin > c0) & ~(tl.sum(norm, 0) < FORGOTTEN) & (c1 > end)
    slot = int64(index) * HV + hv
    if block == 0:
        tl.store(crosses + slot, cross.to(tl.int32))
    identity = block >= VALUE_BLOCKS
    if (c1 > end) & (cross | (block < VALUE_BLOCKS)):
        first = tl.where(identity, block - VALUE_BLOCKS, block) * BV
        state = tl.zeros((BV, BK), tl.float32)
        if identity:
            state += tl.where((first + tl.arange(0, BV))[:, None] == tl.arange(0, BK)[None, :], 1.0, 0.0)
        if INITIAL:
            if (start == c0) & (block < VALUE_BLOCKS):
                state = load_state(initial + (int64(document) * HV + hv) * (K * V), first, K, V, BK, BV)
        for chunk in tl.range(start, end, num_stages=STAGES):
            inside = (chunk - c0) * C
            tile = int64(chunk) * HV + hv
            v_rows = load_rows_again(v + hv * V, token + inside, length - inside, v_stride, tl.where(identity, 0, first), V, BV)
            k_rows = load_rows_again(k + h * K, token + inside, length - inside, k_stride, 0, K, BK)
            recalled = dot(state.to(k_rows.dtype), tl.trans(k_rows), WIDE) * load_gate(gates, tile, 1)[None, :]
            beta = load_gate(gates, tile, 2)[None, :]
            z = tl.where(identity, -recalled, turned_less(v_rows, recalled, not WIDE and BK <= 128, True))
            u = minus_solved(z, z * beta, tl.trans(load_square(phi, tile)), units, tile, WIDE) * beta
            u *= load_gate(gates, tile, 3)[None, :]
            state = add_dot(state * load_last(gates, tile), u.to(k_rows.dtype), k_rows, WIDE)
        if identity:
            if WIDE:
                store_state(carried + slot * (K * K), state, first, K, K, BK, BV)
            else:
                high = state.to(tl.bfloat16)
                store_state(carried + slot * (2 * K * K), high, first, K, K, BK, BV)
                store_state(carried + slot * (2 * K * K) + K * K, (state - high.to(tl.float32)).to(tl.bfloat16), first, K, K, BK, BV)
        else:
            store_state(added + slot * (K * V), state, first, K, V, BK, BV)


@triton.jit
def handover_kernel(
    added,
    carried,
    crosses,
    out,
    segments,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    BACKWARD: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Chain the maps of the segments. Grid [HV * value blocks].

    Forward, out[s + 1] = R_s out[s] + N_s; backward, out[s - 1] = R_s^T out[s] + N_s. R_s is 0 where crosses[s] is.
    Keys beyond 128 go in two halves, so that R fits shared memory. What crosses is read before the loop: a load in it that says whether
    to load R would keep the pipeline from loading R ahead. Where nothing crosses, N may be unwritten memory: it goes no further.
    """
    block, hv, _ = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    HALVES: tl.constexpr = 2 if BK > 128 else 1
    B: tl.constexpr = BK // HALVES
    x = tl.zeros((B, BV), tl.float32)
    y = tl.zeros((B, BV), tl.float32)
    place = tl.arange(0, BS)
    crossing = tl.load(crosses + place * HV + hv, mask=place < segments - 1, other=0)
    for step in tl.range(0, segments - 1, num_stages=STAGES):
        s = segments - 1 - step if BACKWARD else step
        slot = int64(s) * HV + hv
        cross = tl.sum(tl.where(place == s, crossing, 0), 0) != 0
        target = out + (slot - HV if BACKWARD else slot + HV) * (K * V)
        x = tl.where(cross, x, 0.0)
        y = tl.where(cross, y, 0.0)
        n0 = _load_part(added + slot * (K * V), 0, first, K, V, B, BV)
        if HALVES == 2:
            n0 = _add_map(n0, carried, slot, 0, B, y, cross, K, B, BACKWARD, WIDE)
            n1 = _load_part(added + slot * (K * V), B, first, K, V, B, BV)
            n1 = _add_map(n1, carried, slot, B, 0, x, cross, K, B, BACKWARD, WIDE)
            y = _add_map(n1, carried, slot, B, B, y, cross, K, B, BACKWARD, WIDE)
            _store_part(target, y, B, first, K, V, B, BV)
        x = _add_map(n0, carried, slot, 0, 0, x, cross, K, B, BACKWARD, WIDE)
        _store_part(target, x, 0, first, K, V, B, BV)


@triton.jit
def _add_map(acc, carried, slot, row, column, x, wanted, K: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr, WIDE: tl.constexpr):
    """acc + R x for a block of R. In two parts R goes from shared memory into the products as it is, and x alone is taken apart."""
    if WIDE:
        return tl.dot(_load_map(carried + slot * (K * K), row, column, wanted, K, B, TRANSPOSED), x, acc, input_precision="tf32x3")
    else:
        high = _load_map(carried + slot * (2 * K * K), row, column, wanted, K, B, TRANSPOSED)
        low = _load_map(carried + slot * (2 * K * K) + K * K, row, column, wanted, K, B, TRANSPOSED)
        x_high = x.to(tl.bfloat16)
        acc = tl.dot(low, x_high, acc)
        acc = tl.dot(high, (x - x_high.to(tl.float32)).to(tl.bfloat16), acc)
        return tl.dot(high, x_high, acc)


@triton.jit
def _load_map(base, row, column, wanted, K: tl.constexpr, B: tl.constexpr, TRANSPOSED: tl.constexpr):
    i = (row + tl.arange(0, B))[:, None]
    j = (column + tl.arange(0, B))[None, :]
    at = j * K + i if TRANSPOSED else i * K + j
    return tl.load(base + at, mask=(i < K) & (j < K) & wanted, other=0.0)


@triton.jit
def _load_part(base, row, first, K: tl.constexpr, V: tl.constexpr, B: tl.constexpr, BV: tl.constexpr):
    i = (row + tl.arange(0, B))[:, None]
    j = (first + tl.arange(0, BV))[None, :]
    return tl.load(base + i * V + j, mask=(i < K) & (j < V), other=0.0)


@triton.jit
def _store_part(base, x, row, first, K: tl.constexpr, V: tl.constexpr, B: tl.constexpr, BV: tl.constexpr):
    i = (row + tl.arange(0, B))[:, None]
    j = (first + tl.arange(0, BV))[None, :]
    tl.store(base + i * V + j, x, mask=(i < K) & (j < V))


@triton.jit(do_not_specialize=["slab"])
def backward_kernel(
    q,
    k,
    phi,
    units,
    scores,
    gates,
    do,
    d_states,
    dv,
    d_final,
    leaving,
    between,
    d_initial,
    cu_seqlens,
    chunk_table,
    chunk_offsets,
    T,
    per_row,
    chunks,
    documents,
    S,
    width,
    slab,
    scale,
    q_stride,
    k_stride,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    SEGMENTS: tl.constexpr,
    PACKED: tl.constexpr,
    FINAL: tl.constexpr,
    INITIAL: tl.constexpr,
    WIDE: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of the state after each chunk of a slab, d_states [slots, HV, V, K], dv = beta dU (dU where `divisor` is 1), and d_initial.
    between [runs, HV, K, V]: the gradient of the state between this slab and the next, afterwards that between the one before and this.
    Grid [runs * HV * value blocks]."""
    block, hv, index = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    h = hv // (HV // H)
    begin, end, d0, d1, run_end, offset = slab_bounds(index, slab, width, chunk_table, chunks, per_row, documents, S, SEGMENTS, PACKED)
    at_run = (int64(index) * HV + hv) * (K * V)
    for back in range(d1 - d0 + 1):
        document = d1 - back  # the last reads what is between slabs, then the first writes it
        c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
        low = tl.maximum(begin, c0)
        high = tl.minimum(end, c1)
        slot = int64(document) * HV + hv
        state = tl.zeros((BV, BK), tl.float32)
        if high < c1:
            if end < run_end:
                state = load_state(between + at_run, first, K, V, BK, BV)
            else:
                if SEGMENTS:
                    state = load_state(leaving + at_run, first, K, V, BK, BV)
        else:
            if FINAL:
                state = load_state(d_final + slot * (K * V), first, K, V, BK, BV)
        for step in tl.range(0, high - low, num_stages=STAGES):
            chunk = high - 1 - step
            inside = (chunk - c0) * C
            start = token + inside
            rows = length - inside
            tile = int64(chunk) * HV + hv
            k_rows = load_rows_again(k + h * K, start, rows, k_stride, 0, K, BK)
            narrow = state.to(k_rows.dtype)
            store_tile(d_states, narrow, int64(chunk + offset) * HV + hv, first, V, K, BV, BK)
            x = dot(narrow, tl.trans(k_rows), WIDE) * load_gate(gates, tile, 3)[None, :]
            first_read, reads = chunk_reads(start, rows, WRITES)
            do_columns = tl.trans(load_rows_again(do + hv * V, first_read, reads, HV * V, first, V, BV, READS))
            x = add_dot(x, do_columns, load_square(scores, tile, READS), WIDE)
            beta = load_gate(gates, tile, 2)[None, :]
            x = minus_solved(x, x * beta, load_square(phi, tile), units, tile, WIDE, BACKWARD=True)
            store_rows(dv + hv * V, x * divisor(beta, dv.dtype.element_ty), start, rows, HV * V, first, V, BV)
            gamma = load_gate(gates, tile, 1)[None, :]
            q_rows = load_rows_again(q + h * K, first_read, reads, q_stride, 0, K, BK, READS)
            x *= gamma * -beta
            if WRITES > 1:
                gamma = load_read_gate(gates, tile, start, rows, 1, WRITES, READS)[None, :]
            state = add_dot(state * load_last(gates, tile), (do_columns.to(tl.float32) * (gamma * scale)).to(k_rows.dtype), q_rows, WIDE)
            state = add_dot(state, x.to(k_rows.dtype), k_rows, WIDE)
        if INITIAL:
            if (low < high and low == c0) or c0 == c1:
                store_state(d_initial + slot * (K * V), state, first, K, V, BK, BV)
        if (slab > 0) & (low < high) & (low > c0):
            store_state(between + at_run, state, first, K, V, BK, BV)


@triton.jit
def backward_summary_kernel(
    q,
    k,
    phi,
    units,
    scores,
    gates,
    norms,
    do,
    d_final,
    added,
    cu_seqlens,
    chunk_table,
    chunk_offsets,
    T,
    per_row,
    chunks,
    S,
    scale,
    q_stride,
    k_stride,
    H,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BS: tl.constexpr,
    PACKED: tl.constexpr,
    FINAL: tl.constexpr,
    WIDE: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The part N of the state gradient R^T dS + N that a segment hands to the one before it. Grid [(segments - 1) * HV * value blocks].
    Segments at whose beginning a document begins write nothing."""
    block, hv, index = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    index += 1
    h = hv // (HV // H)
    begin = index * S
    end = tl.minimum(begin + S, chunks)
    if PACKED:
        document = tl.load(chunk_table + 2 * begin)
    else:
        document = begin // per_row
    c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
    high = tl.minimum(end, c1)
    place = begin + tl.arange(0, BS)
    valid = place < high
    norm = tl.load(norms + place * HV + hv, mask=valid, other=0.0)
    before = tl.cumsum(norm, 0) - norm
    stop = tl.max(tl.where(valid & ~(before < FORGOTTEN), place, begin), 0) + 1
    if begin > c0:
        state = tl.zeros((BV, BK), tl.float32)
        if FINAL:
            if stop == c1:
                state = load_state(d_final + (int64(document) * HV + hv) * (K * V), first, K, V, BK, BV)
        for step in tl.range(0, stop - begin, num_stages=STAGES):
            chunk = stop - 1 - step
            inside = (chunk - c0) * C
            start = token + inside
            rows = length - inside
            tile = int64(chunk) * HV + hv
            k_rows = load_rows_again(k + h * K, start, rows, k_stride, 0, K, BK)
            x = dot(state.to(k_rows.dtype), tl.trans(k_rows), WIDE) * load_gate(gates, tile, 3)[None, :]
            first_read, reads = chunk_reads(start, rows, WRITES)
            do_columns = tl.trans(load_rows_again(do + hv * V, first_read, reads, HV * V, first, V, BV, READS))
            x = add_dot(x, do_columns, load_square(scores, tile, READS), WIDE)
            beta = load_gate(gates, tile, 2)[None, :]
            x = minus_solved(x, x * beta, load_square(phi, tile), units, tile, WIDE, BACKWARD=True)
            gamma = load_gate(gates, tile, 1)[None, :]
            q_rows = load_rows_again(q + h * K, first_read, reads, q_stride, 0, K, BK, READS)
            x *= gamma * -beta
            if WRITES > 1:
                gamma = load_read_gate(gates, tile, start, rows, 1, WRITES, READS)[None, :]
            state = add_dot(state * load_last(gates, tile), (do_columns.to(tl.float32) * (gamma * scale)).to(k_rows.dtype), q_rows, WIDE)
            state = add_dot(state, x.to(k_rows.dtype), k_rows, WIDE)
        store_state(added + (int64(index) * HV + hv) * (K * V), state, first, K, V, BK, BV)
