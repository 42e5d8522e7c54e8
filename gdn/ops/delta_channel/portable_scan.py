"""Triton kernels that carry the memory from chunk to chunk, forward and backward. Any GPU from sm_80 on.

A program owns BV columns of the memory of one value head and walks over a document. It holds them transposed, [BV, K] fp32 in registers, so that
they and what is made of them are first operands of products and never pass through memory. Decays of channels come multiplied in: `read` is
scale q from the begin of the chunk, `met` k from there, `written` k up to its end, `last` the decay over it. One chunk, letters as in
portable.py, forward and backward:

    R = Z - Phi beta Z,  Z = V - met S          O = read S + A (beta R)             S  <- last S + written^T (beta R)
    dU = X - Phi^T beta X                       X = A^T dO + written dS             dS <- last dS + read^T dO - met^T (beta dU)
"""

from __future__ import annotations

import triton
import triton.language as tl

from gdn.core.portable_math import int64
from gdn.ops.delta_channel.portable_solve import load_strength
from gdn.ops.delta_rule.portable_prepare import load_rows, load_rows_again
from gdn.ops.delta_rule.portable_scan import (
    add_dot,
    document_bounds,
    dot,
    exact_dot,
    load_square,
    load_state,
    program_place,
    store_rows,
    store_state,
    store_tile,
)


@triton.jit
def load_last(last, tile, K: tl.constexpr, BK: tl.constexpr):
    """The decay of each channel over a chunk, [1, BK]."""
    channel = tl.arange(0, BK)
    return tl.load(last + tile * K + channel, mask=channel < K, other=0.0)[None, :]


@triton.jit
def solved_errors(narrow, met, v, phi, beta, tile, start, rows, stride, first, HV, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                  BV: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """R of some columns of one chunk, transposed, [BV, 64]: what remains of the values, given the memory `narrow` [BV, BK]."""
    met_rows = load_rows_again(met, start, rows, HV * K, 0, K, BK)
    v_rows = load_rows_again(v, start, rows, stride, first, V, BV)
    z = tl.trans(v_rows).to(tl.float32) - dot(narrow, tl.trans(met_rows), WIDE)
    return z - dot((z * beta).to(met_rows.dtype), tl.trans(load_square(phi, tile)), WIDE)


@triton.jit
def output_kernel(
    read,
    met,
    written,
    last,
    v,
    beta,
    phi,
    scores,
    o,
    initial,
    final,
    cu_seqlens,
    chunk_offsets,
    T,
    per_row,
    v_stride,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """o and the final memories [documents, HV, K, V]. Grid [documents * HV * column blocks]."""
    block, hv, document = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
    slot = (int64(document) * HV + hv) * (K * V)
    state = tl.zeros((BV, BK), tl.float32)
    if initial is not None:
        state = load_state(initial + slot, first, K, V, BK, BV)
    for chunk in tl.range(c0, c1, num_stages=STAGES):
        inside = (chunk - c0) * 64
        start = token + inside
        rows = tl.minimum(length - inside, 64)
        tile = int64(chunk) * HV + hv
        strength = load_strength(beta, start, rows, hv, HV)[None, :]
        writing = load_rows_again(written + hv * K, start, rows, HV * K, 0, K, BK)
        narrow = state.to(writing.dtype)
        error = solved_errors(narrow, met + hv * K, v + hv * V, phi, strength, tile, start, rows, v_stride, first, HV, K, V, BK, BV, WIDE)
        u = (error * strength).to(writing.dtype)
        reading = load_rows_again(read + hv * K, start, rows, HV * K, 0, K, BK)
        out = dot(narrow, tl.trans(reading), WIDE)
        out = add_dot(out, u, tl.trans(load_square(scores, tile)), WIDE)
        store_rows(o + hv * V, out, start, rows, HV * V, first, V, BV)
        state = add_dot(state * load_last(last, tile, K, BK), u, writing, WIDE)
    store_state(final + slot, state, first, K, V, BK, BV)


@triton.jit
def states_kernel(
    met,
    written,
    last,
    v,
    beta,
    phi,
    states,
    errors,
    initial,
    cu_seqlens,
    chunk_offsets,
    T,
    per_row,
    v_stride,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """For the backward: the memory that each chunk meets, states [chunks, HV, V, K], and the errors R, [tokens, HV, V].
    Grid [documents * HV * column blocks]."""
    block, hv, document = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
    state = tl.zeros((BV, BK), tl.float32)
    if initial is not None:
        state = load_state(initial + (int64(document) * HV + hv) * (K * V), first, K, V, BK, BV)
    for chunk in tl.range(c0, c1, num_stages=STAGES):
        inside = (chunk - c0) * 64
        start = token + inside
        rows = tl.minimum(length - inside, 64)
        tile = int64(chunk) * HV + hv
        strength = load_strength(beta, start, rows, hv, HV)[None, :]
        writing = load_rows_again(written + hv * K, start, rows, HV * K, 0, K, BK)
        narrow = state.to(writing.dtype)
        store_tile(states, narrow, tile, first, V, K, BV, BK)
        error = solved_errors(narrow, met + hv * K, v + hv * V, phi, strength, tile, start, rows, v_stride, first, HV, K, V, BK, BV, WIDE)
        store_rows(errors + hv * V, error, start, rows, HV * V, first, V, BV)
        state = add_dot(state * load_last(last, tile, K, BK), (error * strength).to(writing.dtype), writing, WIDE)


@triton.jit
def backward_kernel(
    read,
    met,
    written,
    last,
    beta,
    phi,
    scores,
    do,
    d_states,
    dv,
    d_final,
    d_initial,
    cu_seqlens,
    chunk_offsets,
    T,
    per_row,
    HV,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The gradient of the memory after each chunk, d_states [chunks, HV, V, K], dU in the rows of dv, and d_initial.
    Grid [documents * HV * column blocks]."""
    block, hv, document = program_place((V + BV - 1) // BV, HV)
    first = block * BV
    c0, c1, token, length = document_bounds(document, cu_seqlens, chunk_offsets, T, per_row, PACKED)
    slot = (int64(document) * HV + hv) * (K * V)
    state = tl.zeros((BV, BK), tl.float32)
    if d_final is not None:
        state = load_state(d_final + slot, first, K, V, BK, BV)
    for step in tl.range(0, c1 - c0, num_stages=STAGES):
        chunk = c1 - 1 - step
        inside = (chunk - c0) * 64
        start = token + inside
        rows = tl.minimum(length - inside, 64)
        tile = int64(chunk) * HV + hv
        strength = load_strength(beta, start, rows, hv, HV)[None, :]
        writing = load_rows_again(written + hv * K, start, rows, HV * K, 0, K, BK)
        narrow = state.to(writing.dtype)
        store_tile(d_states, narrow, tile, first, V, K, BV, BK)
        do_columns = tl.trans(load_rows(do + hv * V, start, rows, HV * V, first, V, BV))
        x = dot(narrow, tl.trans(writing), WIDE)
        x = add_dot(x, do_columns, load_square(scores, tile), WIDE)
        x -= exact_dot((x * strength).to(writing.dtype), load_square(phi, tile), WIDE)
        store_rows(dv + hv * V, x, start, rows, HV * V, first, V, BV)
        reading = load_rows_again(read + hv * K, start, rows, HV * K, 0, K, BK)
        meeting = load_rows_again(met + hv * K, start, rows, HV * K, 0, K, BK)
        state = add_dot(state * load_last(last, tile, K, BK), do_columns, reading, WIDE)
        state = add_dot(state, (x * -strength).to(writing.dtype), meeting, WIDE)
    if d_initial is not None:
        store_state(d_initial + slot, state, first, K, V, BK, BV)
