"""Triton kernels that turn memories and their gradients into the gradients of q, k, v, g and beta, chunk by chunk. Any GPU from sm_80 on.

Levels, matrices of zeros and ones and products as in gdn/ops/linear_recurrence/portable_channels.py; letters as in portable.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import int64
from gdn.ops.delta_channel.portable_solve import load_strength
from gdn.ops.delta_rule.portable_grad import diagonal, load_block
from gdn.ops.delta_rule.portable_prepare import SMALLEST_LOG_DECAY, C, chunk_rows, load_rows
from gdn.ops.delta_rule.portable_scan import add_dot, dot, program_place
from gdn.ops.linear_recurrence.portable_channels import (
    GAMMA,
    LEVELS,
    TAIL,
    add_sums,
    apart,
    decays,
    load_log_decay,
    load_square,
    parted,
)
from gdn.ops.linear_recurrence.portable_states import store_tokens


@triton.jit
def pairs_kernel(
    beta,
    do,
    errors,
    dv,
    dbeta,
    d_scores,
    d_pairs,
    cu_seqlens,
    chunk_table,
    T,
    per_row,
    scale,
    HV,
    V: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What one chunk and value head needs neither memory nor decay for. Grid [chunks * HV].

        d_scores_ij = scale beta_j dO_i.R_j     for i >= j          the gradient of what q_i k_j make with their decays
        d_pairs_ij  = -beta_i beta_j dU_i.R_j   for i > j           of what k_i k_j make; both halves are stored, so i < j holds that of j, i
        dv = beta dU                            dbeta = R.dU

    dv holds dU before and beta dU after.
    """
    hv = tl.program_id(0) % HV
    chunk = tl.program_id(0) // HV
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    tile = int64(chunk) * HV + hv
    i = tl.arange(0, C)
    strength = load_strength(beta, start, rows, hv, HV)
    p = tl.zeros((C, C), tl.float32)
    m = tl.zeros((C, C), tl.float32)
    db = tl.zeros((C,), tl.float32)
    for first in tl.range(0, V, BV, num_stages=STAGES):
        error = load_rows(errors + hv * V, start, rows, HV * V, first, V, BV)
        d_error = load_rows(dv + hv * V, start, rows, HV * V, first, V, BV)
        do_rows = load_rows(do + hv * V, start, rows, HV * V, first, V, BV)
        p = add_dot(p, do_rows, tl.trans(error), WIDE)
        m = add_dot(m, d_error, tl.trans(error), WIDE)
        wide = d_error.to(tl.float32)
        db += tl.sum(wide * error.to(tl.float32), 1)
        tl.debug_barrier()  # all of dU is read before any of it is overwritten
        store_tokens(dv + hv * V, wide * strength[:, None], start, rows, HV * V, first, V, BV)
    tl.store(dbeta + (start + i) * HV + hv, db, mask=i < rows)
    at = tile * (C * C) + (i[:, None] * C + i[None, :])
    p = tl.where(i[:, None] >= i[None, :], p * (strength * scale)[None, :], 0.0)
    tl.store(d_scores + at, p.to(d_scores.dtype.element_ty))
    m = tl.where(i[:, None] > i[None, :], m * -strength[:, None] * strength[None, :], 0.0)
    tl.store(d_pairs + at, (m + tl.trans(m)).to(d_pairs.dtype.element_ty))


@triton.jit
def gradient_kernel(
    q,
    k,
    g,
    sums,
    beta,
    last,
    do,
    errors,
    dv,
    states,
    d_states,
    d_scores,
    d_pairs,
    dq,
    dk,
    dg,
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
    V: tl.constexpr,
    W: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq, dk and dg [tokens, HV, K] of W channels of one chunk and value head. Grid [chunks * HV * channel blocks].

        dq = scale gamma dO S^T + (d_scores k with decay)
        dk = tail beta R dS^T - gamma dv S^T + (d_scores^T q and d_pairs k with decay)

    The gradient of an exponent is q times what passes through it of dq, and k times that of dk; log decays get those of the exponents that they stand
    in. Pairs of a token with itself have no exponent.
    """
    block, hv, chunk = program_place((K + W - 1) // W, HV)
    first = block * W
    start, rows = chunk_rows(chunk, cu_seqlens, chunk_table, T, per_row, PACKED)
    tile = int64(chunk) * HV + hv
    q += hv // GROUP * K
    k += hv // GROUP * K
    g += hv * K
    high, low = apart(load_log_decay(g, start, rows, HV * K, first, K, W), WIDE)
    q_rows = load_rows(q, start, rows, q_stride, first, K, W)
    k_rows = load_rows(k, start, rows, k_stride, first, K, W)
    itself = diagonal(load_square(d_scores, tile).to(tl.float32))[:, None]
    channel = first + tl.arange(0, W)

    total = tl.zeros((C, W), tl.float32)
    overlap = tl.zeros((W,), tl.float32)
    for column in tl.range(0, V, BV, num_stages=STAGES):
        state = load_block(states, tile, column, first, V, K, BV, W)
        total = add_dot(total, load_rows(do + hv * V, start, rows, HV * V, column, V, BV), state, WIDE)
        overlap += tl.sum(state.to(tl.float32) * load_block(d_states, tile, column, first, V, K, BV, W).to(tl.float32), 0)
    total_g = tl.zeros((C, W), tl.float32) + (tl.load(last + tile * K + channel, mask=channel < K, other=0.0) * overlap)[None, :]
    held = load_square(sums, GAMMA)
    total *= decays(held, high, low, WIDE) * scale
    total_g = add_sums(total_g, held, total * q_rows.to(tl.float32), WIDE)
    total += itself * k_rows.to(tl.float32)
    for level in tl.range(0, LEVELS, num_stages=1):
        held = load_square(sums, level)
        factor = decays(held, high, low, WIDE)
        found = dot(parted(load_square(d_scores, tile), level), (k_rows.to(tl.float32) * factor).to(k_rows.dtype), WIDE) * factor
        total += found
        total_g = add_sums(total_g, held, found * q_rows.to(tl.float32), WIDE)
    store_tokens(dq + hv * K, total, start, rows, HV * K, first, K, W)

    total = tl.zeros((C, W), tl.float32)
    for column in tl.range(0, V, BV, num_stages=STAGES):
        state = load_block(states, tile, column, first, V, K, BV, W)
        total = add_dot(total, load_rows(dv + hv * V, start, rows, HV * V, column, V, BV), state, WIDE)
    held = load_square(sums, GAMMA)
    total *= -decays(held, high, low, WIDE)
    total_g = add_sums(total_g, held, total * k_rows.to(tl.float32), WIDE)
    tails = tl.zeros((C, W), tl.float32)
    for column in tl.range(0, V, BV, num_stages=STAGES):
        d_state = load_block(d_states, tile, column, first, V, K, BV, W)
        tails = add_dot(tails, load_rows(errors + hv * V, start, rows, HV * V, column, V, BV), d_state, WIDE)
    held = load_square(sums, TAIL)
    tails *= decays(held, high, low, WIDE) * load_strength(beta, start, rows, hv, HV)[:, None]
    total_g = add_sums(total_g, held, tails * k_rows.to(tl.float32), WIDE)
    total += tails + itself * load_rows(q, start, rows, q_stride, first, K, W).to(tl.float32)
    for level in tl.range(0, LEVELS, num_stages=1):
        held = load_square(sums, level)
        factor = decays(held, high, low, WIDE)
        found = dot(parted(load_square(d_pairs, tile), level), (k_rows.to(tl.float32) * factor).to(k_rows.dtype), WIDE)
        seen = tl.trans(parted(load_square(d_scores, tile), level))
        found = add_dot(found, seen, (q_rows.to(tl.float32) * factor).to(k_rows.dtype), WIDE) * factor
        total += found
        total_g = add_sums(total_g, held, found * k_rows.to(tl.float32), WIDE)
    store_tokens(dk + hv * K, total, start, rows, HV * K, first, K, W)
    kept = load_rows(g, start, rows, HV * K, first, K, W).to(tl.float32) >= SMALLEST_LOG_DECAY
    store_tokens(dg + hv * K, tl.where(kept, total_g, 0.0), start, rows, HV * K, first, K, W)
