"""Triton kernel that turns states and their gradients into the gradients of q, k, v, g and beta, chunk by chunk. Any GPU from sm_80 on."""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.ops.delta_rule.portable_prepare import SMALLEST_LOG_DECAY, C, chunk_rows, int64, load_rows, log_decay
from gdn.ops.delta_rule.portable_scan import load_gate, load_last


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
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients of one chunk and query/key head, BK of its key columns, summed over the value heads of the group in fp32.
    Grid [key blocks, H, chunks].

    With R = U / beta the errors, dU their gradient, S the state before and dS the gradient of the state after the chunk, per value head:

        dP_ij = scale exp(G_i - G_j) beta_j dO_i.R_j  (i >= j)       dM_ij = -exp(G_i - G_j) beta_i beta_j dU_i.R_j  (i > j)
        dq    = scale gamma dO S^T + dP K                            dv    = beta dU       dbeta = R.dU
        dk    = D beta R dS^T - gamma beta dU S^T + dP^T Q + (dM + dM^T) K

    and G_i receives q_i times its rows of dq, k_i times the rows of dk that stem from gamma and from the first index of a pair, minus k_i
    times those that stem from D and from the second; the last G receives the terms of D with opposite sign and gamma_last <S, dS>.
    dg [key blocks, tokens, HV] holds, for each block of keys, its share. dv and dbeta are written by the first block.

    The transposed [64, 64] matrices are products of their own: in Triton 3.4 to 3.7.0 the transpose of a product as first operand of another
    goes wrong on Hopper.
    """
    block = tl.program_id(0)
    h = tl.program_id(1)
    chunk = tl.program_id(2)
    group = HV // H
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    first_key = block * BK
    PRECISION: tl.constexpr = "tf32x3" if WIDE else "tf32"
    i = tl.arange(0, C)
    q_rows = load_rows(q + h * K, start, rows, q_stride, first_key, K, BK)
    k_rows = load_rows(k + h * K, start, rows, k_stride, first_key, K, BK)
    dtype = q_rows.dtype
    dq_rows = tl.zeros((C, BK), tl.float32)
    dk_rows = tl.zeros((C, BK), tl.float32)
    for member in range(group):
        hv = h * group + member
        tile = int64(chunk) * HV + hv
        decays = log_decay(load_gate(gates, tile, 0), load_gate(gates, tile, 4), WIDE)
        beta = load_gate(gates, tile, 2)
        p = tl.zeros((C, C), tl.float32)
        p_across = tl.zeros((C, C), tl.float32)
        m = tl.zeros((C, C), tl.float32)
        m_across = tl.zeros((C, C), tl.float32)
        for first in tl.range(0, V, BV, num_stages=1):
            do_rows = load_rows(do + hv * V, start, rows, HV * V, first, V, BV)
            error = load_columns(errors, tile, first, V, BV)
            d_error = load_columns(d_errors, tile, first, V, BV)
            p = tl.dot(do_rows, error, p, input_precision=PRECISION)
            p_across = tl.dot(tl.trans(error), tl.trans(do_rows), p_across, input_precision=PRECISION)
            m = tl.dot(tl.trans(d_error), error, m, input_precision=PRECISION)
            m_across = tl.dot(tl.trans(error), d_error, m_across, input_precision=PRECISION)
        below = tl.exp(tl.where(i[:, None] >= i[None, :], decays, float("-inf"))) * beta[None, :]
        p = (p * below * scale).to(dtype)
        m = tl.where(i[:, None] > i[None, :], m * below * -beta[:, None], 0.0).to(dtype)
        above = tl.exp(tl.where(i[:, None] <= i[None, :], -decays, float("-inf"))) * beta[:, None]
        p_across = (p_across * above * scale).to(dtype)
        m_across = tl.where(i[:, None] < i[None, :], m_across * above * -beta[None, :], 0.0).to(dtype)

        part = tl.dot(p, k_rows, input_precision=PRECISION)
        dq_rows += part
        dG = tl.sum(part * q_rows.to(tl.float32), 1)
        part = tl.dot(p_across, q_rows, input_precision=PRECISION)
        part = tl.dot(m_across, k_rows, part, input_precision=PRECISION)
        dk_rows += part
        dG -= tl.sum(part * k_rows.to(tl.float32), 1)
        part = tl.dot(m, k_rows, input_precision=PRECISION)
        dk_rows += part
        dG += tl.sum(part * k_rows.to(tl.float32), 1)

        gamma = load_gate(gates, tile, 1)
        decay = load_gate(gates, tile, 3)
        last = 0.0
        for first in tl.range(0, V, BV, num_stages=1):
            do_rows = load_rows(do + hv * V, start, rows, HV * V, first, V, BV)
            error = load_columns(errors, tile, first, V, BV)
            d_error = load_columns(d_errors, tile, first, V, BV)
            state = load_block(states, tile, first, first_key, V, K, BV, BK)
            d_state = load_block(d_states, tile, first, first_key, V, K, BV, BK)
            part = tl.dot(do_rows, state, input_precision=PRECISION) * (gamma * scale)[:, None]
            dq_rows += part
            dG += tl.sum(part * q_rows.to(tl.float32), 1)
            part = tl.dot(tl.trans(d_error), state, input_precision=PRECISION) * (gamma * -beta)[:, None]
            dk_rows += part
            dG += tl.sum(part * k_rows.to(tl.float32), 1)
            part = tl.dot(tl.trans(error), d_state, input_precision=PRECISION) * (decay * beta)[:, None]
            dk_rows += part
            late = tl.sum(part * k_rows.to(tl.float32), 1)
            dG -= late
            last += tl.sum(late, 0) + load_last(gates, tile) * tl.sum(tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 1), 0)
        total = tl.cumsum(dG, 0, reverse=True) + last
        at = (start + i) * HV + hv
        inside = i < rows
        kept = tl.load(g + at, mask=inside, other=0.0).to(tl.float32) >= SMALLEST_LOG_DECAY
        tl.store(dg + (int64(block) * tokens * HV + at), tl.where(kept, total, 0.0), mask=inside)
        if block == 0:
            db = tl.zeros((C,), tl.float32)
            for first in tl.range(0, V, BV, num_stages=1):
                error = load_columns(errors, tile, first, V, BV).to(tl.float32)
                d_error = load_columns(d_errors, tile, first, V, BV).to(tl.float32)
                db += tl.sum(error * d_error, 0)
                c = (first + tl.arange(0, BV))[:, None]
                out = dv + (start * HV + hv) * V + (i[None, :] * (HV * V) + c)
                tl.store(out, (d_error * load_gate(gates, tile, 2)[None, :]).to(dtype), mask=(i < rows)[None, :] & (c < V))
            tl.store(dbeta + at, db, mask=inside)
    c = (first_key + tl.arange(0, BK))[None, :]
    out = (start * H + h) * K + (i[:, None] * (H * K) + c)
    mask = (i < rows)[:, None] & (c < K)
    tl.store(dq + out, dq_rows.to(dtype), mask=mask)
    tl.store(dk + out, dk_rows.to(dtype), mask=mask)


@triton.jit
def load_columns(base, tile, first, V: tl.constexpr, BV: tl.constexpr):
    """Rows first .. first + BV of a [V, 64] tile."""
    row = (first + tl.arange(0, BV))[:, None]
    return tl.load(base + tile * (V * C) + (row * C + tl.arange(0, C)[None, :]), mask=row < V, other=0.0)


@triton.jit
def load_block(base, tile, first, first_key, V: tl.constexpr, K: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr):
    """A [BV, BK] block of a [V, K] tile."""
    row = (first + tl.arange(0, BV))[:, None]
    column = (first_key + tl.arange(0, BK))[None, :]
    return tl.load(base + tile * (V * K) + (row * K + column), mask=(row < V) & (column < K), other=0.0)
