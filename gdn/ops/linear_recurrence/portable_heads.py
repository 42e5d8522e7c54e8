"""Triton kernels of linear attention with one decay per head: outputs, and the gradients of q, k, v and g. Any GPU from sm_80 on.

Letters of one chunk of C = 64 tokens and one value head (derivation in README.md):

    G      running sum of g, gamma = exp(G)         D      decay from a token to the chunk's end
    P      scores, P_ij = scale exp(G_i - G_j) q_i.k_j for i >= j
    S      memory before the chunk                  dS     gradient of the memory after it
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import exp, int64
from gdn.ops.delta_rule.portable_prepare import (
    SMALLEST_LOG_DECAY,
    C,
    chunk_rows,
    load_gate,
    load_last,
    load_rows,
    load_rows_again,
    store_gates,
)
from gdn.ops.delta_rule.portable_scan import add_dot, document_bounds, dot, program_place, run_bounds
from gdn.ops.linear_recurrence.portable_states import load_block, store_block, store_tokens


@triton.jit
def gates_kernel(
    g,
    gates,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    HV,
    BH: tl.constexpr,
    PACKED: tl.constexpr,
):
    """gates [chunks, HV, 5, 64] fp32 from g, as `pair_kernel` of the gated delta rule writes them, but for beta. Grid [chunks * head blocks]."""
    store_gates(g, gates, cu_seqlens, chunk_table, T, per_row, HV, BH, PACKED)


@triton.jit
def pair_decay(gates, tile, KEYS_FIRST: tl.constexpr, WIDE: tl.constexpr):
    """exp(G_i - G_j) for i >= j, else 0, with i the row; with KEYS_FIRST the transposed matrix. fp32 inputs take both parts of G and the exact exp."""
    t = tl.arange(0, C)
    G = load_gate(gates, tile, 0)
    low = load_gate(gates, tile, 4)
    sign = -1.0 if KEYS_FIRST else 1.0
    seen = t[:, None] <= t[None, :] if KEYS_FIRST else t[:, None] >= t[None, :]
    if WIDE:
        between = sign * ((G[:, None] - G[None, :]) + (low[:, None] - low[None, :]))
        return tl.where(seen, exp(between), 0.0)
    else:
        G += low
        return tl.exp(tl.where(seen, sign * (G[:, None] - G[None, :]), float("-inf")))


@triton.jit
def output_kernel(
    q,
    k,
    v,
    gates,
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
    scale,
    q_stride,
    k_stride,
    v_stride,
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
    """o and the final memories. Grid [runs * HV * column blocks]; a program walks over a run with its columns of the memory in registers.

    O = gamma scale Q S + P V;  S <- gamma_last S + K^T (D V).
    """
    block, hv, index = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    q += hv // GROUP * K
    k += hv // GROUP * K
    v += hv * V
    begin, end, d0, d1 = run_bounds(index, chunk_table, chunks, per_row, documents, S, SEGMENTS, PACKED)
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
            tile = int64(chunk) * HV + hv
            q_rows = load_rows_again(q, start, rows, q_stride, 0, K, BK)
            k_rows = load_rows_again(k, start, rows, k_stride, 0, K, BK)
            v_rows = load_rows(v, start, rows, v_stride, first, V, BV)
            scores = dot(q_rows, tl.trans(k_rows), WIDE) * pair_decay(gates, tile, False, WIDE) * scale
            out = dot(q_rows, state.to(q_rows.dtype), WIDE) * (load_gate(gates, tile, 1) * scale)[:, None]
            out = add_dot(out, scores.to(q_rows.dtype), v_rows, WIDE)
            store_tokens(o + hv * V, out, start, rows, HV * V, first, V, BV)
            v_rows = (v_rows.to(tl.float32) * load_gate(gates, tile, 3)[:, None]).to(k_rows.dtype)
            state = add_dot(state * load_last(gates, tile), tl.trans(k_rows), v_rows, WIDE)
        if (low < high and high == c1) or c0 == c1:
            store_block(final + slot, state, first, K, V, BK, BV)


@triton.jit
def gradient_kernel(
    q,
    k,
    v,
    g,
    gates,
    do,
    states,
    d_states,
    dq,
    dk,
    dv,
    dg,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    scale,
    tokens,
    q_stride,
    k_stride,
    v_stride,
    H,
    HV,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All gradients of one chunk, one query/key head and a part of its value heads. Grid [chunks * H * 2 * PARTS]: even programs find dq, odd
    ones dk and dv; they stand side by side because both read v, the gradient of o, and dS.

        dq = scale gamma dO S^T + E K           dk = D V dS^T + E^T Q           E = scale exp(G_i - G_j) dO V^T for i >= j
        dv = D K dS + P^T dO

    dq and dk [PARTS, tokens, H, K] hold the sums over the value heads of a part, dg [2, tokens, HV] the share of each kind of program.
    A log decay g_t acts on everything that passes from before t to t or after, so it receives what the reads of S bring from t on, what is
    written to dS before t, the products of queries from t on with keys before t, and gamma_last <S, dS>.
    """
    place, h, chunk = program_place(2 * PARTS, H)
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    part = place // 2
    SHARE: tl.constexpr = (GROUP + PARTS - 1) // PARTS
    first_head = h * GROUP + part * SHARE
    heads = tl.minimum(GROUP - part * SHARE, SHARE)
    at = (start * H + h) * K + int64(part) * tokens * (H * K)
    i = tl.arange(0, C)[:, None]
    c = tl.arange(0, BK)[None, :]
    at = at + (i * (H * K) + c)
    mask = (i < rows) & (c < K)
    q += h * K
    k += h * K
    if place % 2 == 0:
        total = _of_queries(
            q, k, v, g, gates, do, states, d_states, dg, chunk, start, rows, scale, q_stride, k_stride, v_stride, HV, first_head, heads, K, V, BK, BV,
            WIDE, STAGES,
        )  # fmt: skip
        tl.store(dq + at, total.to(dq.dtype.element_ty), mask=mask)
    else:
        total = _of_keys(
            q, k, v, g, gates, do, d_states, dv, dg + int64(tokens) * HV, chunk, start, rows, scale, q_stride, k_stride, v_stride, HV, first_head, heads,
            K, V, BK, BV, WIDE, STAGES,
        )  # fmt: skip
        tl.store(dk + at, total.to(dk.dtype.element_ty), mask=mask)


@triton.jit
def _of_queries(
    q, k, v, g, gates, do, states, d_states, dg, chunk, start, rows, scale, q_stride, k_stride, v_stride, HV, first_head, heads, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq, and the shares of dg that belong to S."""
    total = tl.zeros((C, BK), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    q_rows = load_rows(q, start, rows, q_stride, 0, K, BK)
    for hv in tl.range(first_head, first_head + heads, num_stages=STAGES if V <= BV else 1):
        tile = int64(chunk) * HV + hv
        before = load_gate(gates, tile, 1) * scale
        products = tl.zeros((C, C), tl.float32)
        reads = tl.zeros((C,), tl.float32)
        overlap = tl.zeros((BK,), tl.float32)
        if V <= BV:
            total, products, reads, overlap = _query_products(
                total, products, reads, overlap, q_rows, before, v, do, states, d_states, tile, hv, start, rows, v_stride, HV, 0, K, V, BK, BV, WIDE
            )  # fmt: skip
        else:
            for first in tl.range(0, V, BV, num_stages=STAGES):
                total, products, reads, overlap = _query_products(
                    total, products, reads, overlap, q_rows, before, v, do, states, d_states, tile, hv, start, rows, v_stride, HV, first, K, V, BK, BV, WIDE
                )  # fmt: skip
        pairs += products * pair_decay(gates, tile, False, WIDE)
        through = tl.cumsum(reads, 0, reverse=True) + load_last(gates, tile) * tl.sum(overlap, 0)
        _store_decay(dg, g, through, start, rows, HV, hv)
    k_rows = load_rows(k, start, rows, k_stride, 0, K, BK)
    return add_dot(total, (pairs * scale).to(k_rows.dtype), k_rows, WIDE)


@triton.jit
def _query_products(
    total, products, reads, overlap, q_rows, before, v, do, states, d_states, tile, hv, start, rows, v_stride, HV, first, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """With gamma dO S^T, dO V^T, the share of o.dO that S brings and the rows of <S, dS> of some columns added."""
    do_rows = load_rows(do + hv * V, start, rows, HV * V, first, V, BV)
    v_rows = load_rows(v + hv * V, start, rows, v_stride, first, V, BV)
    state = load_block(states + tile * (K * V), first, K, V, BK, BV)
    d_state = load_block(d_states + tile * (K * V), first, K, V, BK, BV)
    gated = do_rows.to(tl.float32) * before[:, None]
    products = add_dot(products, do_rows, tl.trans(v_rows), WIDE)
    reads += tl.sum(gated * dot(q_rows, state, WIDE), 1)
    total = add_dot(total, gated.to(q_rows.dtype), tl.trans(state), WIDE)
    return total, products, reads, overlap + tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1)


@triton.jit
def _of_keys(
    q, k, v, g, gates, do, d_states, dv, dg, chunk, start, rows, scale, q_stride, k_stride, v_stride, HV, first_head, heads, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk; dv; and the shares of dg that belong to dS and to the pairs of tokens of the chunk. Matrices of pairs have the keys in their rows."""
    t = tl.arange(0, C)
    total = tl.zeros((C, BK), tl.float32)
    pairs = tl.zeros((C, C), tl.float32)
    k_rows = load_rows(k, start, rows, k_stride, 0, K, BK)
    scores = dot(k_rows, tl.trans(load_rows(q, start, rows, q_stride, 0, K, BK)), WIDE) * scale
    for hv in tl.range(first_head, first_head + heads, num_stages=STAGES if V <= BV else 1):
        tile = int64(chunk) * HV + hv
        decay = pair_decay(gates, tile, True, WIDE)
        gated = scores * decay
        narrow = gated.to(k_rows.dtype)
        after = load_gate(gates, tile, 3)
        products = tl.zeros((C, C), tl.float32)
        writes = tl.zeros((C,), tl.float32)
        if V <= BV:
            total, products, writes = _key_products(
                total, products, writes, k_rows, narrow, after, v, do, d_states, dv, tile, hv, start, rows, v_stride, HV, 0, K, V, BK, BV, WIDE
            )  # fmt: skip
        else:
            for first in tl.range(0, V, BV, num_stages=STAGES):
                total, products, writes = _key_products(
                    total, products, writes, k_rows, narrow, after, v, do, d_states, dv, tile, hv, start, rows, v_stride, HV, first, K, V, BK, BV, WIDE
                )  # fmt: skip
        pairs += products * decay
        apart = tl.where(t[:, None] < t[None, :], products * gated, 0.0)
        written_before = tl.sum(tl.where(t[:, None] < t[None, :], writes[:, None], 0.0), 0)
        over = tl.cumsum(tl.sum(apart, 0) - tl.sum(apart, 1), 0, reverse=True)
        _store_decay(dg, g, written_before + over, start, rows, HV, hv)
    q_rows = load_rows(q, start, rows, q_stride, 0, K, BK)
    return add_dot(total, (pairs * scale).to(q_rows.dtype), q_rows, WIDE)


@triton.jit
def _key_products(
    total, products, writes, k_rows, narrow, after, v, do, d_states, dv, tile, hv, start, rows, v_stride, HV, first, K: tl.constexpr,
    V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """With D V dS^T, V dO^T and what each token writes to dS of some columns added; stores those columns of dv."""
    v_rows = load_rows(v + hv * V, start, rows, v_stride, first, V, BV)
    do_rows = load_rows(do + hv * V, start, rows, HV * V, first, V, BV)
    d_state = load_block(d_states + tile * (K * V), first, K, V, BK, BV)
    d_values = dot(k_rows, d_state, WIDE) * after[:, None]
    writes += tl.sum(d_values * v_rows.to(tl.float32), 1)
    products = add_dot(products, v_rows, tl.trans(do_rows), WIDE)
    d_values = add_dot(d_values, narrow, do_rows, WIDE)
    store_tokens(dv + hv * V, d_values, start, rows, HV * V, first, V, BV)
    total = add_dot(total, (v_rows.to(tl.float32) * after[:, None]).to(k_rows.dtype), tl.trans(d_state), WIDE)
    return total, products, writes


@triton.jit
def _store_decay(dg, g, value, start, rows, HV, hv):
    """The gradient of the log decays of a chunk; 0 where they act as the smallest."""
    i = tl.arange(0, C)
    at = (start + i) * HV + hv
    kept = tl.load(g + at, mask=i < rows, other=0.0).to(tl.float32) >= SMALLEST_LOG_DECAY
    tl.store(dg + at, tl.where(kept, value, 0.0), mask=i < rows)
