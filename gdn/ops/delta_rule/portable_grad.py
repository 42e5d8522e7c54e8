"""Triton kernel that turns states and their gradients into the gradients of q, k, v, g and beta, chunk by chunk. Any GPU from sm_80 on."""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import int64
from gdn.ops.delta_rule.portable_prepare import (
    SMALLEST_LOG_DECAY,
    C,
    chunk_reads,
    chunk_rows,
    decays_at,
    divisor,
    load_gate,
    load_last,
    load_read_gate,
    load_rows,
    pair_decay,
    read_decay,
    read_places,
    store_scores,
    writes_before,
)
from gdn.ops.delta_rule.portable_scan import add_dot, dot, load_square, load_tile, program_place, store_rows

SMALL_UNIT = tl.constexpr(2.0**-15)
"""A unit of Phi below this: no entry passes 1/2."""


@triton.jit
def slab_chunk(slot, slab, width, length, chunks):
    """The chunk at a place of the buffers of a slab, -1 where a run has none there. Runs have `length` chunks, the last one maybe less."""
    inside = slab * width + slot % width
    chunk = slot // width * length + inside
    return tl.where((inside < length) & (chunk < chunks), chunk, -1)


@triton.jit(do_not_specialize=["slab"])
def pairs_kernel(
    gates,
    do,
    errors,
    d_scores,
    pairs,
    dv,
    dbeta,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    chunks,
    length,
    width,
    slab,
    scale,
    HV,
    V: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
):
    """What one chunk and value head needs no state for. Grid [slots * HV].

    With R = U / beta the errors and dU the gradient of U:

        dP_ij = scale exp(G_i - G_j) beta_j dO_i.R_j   (i >= j)        gradient of q_i.k_j, d_scores [slots, HV, READS, 64]
        dM_ij = -exp(G_i - G_j) beta_i beta_j dU_i.R_j (i > j)         gradient of k_i.k_j, pairs [slots, HV, 64, 64]
        dbeta = R.dU, which is the diagonal of the product in dM, and for bf16 not the last word (`gradient_kernel`)

    dv holds beta dU, but dU where beta is tiny and for fp16, and becomes beta dU there too: without dU nothing would be left of dbeta where
    beta is 0.
    """
    hv = tl.program_id(0) % HV
    slot = tl.program_id(0) // HV
    chunk = slab_chunk(slot, slab, width, length, chunks)
    if chunk < 0:
        return
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    i = tl.arange(0, C)
    tile = int64(chunk) * HV + hv
    slot = int64(slot) * HV + hv
    token, reads = chunk_reads(start, rows, WRITES)
    p = tl.zeros((C, READS), tl.float32)
    m = tl.zeros((C, C), tl.float32)
    db = tl.zeros((C,), tl.float32)
    for first in tl.range(0, V, BV, num_stages=STAGES):
        error = load_tile(errors, slot, first, V, C, BV, C)
        do_rows = load_rows(do + hv * V, token, reads, HV * V, first, V, BV, READS)
        if WRITES == 1:
            p = add_dot(p, do_rows, error, WIDE)
        else:  # turned, since products on Hopper have 64 rows
            p = add_dot(p, tl.trans(error), tl.trans(do_rows), WIDE)
        d_error = load_rows(dv + hv * V, start, rows, HV * V, first, V, BV)
        m = add_dot(m, d_error, error, WIDE)
        if WIDE:
            db += tl.sum(d_error * tl.trans(error), 1)
    if not WIDE:
        db = diagonal(m)
    beta = load_gate(gates, tile, 2)
    known = divisor(beta, dv.dtype.element_ty)
    tl.store(dbeta + (start + i) * HV + hv, db / known, mask=i < rows)
    G, G_low = load_gate(gates, tile, 0), load_gate(gates, tile, 4)
    decay = pair_decay(G, G_low, WIDE) * beta[None, :]
    at = slot * (C * C) + (i[:, None] * C + i[None, :])
    if WRITES == 1:
        tl.store(d_scores + at, (p * decay * scale).to(d_scores.dtype.element_ty))
    else:
        place = read_places(start, rows, WRITES, READS)
        read_G = load_read_gate(gates, tile, start, rows, 0, WRITES, READS)
        read_low = load_read_gate(gates, tile, start, rows, 4, WRITES, READS)
        store_scores(d_scores, p * (read_decay(G, G_low, read_G, read_low, place, WIDE) * beta[:, None]) * scale, slot, READS)
    missing = tl.where(known == beta, 1.0, beta)
    m = tl.where(i[:, None] > i[None, :], m * decay * -missing[:, None], 0.0)
    tl.store(pairs + at, m.to(pairs.dtype.element_ty))
    if tl.max(tl.where((i < rows) & (known != beta), 1, 0), 0) == 1:
        for first in tl.range(0, V, BV, num_stages=1):
            d_error = load_rows(dv + hv * V, start, rows, HV * V, first, V, BV).to(tl.float32)
            tl.debug_barrier()  # all of dU is read before any of it is overwritten
            store_rows(dv + hv * V, tl.trans(d_error * missing[:, None]), start, rows, HV * V, first, V, BV)


@triton.jit(do_not_specialize=["slab"])
def gradient_kernel(
    q,
    k,
    g,
    gates,
    units,
    do,
    states,
    errors,
    d_states,
    dv,
    d_scores,
    pairs,
    dq,
    dk,
    dg,
    dbeta,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    chunks,
    length,
    width,
    slab,
    scale,
    tokens,
    q_stride,
    k_stride,
    H,
    HV,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
):
    """dq and dk of one chunk and query/key head of a slab, BK of its key columns, summed over the value heads of the group in fp32, and dg.
    Grid [slots * H * 2 * key blocks]: even programs find dq, odd ones dk.

    With S the state before and dS the gradient of the state after the chunk, dP and dM of `pairs_kernel`:

        dq = scale gamma dO S^T + dP K
        dk = D beta R dS^T - gamma dv S^T + dP^T Q + (dM + dM^T) K

    and G_i receives q_i times its row of dq, k_i times the rows of the terms of dk in gamma and dM, minus k_i times those of the other
    three; the last G of the chunk receives the term in D with opposite sign and gamma_last <S, dS>. dg [2 * key blocks, tokens, HV] takes
    the share of each program.

    The terms of dk in D, dP and dM are beta_i times what the gradient of u_i makes of k_i, and k_i times them is beta dbeta. For bf16 that
    has one rounding of a vector (of R, not of dU) instead of two, so it is dbeta [key blocks, tokens, HV], where beta is not tiny. But dP
    and dM are rounded too, which matters more where Phi is large: there, by the unit of the chunk, dbeta of `pairs_kernel` stays.

    For fp32 inputs what cancels in g is left out of the sums instead: the diagonal of dP, and the term in D of
    later tokens; under a strong decay it is larger than all that stays.

    No product is transposed to be the first operand of another: Triton 3.4 to 3.7.0 gets that wrong on Hopper. Nor is BK 32: that read
    beyond shared memory there.
    """
    block, h, place = program_place(2 * ((K + BK - 1) // BK), H)
    chunk = slab_chunk(place, slab, width, length, chunks)
    if chunk < 0:
        return
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    first_key = block // 2 * BK
    token, reads = chunk_reads(start, rows, WRITES)
    if WRITES > 1:
        if block % 2 == 0:
            read_gradient(
                q, k, g, gates, do, states, d_scores, dq, dg, start, rows, chunk, place, block, h, scale, tokens // WRITES, q_stride, k_stride,
                H, HV, GROUP, K, V, BK, BV, WIDE, STAGES, WRITES, READS,
            )  # fmt: skip
            return
    i = tl.arange(0, C)
    inside = i < rows
    total = tl.zeros((C, BK), tl.float32)
    for member in tl.range(0, GROUP, num_stages=1, disable_licm=True):
        hv = h * GROUP + member
        tile = int64(chunk) * HV + hv
        slot = int64(place) * HV + hv
        k_rows = load_rows(k + h * K, start, rows, k_stride, first_key, K, BK)
        q_rows = load_rows(q + h * K, token, reads, q_stride, first_key, K, BK, READS)
        gamma = load_gate(gates, tile, 1)
        part = tl.zeros((C, BK), tl.float32)
        if WRITES == 1 and block % 2 == 0:
            for first in tl.range(0, V, BV, num_stages=STAGES):
                do_rows = load_rows(do + hv * V, start, rows, HV * V, first, V, BV)
                part = add_dot(part, do_rows, load_block(states, slot, first, first_key, V, K, BV, BK), WIDE)
            part *= (gamma * scale)[:, None]
            d_score = load_square(d_scores, slot)
            if WIDE:
                part = add_dot(part, below_diagonal(d_score), k_rows, WIDE)
                total += diagonal(d_score)[:, None] * k_rows
            else:
                part = add_dot(part, d_score, k_rows, WIDE)
            total += part
            dG = tl.sum(part * q_rows.to(tl.float32), 1)
            before = tl.zeros((C,), tl.float32)
        else:
            beta = load_gate(gates, tile, 2)
            for first in tl.range(0, V, BV, num_stages=STAGES):
                d_error = load_rows(dv + hv * V, start, rows, HV * V, first, V, BV)
                part = add_dot(part, d_error, load_block(states, slot, first, first_key, V, K, BV, BK), WIDE)
            dm = load_square(pairs, slot)
            if WIDE and WRITES > 1:
                within = _same_token(start, WRITES)
                total += dot(tl.where(within, dm + tl.trans(dm), 0.0), k_rows, WIDE)
                dm = tl.where(within, 0.0, dm)
            part = add_dot(part * -gamma[:, None], dm, k_rows, WIDE)
            total += part
            dG = tl.sum(part * k_rows.to(tl.float32), 1)
            part = tl.zeros((C, BK), tl.float32)
            for first in tl.range(0, V, BV, num_stages=STAGES):
                error = tl.trans(load_tile(errors, slot, first, V, C, BV, C))
                part = add_dot(part, error, load_block(d_states, slot, first, first_key, V, K, BV, BK), WIDE)
            part *= (load_gate(gates, tile, 3) * beta)[:, None]
            onward = tl.sum(part * k_rows.to(tl.float32), 1)
            d_score = load_square(d_scores, slot, READS)
            if WIDE:
                if WRITES == 1:
                    total += part + diagonal(d_score)[:, None] * q_rows
                    part = dot(tl.trans(below_diagonal(d_score)), q_rows, WIDE)
                else:
                    within = _of_the_token(start, rows, WRITES, READS)
                    total = add_dot(total + part, tl.trans(tl.where(within, d_score, 0.0)), q_rows, WIDE)
                    part = dot(tl.trans(tl.where(within, 0.0, d_score)), q_rows, WIDE)
                before = tl.sum(tl.where(i[:, None] > i[None, :], onward[None, :], 0.0), 1)
                last = 0.0
            else:
                part = add_dot(part, tl.trans(d_score), q_rows, WIDE)
                before = tl.zeros((C,), tl.float32)
                last = tl.sum(onward, 0)
            part = add_dot(part, tl.trans(dm), k_rows, WIDE)
            total += part
            written = tl.sum(part * k_rows.to(tl.float32), 1)
            dG -= written
            if dq.dtype.element_ty == tl.bfloat16:
                share = dbeta + (int64(block // 2) * tokens * HV + (start + i) * HV + hv)
                by = divisor(beta, dv.dtype.element_ty)
                known = (by == beta) & (tl.load(units + tile + i * 0) < SMALL_UNIT)
                tl.store(share, tl.where(known, written / by, 0.0), mask=inside & (known | (block > 1)))
            overlap = tl.zeros((BV,), tl.float32)
            for first in tl.range(0, V, BV, num_stages=1):
                state = load_block(states, slot, first, first_key, V, K, BV, BK).to(tl.float32)
                overlap += tl.sum(state * load_block(d_states, slot, first, first_key, V, K, BV, BK).to(tl.float32), 1)
            dG += tl.where(i == C - 1, last + load_last(gates, tile) * tl.sum(overlap, 0), 0.0)
        at, decaying = decays_at(start, i, rows, HV, hv, WRITES)
        kept = tl.load(g + at, mask=decaying, other=0.0).to(tl.float32) >= SMALLEST_LOG_DECAY
        share = dg + (int64(block) * (tokens if WRITES == 1 else tokens // WRITES) * HV + at)
        tl.store(share, tl.where(kept, tl.cumsum(dG, 0, reverse=True) + before, 0.0), mask=decaying)
    c = (first_key + tl.arange(0, BK))[None, :]
    out = (start * H + h) * K + (i[:, None] * (H * K) + c)
    mask = inside[:, None] & (c < K)
    tl.store((dq if block % 2 == 0 else dk) + out, total.to(dq.dtype.element_ty), mask=mask)


@triton.jit
def read_gradient(
    q,
    k,
    g,
    gates,
    do,
    states,
    d_scores,
    dq,
    dg,
    start,
    rows,
    chunk,
    place,
    block,
    h,
    scale,
    tokens,
    q_stride,
    k_stride,
    H,
    HV,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    WRITES: tl.constexpr,
    READS: tl.constexpr,
):
    """What an even program of `gradient_kernel` does where a token has several writes: dq of the tokens that are read in the chunk, turned,
    [BK, READS], and the share in dg of those whose first write is in it. Both are among its first READS tokens."""
    first_key = block // 2 * BK
    token, reads = chunk_reads(start, rows, WRITES)
    before = writes_before(start, WRITES)
    j = tl.arange(0, READS)
    total = tl.zeros((BK, READS), tl.float32)
    for member in tl.range(0, GROUP, num_stages=1, disable_licm=True):
        hv = h * GROUP + member
        slot = int64(place) * HV + hv
        k_rows = load_rows(k + h * K, start, rows, k_stride, first_key, K, BK)
        q_rows = load_rows(q + h * K, token, reads, q_stride, first_key, K, BK, READS)
        part = tl.zeros((BK, READS), tl.float32)
        for first in tl.range(0, V, BV, num_stages=STAGES):
            do_rows = load_rows(do + hv * V, token, reads, HV * V, first, V, BV, READS)
            part = add_dot(part, tl.trans(load_block(states, slot, first, first_key, V, K, BV, BK)), tl.trans(do_rows), WIDE)
        part *= (load_read_gate(gates, int64(chunk) * HV + hv, start, rows, 1, WRITES, READS) * scale)[None, :]
        d_score = load_square(d_scores, slot, READS)
        if WIDE:
            within = _of_the_token(start, rows, WRITES, READS)
            total = add_dot(total, tl.trans(k_rows), tl.trans(tl.where(within, d_score, 0.0)), WIDE)
            d_score = tl.where(within, 0.0, d_score)
        part = add_dot(part, tl.trans(k_rows), tl.trans(d_score), WIDE)
        total += part
        dG = tl.sum(part * tl.trans(q_rows).to(tl.float32), 0)
        at = (token + j) * HV + hv
        first_write = j * WRITES - before
        decaying = (first_write >= 0) & (first_write < tl.minimum(rows, C))
        kept = tl.load(g + at, mask=decaying, other=0.0).to(tl.float32) >= SMALLEST_LOG_DECAY
        tl.store(dg + (int64(block) * tokens * HV + at), tl.where(kept, tl.cumsum(dG, 0, reverse=True), 0.0), mask=decaying)
    c = (first_key + tl.arange(0, BK))[:, None]
    out = (token * H + h) * K + (j[None, :] * (H * K) + c)
    tl.store(dq + out, total.to(dq.dtype.element_ty), mask=(j < reads)[None, :] & (c < K))


@triton.jit
def _of_the_token(start, rows, WRITES: tl.constexpr, READS: tl.constexpr):
    """Which writes of a chunk are of the token of each read, [READS, 64]."""
    place, i = read_places(start, rows, WRITES, READS)[:, None], tl.arange(0, C)[None, :]
    return (i <= place) & (i > place - WRITES)


@triton.jit
def _same_token(start, WRITES: tl.constexpr):
    """Which writes of a chunk are of one token, [64, 64]."""
    token = (writes_before(start, WRITES) + tl.arange(0, C)) // WRITES
    return token[:, None] == token[None, :]


@triton.jit
def diagonal(square):
    i = tl.arange(0, C)
    return tl.sum(tl.where(i[:, None] == i[None, :], square, 0.0), 1)


@triton.jit
def below_diagonal(square):
    i = tl.arange(0, C)
    return tl.where(i[:, None] > i[None, :], square, 0.0)


@triton.jit
def load_block(base, tile, first, first_key, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """A [BV, BK] block of a [V, K] tile."""
    row = (first + tl.arange(0, BV))[:, None]
    column = (first_key + tl.arange(0, BK))[None, :]
    return tl.load(base + tile * (V * K) + (row * K + column), mask=(row < V) & (column < K), other=0.0)
