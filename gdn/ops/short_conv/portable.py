"""The short convolution in Triton, any GPU from sm_80 on: forward, backward and step read each number once.

A program walks along a piece of a sequence with some channels, the last W - 1 inputs in registers. Backward it walks the same way: z and
dz = dy act'(z) are made again, dz goes at once into the gradients of the W inputs that it reaches, and the oldest of these is complete and
written. Such a piece begins W - 1 tokens early for the inputs and ends W - 1 tokens late for the gradients. The gradient of the filter is
summed along the piece in registers, and over the pieces in a second pass: no atomics, one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import InPlace, Opaque
from gdn.core.packing import Packing
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64, sigmoid_for

AT_ONCE = 4
"""Tokens whose loads are issued together, while the tokens before them are computed."""
LONG = 256
"""Most tokens of a piece."""
MANY_WARPS = 8192
"""Pieces are halved until there are so many warps of the backward pass, two to three waves of a large GPU."""


@triton.jit
def place(documents, positions, row, t, T):
    """Sequence of token t, and its place there."""
    if documents is None:
        return row, t
    else:
        return int64(tl.load(documents + t, mask=t < T, other=0)), tl.load(positions + t, mask=t < T, other=0)


@triton.jit
def past_input(x, state, n, p, j: tl.constexpr, x_token, state_row, d, inside, D: tl.constexpr, W: tl.constexpr):
    """The input j tokens before place p of sequence n, from its state where that is before the beginning. x points at place p."""
    value = tl.load(x - j * x_token + d, mask=inside & (p >= j), other=0.0).to(tl.float32)
    if state is not None:
        row = tl.where(p < j, W - 1 + p - j, 0)
        kept = tl.load(state + n * state_row + row * D + d, mask=inside & (p < j), other=0.0)
        value += kept.to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def past_inputs(x, state, n, p, x_token, state_row, d, inside, D: tl.constexpr, W: tl.constexpr):
    """The last W - 1 inputs before place p of sequence n, youngest first."""
    window = ()
    for j in tl.static_range(1, W):
        window = window + (past_input(x, state, n, p, j, x_token, state_row, d, inside, D, W),)
    return window


@triton.jit
def inputs_from(x, t, T, x_token, inside, U: tl.constexpr):
    """Numbers of the U tokens from t on, zeros past the end of the row. x points at token t."""
    inputs = ()
    for u in tl.static_range(U):
        inputs = inputs + (tl.load(x, mask=inside & (t + u < T), other=0.0),)
        x += x_token
    return inputs


@triton.jit
def push(now, window):
    """The window one token later."""
    out = ()
    for j in tl.static_range(len(window)):
        out = out + (now if j == 0 else window[j - 1],)
    return out


@triton.jit
def restart(window, state, n, p, x, state_row, d, inside, D: tl.constexpr, W: tl.constexpr):
    """The window, or what stands before sequence n if p is its first place."""
    out = ()
    for j in tl.static_range(1, W):
        value = tl.where(p == 0, 0.0, window[j - 1])
        if state is not None:
            kept = tl.load(state + n * state_row + (W - 1 - j) * D + d, mask=inside & (p == 0), other=0.0)
            value += kept.to(x.dtype.element_ty).to(tl.float32)
        out = out + (value,)
    return out


@triton.jit
def taps(weight, d, inside, W: tl.constexpr):
    """The filter, the tap for the current token first."""
    out = ()
    for j in tl.static_range(W):
        out = out + (tl.load(weight + d * W + (W - 1 - j), mask=inside, other=0.0).to(tl.float32),)
    return out


@triton.jit
def filtered(now, window, filters, bias, W: tl.constexpr):
    z = now * filters[0] + bias
    for j in tl.static_range(1, W):
        z += window[j - 1] * filters[j]
    return z


@triton.jit
def load_bias(bias, d, inside):
    if bias is None:
        return tl.zeros(d.shape, tl.float32)
    else:
        return tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x, weight, bias, state, y, documents, positions, T, pieces, x_row, x_token,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, U: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """y of L tokens. Grid [rows * pieces * channel blocks]."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    d = program % blocks * BD + tl.arange(0, BD)
    inside = d < D
    row = int64(program // blocks // pieces)
    begin = program // blocks % pieces * L
    x += row * x_row
    y += row * T * D + d
    filters = taps(weight, d, inside, W)
    shift = load_bias(bias, d, inside)
    n, p = place(documents, positions, row, begin, T)
    window = past_inputs(x + int64(begin) * x_token, state, n, p, x_token, (W - 1) * D, d, inside, D, W)
    coming = inputs_from(x + int64(begin) * x_token + d, begin, T, x_token, inside, U)
    for start in range(begin, tl.minimum(begin + L, T), U):
        inputs = coming
        coming = inputs_from(x + int64(start + U) * x_token + d, start + U, T, x_token, inside, U)
        for u in tl.static_range(U):
            t = start + u
            now = inputs[u].to(tl.float32)
            if documents is not None:
                n, p = place(documents, positions, row, t, T)
                window = restart(window, state, n, p, x, (W - 1) * D, d, inside, D, W)
            z = filtered(now, window, filters, shift, W)
            if SILU:
                z *= sigmoid_for(z, y.dtype.element_ty)
            tl.store(y + int64(t) * D, z.to(y.dtype.element_ty), mask=inside & (t < T))
            window = push(now, window)


@triton.jit
def final_kernel(
    x, state, final, cu_seqlens, T, x_row, x_token,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The last W - 1 inputs of each sequence. Grid [N * channel blocks]."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    n = int64(tl.program_id(0) // blocks)
    first, length = bounds(cu_seqlens, n, T)
    x += first * x_token if cu_seqlens is not None else n * x_row
    for j in tl.static_range(1, W):
        value = past_input(x + int64(length) * x_token, state, n, length, j, x_token, (W - 1) * D, d, d < D, D, W)
        tl.store(final + (n * (W - 1) + (W - 1 - j)) * D + d, value.to(final.dtype.element_ty), mask=d < D)


@triton.jit
def bounds(cu_seqlens, n, T):
    """First token of sequence n in its row (or the flattened rows), and its length."""
    if cu_seqlens is None:
        return int64(0), T
    else:
        first = tl.load(cu_seqlens + n)
        return int64(first), tl.load(cu_seqlens + n + 1) - first


@triton.jit
def through_silu(dy, z, dtype: tl.constexpr, SILU: tl.constexpr):
    if SILU:
        s = sigmoid_for(z, dtype)
        return dy * s * (1.0 + z * (1.0 - s))
    else:
        return dy


@triton.jit
def reach(dz, filters, waiting, p, W: tl.constexpr):
    """The gradients of the inputs that a token at place p reaches, youngest first, from those that wait for more: the last is complete.

    Without p all are reached: before the beginning of a row nobody writes them.
    """
    reached = ()
    for j in tl.static_range(W):
        gradient = dz * filters[j]
        if j > 0:
            if p is not None:
                gradient = tl.where(p >= j, gradient, 0.0)
            gradient += waiting[j - 1]
        reached = reached + (gradient,)
    return reached


@triton.jit
def sum_taps(sums, dz, now, window, W: tl.constexpr):
    """The gradient of each tap with a token's share."""
    added = ()
    for j in tl.static_range(W):
        added = added + (sums[j] + dz * (now if j == 0 else window[j - 1]),)
    return added


@triton.jit
def backward_kernel(
    x, weight, bias, state, dy, dx, partial, documents, positions, T, pieces, x_row, x_token,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, L: tl.constexpr, U: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """dx of L tokens, and what they add to the gradients of the filter and the bias: partial [rows * pieces, W + 1, D]. Grid as forward."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    d = program % blocks * BD + tl.arange(0, BD)
    inside = d < D
    piece = program // blocks
    row = int64(piece // pieces)
    begin = piece % pieces * L
    end = tl.minimum(begin + L, T)
    x += row * x_row
    dy += row * T * D + d
    dx += row * T * D + d
    filters = taps(weight, d, inside, W)
    shift = load_bias(bias, d, inside)
    n, p = place(documents, positions, row, begin, T)
    window = past_inputs(x + int64(begin) * x_token, state, n, p, x_token, (W - 1) * D, d, inside, D, W)
    nothing = tl.zeros((BD,), tl.float32)
    waiting = ()
    sums = (nothing,)
    for j in tl.static_range(1, W):
        waiting = waiting + (nothing,)
        sums = sums + (nothing,)
    sums = sums + (nothing,)
    coming = inputs_from(x + int64(begin) * x_token + d, begin, T, x_token, inside, U)
    coming_slopes = inputs_from(dy + int64(begin) * D, begin, T, D, inside, U)
    for start in range(begin, end + W - 1, U):
        inputs, slopes = coming, coming_slopes
        coming = inputs_from(x + int64(start + U) * x_token + d, start + U, T, x_token, inside, U)
        coming_slopes = inputs_from(dy + int64(start + U) * D, start + U, T, D, inside, U)
        for u in tl.static_range(U):
            t = start + u
            now = inputs[u].to(tl.float32)
            if documents is not None:
                n, p = place(documents, positions, row, t, T)
                window = restart(window, state, n, p, x, (W - 1) * D, d, inside, D, W)
            dz = through_silu(slopes[u].to(tl.float32), filtered(now, window, filters, shift, W), dx.dtype.element_ty, SILU)
            mine = tl.where(t < end, dz, 0.0)
            sums = sum_taps(sums, mine, now, window, W) + (sums[W] + mine,)
            reached = reach(dz, filters, waiting, None if documents is None else p, W)
            done = t - (W - 1)
            tl.store(dx + int64(done) * D, reached[W - 1].to(dx.dtype.element_ty), mask=inside & (done >= begin) & (done < end))
            waiting = ()
            for j in tl.static_range(W - 1):
                waiting = waiting + (reached[j],)
            window = push(now, window)
    for j in tl.static_range(W):
        tl.store(partial + (int64(piece) * (W + 1) + (W - 1 - j)) * D + d, sums[j], mask=inside)
    tl.store(partial + (int64(piece) * (W + 1) + W) * D + d, sums[W], mask=inside)


@triton.jit
def ends_kernel(
    x, weight, bias, state, dy, d_final, dx, d_initial, cu_seqlens, T, x_row, x_token,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """The gradient of the initial state, and what that of the final state adds to dx. Grid [N * channel blocks]."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = d < D
    n = int64(tl.program_id(0) // blocks)
    first, length = bounds(cu_seqlens, n, T)
    row = n if cu_seqlens is None else int64(0)
    if d_final is not None:
        for j in tl.static_range(1, W):
            slope = tl.load(d_final + (n * (W - 1) + (W - 1 - j)) * D + d, mask=inside, other=0.0).to(tl.float32)
            at = dx + (row * T + first + length - j) * D + d
            there = inside & (length >= j)
            tl.store(at, (tl.load(at, mask=there, other=0.0).to(tl.float32) + slope).to(dx.dtype.element_ty), mask=there)
    if state is not None:
        filters = taps(weight, d, inside, W)
        shift = load_bias(bias, d, inside)
        slopes = ()
        for p in tl.static_range(W - 1):
            there = inside & (p < length)
            at = x + row * x_row + (first + p) * x_token
            window = past_inputs(at, state, n, p, x_token, (W - 1) * D, d, there, D, W)
            z = filtered(tl.load(at + d, mask=there, other=0.0).to(tl.float32), window, filters, shift, W)
            slope = tl.load(dy + (row * T + first + p) * D + d, mask=there, other=0.0).to(tl.float32)
            slopes = slopes + (through_silu(slope, z, dx.dtype.element_ty, SILU),)
        for i in tl.static_range(W - 1):
            total = tl.zeros((BD,), tl.float32)
            for p in tl.static_range(i + 1):
                total += slopes[p] * filters[W - 1 - i + p]
            if d_final is not None:
                kept = tl.where(i >= length, i - length, 0)
                total += tl.load(d_final + (n * (W - 1) + kept) * D + d, mask=inside & (i >= length), other=0.0).to(tl.float32)
            tl.store(d_initial + (n * (W - 1) + i) * D + d, total.to(d_initial.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["pool"])
def step_kernel(
    x, weight, bias, state, slots, y, T, x_row, x_token, state_row, pool,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Some more tokens of one sequence, its state moved on. Grid [B * channel blocks]. From a row that the pool does not have, no number."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    d = tl.program_id(0) % blocks * BD + tl.arange(0, BD)
    inside = d < D
    b = int64(tl.program_id(0) // blocks)
    x += b * x_row + d
    y += b * T * D + d
    if slots is not None:
        n = int64(tl.load(slots + b))
    else:
        n = b
    if (n < 0) | (n >= pool):
        nothing = tl.where(n < 0, 0.0, float("nan"))
        for t in range(T):
            tl.store(y + int64(t) * D, (tl.zeros((BD,), tl.float32) + nothing).to(y.dtype.element_ty), mask=inside)
    else:
        filters = taps(weight, d, inside, W)
        shift = load_bias(bias, d, inside)
        window = past_inputs(x, state, n, 0, x_token, state_row, d, inside, D, W)
        for t in range(T):
            now = tl.load(x + int64(t) * x_token, mask=inside, other=0.0).to(tl.float32)
            z = filtered(now, window, filters, shift, W)
            if SILU:
                z *= sigmoid_for(z, y.dtype.element_ty)
            tl.store(y + int64(t) * D, z.to(y.dtype.element_ty), mask=inside)
            window = push(now, window)
        for j in tl.static_range(1, W):
            tl.store(state + n * state_row + (W - 1 - j) * D + d, window[j - 1].to(state.dtype.element_ty), mask=inside)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.causal_conv1d`."""
    bounds = (None, None, None) if packing is None else (packing.cu_seqlens, packing.documents, packing.positions)
    y, final_state = _CONV(x, weight, bias, initial_state, *bounds, activation == "silu")
    return y, final_state


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    documents: Tensor | None,
    positions: Tensor | None,
    silu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    x, weight, bias = dense(x, documents is not None), weight.contiguous(), _contiguous(bias)
    initial_state = _contiguous(initial_state)
    B, T, D = x.shape
    W = weight.shape[1]
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    final = torch.empty((_sequences(x, cu_seqlens), W - 1, D), dtype=x.dtype, device=x.device)
    rows, length = (B, T) if documents is None else (1, B * T)
    BD, L, pieces, blocks, warps = _sizes(rows, length, D)
    launch(
        forward_kernel, (rows * pieces * blocks,), x, weight, bias, initial_state, y, documents, positions, length, pieces, x.stride(0),
        x.stride(1), D, W, BD, L, AT_ONCE, silu, warps=-(-warps // 2) if L == LONG else warps,
    )  # fmt: skip
    if W > 1:
        launch(
            final_kernel, (final.shape[0] * blocks,), x, initial_state, final, cu_seqlens, length, x.stride(0), x.stride(1), D, W, BD,
            warps=warps,
        )  # fmt: skip
    return y, final


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    documents: Tensor | None,
    positions: Tensor | None,
    silu: bool,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(_sequences(x, cu_seqlens), weight.shape[1] - 1, x.shape[2])


def _backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    x, weight, bias, initial_state, cu_seqlens, documents, positions, silu = args
    dy, d_final = grads
    x, taps_, bias, state = dense(x, documents is not None), weight.contiguous(), _contiguous(bias), _contiguous(initial_state)
    B, T, D = x.shape
    W = weight.shape[1]
    dy = torch.zeros((B, T, D), dtype=x.dtype, device=x.device) if dy is None else dy.contiguous()
    dx = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    rows, length = (B, T) if documents is None else (1, B * T)
    BD, L, pieces, blocks, warps = _sizes(rows, length, D)
    partial = torch.empty((rows * pieces, W + 1, D), dtype=torch.float32, device=x.device)
    launch(
        backward_kernel, (rows * pieces * blocks,), x, taps_, bias, state, dy, dx, partial, documents, positions, length, pieces,
        x.stride(0), x.stride(1), D, W, BD, L, AT_ONCE, silu, warps=warps,
    )  # fmt: skip
    d_initial = None if state is None else torch.empty_like(state)
    if W > 1 and (d_final is not None or state is not None):
        launch(
            ends_kernel, (_sequences(x, cu_seqlens) * blocks,), x, taps_, bias, state, dy, _contiguous(d_final), dx, d_initial, cu_seqlens,
            length, x.stride(0), x.stride(1), D, W, BD, silu, warps=warps,
        )  # fmt: skip
    d_weight = partial[:, :W].sum(0).T.to(weight.dtype)
    return [dx, d_weight, None if bias is None else partial[:, W].sum(0).to(bias.dtype), d_initial]


def _sizes(rows: int, length: int, D: int) -> tuple[int, int, int, int, int]:
    """Channels of a program, tokens of a piece, pieces of a row, blocks of channels, warps."""
    BD = min(512, max(32, 1 << max(D - 1, 0).bit_length()))
    warps = max(1, BD // 128)
    blocks = -(-D // BD)
    L = tokens_of_a_piece(rows, length, blocks * warps)
    return BD, L, -(-length // L), blocks, warps


def tokens_of_a_piece(rows: int, length: int, warps: int) -> int:
    """Tokens of a program, by the warps that a piece of a row takes."""
    L = LONG
    while L > 16 and rows * -(-length // L) * warps < MANY_WARPS:
        L //= 2
    return L


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> int:
    return x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def dense(x: Tensor, flat: bool) -> Tensor:
    """x [B, T, D], copied unless channels are dense, and all tokens evenly spaced if they are to be one row."""
    if x.stride(2) == 1 and not (flat and x.shape[0] > 1 and x.stride(0) != x.shape[1] * x.stride(1)):
        return x
    return x.contiguous().view(-1).view(x.shape)  # contiguous rows of one token may have any stride over tokens


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


_CONV = Opaque(
    "gdn::causal_conv1d_portable",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("x", "weight", "bias", "initial_state"),
    replay=True,
    expected=1,
)


def causal_conv1d_step(
    x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    """See `gdn.ops.causal_conv1d_step`."""
    return _STEP(x, weight, state, bias, slots, activation == "silu")


def _step(x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, slots: Tensor | None, silu: bool) -> Tensor:
    x, weight, bias, slots = dense(x, False), weight.contiguous(), _contiguous(bias), _contiguous(slots)
    B, T, D = x.shape
    W = weight.shape[1]
    y = torch.empty((B, T, D), dtype=x.dtype, device=x.device)
    memory = state if state.stride()[1:] == (D, 1) else state.contiguous()
    BD = min(256, max(32, 1 << max(D - 1, 0).bit_length()))
    launch(
        step_kernel, (B * -(-D // BD),), x, weight, bias, memory, slots, y, T, x.stride(0), x.stride(1), memory.stride(0), memory.shape[0],
        D, W, BD, silu, warps=max(1, BD // 64),
    )  # fmt: skip
    if memory is not state:
        state.copy_(memory)
    return y


def _step_fake(x: Tensor, weight: Tensor, state: Tensor, bias: Tensor | None, slots: Tensor | None, silu: bool) -> Tensor:
    return x.new_empty(x.shape)


_STEP = InPlace("gdn::causal_conv1d_step_portable", _step, mutates=("state",), fake=_step_fake, replay=True)
