"""Triton kernel that turns states and their gradients into the gradients of q, k, v, g and beta, chunk by chunk. Any GPU from sm_80 on."""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.ops.delta_rule.portable_prepare import (
    SMALLEST_LOG_DECAY,
    C,
    chunk_rows,
    int64,
    load_gate,
    load_last,
    load_rows,
    log_decay,
)
from gdn.ops.delta_rule.portable_scan import add_dot, dot, load_tile, store_rows


@triton.jit
def gradient_kernel(
    q,
    k,
    g,
    gates,
    do,
    states,
    errors,
    d_states,
    d_errors,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
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
):
    """Gradients of one chunk and query/key head, BK of its key columns, summed over the value heads of the group in fp32.
    Grid [2 * key blocks, H, chunks]: even programs find dq, odd ones the rest.

    With R = U / beta the errors, dU the gradient of U, S the state before and dS the gradient of the state after the chunk:

        dP_ij = scale exp(G_i - G_j) beta_j dO_i.R_j  (i >= j)       dM_ij = -exp(G_i - G_j) beta_i beta_j dU_i.R_j  (i > j)
        dq    = scale gamma dO S^T + dP K                            dv    = beta dU       dbeta = R.dU
        dk    = D beta R dS^T - gamma beta dU S^T + dP^T Q + (dM + dM^T) K

    and G_i receives q_i times its row of dq, k_i times the rows of the terms of dk in gamma and dM, minus k_i times those of the other
    three; the last G of the chunk receives the term in D with opposite sign and gamma_last <S, dS>. dg [2 * key blocks, tokens, HV] takes
    the share of each program.

    The transposed [64, 64] matrices are products of their own: in Triton 3.4 to 3.7.0 the transpose of a product as first operand of another
    goes wrong on Hopper.
    """
    block = tl.program_id(0)
    h = tl.program_id(1)
    chunk = tl.program_id(2)
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    first_key = block // 2 * BK
    i = tl.arange(0, C)
    inside = i < rows
    total = tl.zeros((C, BK), tl.float32)
    for member in tl.range(0, GROUP, num_stages=1):
        hv = h * GROUP + member
        tile = int64(chunk) * HV + hv
        d_out = do + hv * V
        k_rows = load_rows(k + h * K, start, rows, k_stride, first_key, K, BK)
        q_rows = load_rows(q + h * K, start, rows, q_stride, first_key, K, BK)
        if block % 2 == 0:
            part = _query_part(
                k_rows, gates, d_out, states, errors, tile, start, rows, first_key, scale, HV, K, V, BK, BV, WIDE, STAGES
            )  # fmt: skip
            dG = tl.sum(part * q_rows.to(tl.float32), 1)
        else:
            part, dG = _key_part(
                q_rows, k_rows, gates, d_out, states, errors, d_states, d_errors, tile, start, rows, first_key, scale, HV, K, V, BK, BV,
                WIDE, STAGES,
            )  # fmt: skip
        total += part
        at = (start + i) * HV + hv
        kept = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) >= SMALLEST_LOG_DECAY
        tl.store(dg + (int64(block) * tokens * HV + at), tl.where(kept, tl.cumsum(dG, 0, reverse=True), 0.0), mask=inside)
        if block == 1:
            db = tl.zeros((C,), tl.float32)
            for first in tl.range(0, V, BV, num_stages=1):
                d_error = load_tile(d_errors, tile, first, V, C, BV, C).to(tl.float32)
                db += tl.sum(d_error * load_tile(errors, tile, first, V, C, BV, C).to(tl.float32), 0)
                store_rows(dv + hv * V, d_error * load_gate(gates, tile, 2)[None, :], start, rows, HV * V, first, V, BV)
            tl.store(dbeta + at, db, mask=inside)
    c = (first_key + tl.arange(0, BK))[None, :]
    out = (start * H + h) * K + (i[:, None] * (H * K) + c)
    mask = inside[:, None] & (c < K)
    tl.store((dq if block % 2 == 0 else dk) + out, total.to(dq.dtype.element_ty), mask=mask)


@triton.jit
def _query_part(
    k_rows,
    gates,
    d_out,
    states,
    errors,
    tile,
    start,
    rows,
    first_key,
    scale,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq of one value head."""
    i = tl.arange(0, C)
    pair = tl.zeros((C, C), tl.float32)
    part = tl.zeros((C, BK), tl.float32)
    for first in tl.range(0, V, BV, num_stages=STAGES):
        do_rows = load_rows(d_out, start, rows, HV * V, first, V, BV)
        pair = add_dot(pair, do_rows, load_tile(errors, tile, first, V, C, BV, C), WIDE)
        part = add_dot(part, do_rows, load_block(states, tile, first, first_key, V, K, BV, BK), WIDE)
    decay = log_decay(load_gate(gates, tile, 0), load_gate(gates, tile, 4), WIDE)
    decay = tl.exp(tl.where(i[:, None] >= i[None, :], decay, float("-inf")))
    pair *= decay * (load_gate(gates, tile, 2) * scale)[None, :]
    return add_dot(part * (load_gate(gates, tile, 1) * scale)[:, None], pair.to(k_rows.dtype), k_rows, WIDE)


@triton.jit
def _key_part(
    q_rows,
    k_rows,
    gates,
    d_out,
    states,
    errors,
    d_states,
    d_errors,
    tile,
    start,
    rows,
    first_key,
    scale,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dk of one value head, and what G receives from it."""
    i = tl.arange(0, C)
    beta = load_gate(gates, tile, 2)
    pair = tl.zeros((C, C), tl.float32)
    part = tl.zeros((C, BK), tl.float32)
    for first in tl.range(0, V, BV, num_stages=STAGES):
        d_error = tl.trans(load_tile(d_errors, tile, first, V, C, BV, C))
        pair = add_dot(pair, d_error, load_tile(errors, tile, first, V, C, BV, C), WIDE)
        part = add_dot(part, d_error, load_block(states, tile, first, first_key, V, K, BV, BK), WIDE)
    decay = log_decay(load_gate(gates, tile, 0), load_gate(gates, tile, 4), WIDE)
    decay = tl.exp(tl.where(i[:, None] > i[None, :], decay, float("-inf")))
    pair *= decay * (beta[:, None] * -beta[None, :])
    part = add_dot(part * -(load_gate(gates, tile, 1) * beta)[:, None], pair.to(k_rows.dtype), k_rows, WIDE)
    dG = tl.sum(part * k_rows.to(tl.float32), 1)
    total = part

    pair = tl.zeros((C, C), tl.float32)
    for first in tl.range(0, V, BV, num_stages=STAGES):
        error = tl.trans(load_tile(errors, tile, first, V, C, BV, C))
        pair = add_dot(pair, error, tl.trans(load_rows(d_out, start, rows, HV * V, first, V, BV)), WIDE)
    decay = -log_decay(load_gate(gates, tile, 0), load_gate(gates, tile, 4), WIDE)
    decay = tl.exp(tl.where(i[:, None] <= i[None, :], decay, float("-inf")))
    pair *= decay * (beta * scale)[:, None]
    part = dot(pair.to(k_rows.dtype), q_rows, WIDE)
    dG -= tl.sum(part * k_rows.to(tl.float32), 1)
    total += part

    pair = tl.zeros((C, C), tl.float32)
    part = tl.zeros((C, BK), tl.float32)
    for first in tl.range(0, V, BV, num_stages=STAGES):
        error = tl.trans(load_tile(errors, tile, first, V, C, BV, C))
        pair = add_dot(pair, error, load_tile(d_errors, tile, first, V, C, BV, C), WIDE)
        part = add_dot(part, error, load_block(d_states, tile, first, first_key, V, K, BV, BK), WIDE)
    part *= (load_gate(gates, tile, 3) * beta)[:, None]
    last = tl.sum(tl.sum(part * k_rows.to(tl.float32), 1), 0)
    decay = -log_decay(load_gate(gates, tile, 0), load_gate(gates, tile, 4), WIDE)
    decay = tl.exp(tl.where(i[:, None] < i[None, :], decay, float("-inf")))
    pair *= decay * (beta[:, None] * -beta[None, :])
    part = add_dot(part, pair.to(k_rows.dtype), k_rows, WIDE)
    dG -= tl.sum(part * k_rows.to(tl.float32), 1)

    overlap = tl.zeros((BV,), tl.float32)
    for first in tl.range(0, V, BV, num_stages=1):
        state = load_block(states, tile, first, first_key, V, K, BV, BK).to(tl.float32)
        overlap += tl.sum(state * load_block(d_states, tile, first, first_key, V, K, BV, BK).to(tl.float32), 1)
    last += load_last(gates, tile) * tl.sum(overlap, 0)
    return total + part, dG + tl.where(i == C - 1, last, 0.0)


@triton.jit
def load_block(base, tile, first, first_key, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """A [BV, BK] block of a [V, K] tile."""
    row = (first + tl.arange(0, BV))[:, None]
    column = (first_key + tl.arange(0, BK))[None, :]
    return tl.load(base + tile * (V * K) + (row * K + column), mask=(row < V) & (column < K), other=0.0)
