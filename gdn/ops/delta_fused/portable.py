"""The core in Triton, any GPU from sm_80 on: what stands before the rule is one launch forward and one backward.

Queries and keys are normalised and both gates computed by programs of one kernel, each with its own share of one of the four. The rule
itself comes from its table. Gradients of A_log and dt_bias are summed by at most `PARTS` programs over their tokens, then over the programs.

What is not fused, and why, by an H200 at 8 x 4096 tokens with 16/32 heads of 128: the core takes 862 us and the rule 735 of them. The rest is
nearly all the 537 MB of queries and keys read and written once, 127 us at the copy bandwidth; a layer with a convolution does not pay them,
since `convolved_qkv` normalises what it has in registers. Both gates are 33 us forward and backward, of 4138.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import Opaque
from gdn.core.packing import Packing
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64, sigmoid
from gdn.core.portable_rows import fresh, power_of_two, rows
from gdn.ops.delta_fused import GateParameters
from gdn.ops.delta_rule import gated_delta_rule
from gdn.ops.gates.portable import BLOCK, decay, decay_gradients, parts_of
from gdn.ops.norm.portable import vectors

EPS = 1e-6
"""That of l2norm."""
TILE = 2048
"""Numbers of a program's tile of queries or keys."""


@triton.jit
def normalise(x, y, inverse, tile, count, group, outer, inner, eps, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    """BR vectors x at length one, and one over their lengths."""
    r = int64(tile) * BR + tl.arange(0, BR)
    c = tl.arange(0, BD)
    valid = (r < count)[:, None] & (c < D)[None, :]
    value = tl.load(x + vectors(r, group, outer, inner, c), mask=valid, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) + eps)
    tl.store(inverse + r, scale, mask=r < count)
    tl.store(y + r[:, None] * D + c[None, :], (value * scale[:, None]).to(y.dtype.element_ty), mask=valid)


@triton.jit
def normalise_backward(x, inverse, dy, dx, tile, count, group, outer, inner, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr):
    r = int64(tile) * BR + tl.arange(0, BR)
    c = tl.arange(0, BD)
    valid = (r < count)[:, None] & (c < D)[None, :]
    scale = tl.load(inverse + r, mask=r < count, other=0.0)[:, None]
    unit = tl.load(x + vectors(r, group, outer, inner, c), mask=valid, other=0.0).to(tl.float32) * scale
    slope = tl.load(dy + r[:, None] * D + c[None, :], mask=valid, other=0.0).to(tl.float32)
    along = tl.sum(slope * unit, 1)[:, None]
    tl.store(dx + r[:, None] * D + c[None, :], ((slope - unit * along) * scale).to(dx.dtype.element_ty), mask=valid)


@triton.jit
def prepare_kernel(
    q, k, a, b, A_log, dt_bias, q_unit, k_unit, g, beta, q_inverse, k_inverse, top, eps, tiles, count, numbers, HV,
    q_group, q_outer, q_inner, k_group, k_outer, k_inner, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid [tiles of q, tiles of k, blocks of gates]."""
    program = tl.program_id(0)
    if program < tiles:
        normalise(q, q_unit, q_inverse, program, count, q_group, q_outer, q_inner, eps, D, BD, BR)
    elif program < 2 * tiles:
        normalise(k, k_unit, k_inverse, program - tiles, count, k_group, k_outer, k_inner, eps, D, BD, BR)
    else:
        i = int64(program - 2 * tiles) * BLOCK + tl.arange(0, BLOCK)
        valid = i < numbers
        h = i % HV
        rate = tl.load(A_log + h, mask=valid, other=0.0).to(tl.float32)
        bias = tl.load(dt_bias + h, mask=valid, other=0.0).to(tl.float32)
        tl.store(g + i, decay(tl.load(a + i, mask=valid, other=0.0).to(tl.float32), rate, bias), mask=valid)
        tl.store(beta + i, top * sigmoid(tl.load(b + i, mask=valid, other=0.0).to(tl.float32)), mask=valid)


@triton.jit
def prepare_backward_kernel(
    q, k, a, b, A_log, dt_bias, q_inverse, k_inverse, dq_unit, dk_unit, dg, dbeta, dq, dk, da, db, partial, top, tiles, parts, count,
    tokens, each, HV, q_group, q_outer, q_inner, k_group, k_outer, k_inner,
    D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """partial [2, parts, HV]. Grid [parts of gates, tiles of q, tiles of k]: the longest first."""
    program = tl.program_id(0)
    if program >= parts + tiles:
        normalise_backward(k, k_inverse, dk_unit, dk, program - parts - tiles, count, k_group, k_outer, k_inner, D, BD, BR)
    elif program >= parts:
        normalise_backward(q, q_inverse, dq_unit, dq, program - parts, count, q_group, q_outer, q_inner, D, BD, BR)
    else:
        h = tl.arange(0, BH)
        rate = tl.load(A_log + h, mask=h < HV, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(dt_bias + h, mask=h < HV, other=0.0).to(tl.float32)[None, :]
        rates = tl.zeros((BT, BH), tl.float32)
        biases = tl.zeros((BT, BH), tl.float32)
        for step in range(each):
            t = (int64(program) * each + step) * BT + tl.arange(0, BT)
            valid = (t < tokens)[:, None] & (h < HV)[None, :]
            at = t[:, None] * HV + h[None, :]
            slope = tl.load(dg + at, mask=valid, other=0.0).to(tl.float32)
            of_a, of_rate = decay_gradients(tl.load(a + at, mask=valid, other=0.0).to(tl.float32), rate, bias, slope)
            tl.store(da + at, of_a.to(da.dtype.element_ty), mask=valid)
            rates += of_rate
            biases += of_a
            s = sigmoid(tl.load(b + at, mask=valid, other=0.0).to(tl.float32))
            slope = tl.load(dbeta + at, mask=valid, other=0.0).to(tl.float32)
            tl.store(db + at, (slope * top * s * (1.0 - s)).to(db.dtype.element_ty), mask=valid)
        tl.store(partial + program * HV + h, tl.sum(rates, 0), mask=h < HV)
        tl.store(partial + (parts + program) * HV + h, tl.sum(biases, 0), mask=h < HV)


def delta_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gates: GateParameters,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.delta_core`."""
    q, k, g, beta = _PREPARE(q, k, a, b, gates.A_log, gates.dt_bias, float(gates.top))
    return gated_delta_rule(q, k, v, g, beta, initial_state=initial_state, packing=packing)


def _forward(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, top: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Queries and keys of length one, g, beta; saved: one over the lengths of q and k."""
    out = _empty(q, a)
    D, count, BD, BR, tiles = _sizes(q)
    q, *q_layout = rows(q)
    k, *k_layout = rows(k)
    launch(
        prepare_kernel, (2 * tiles + -(-a.numel() // BLOCK),), q, k, a.contiguous(), b.contiguous(), A_log.contiguous(),
        dt_bias.contiguous(), *out, top, EPS, tiles, count, a.numel(), a.shape[2], *q_layout, *k_layout, D, BD, BR, BLOCK,
    )  # fmt: skip
    return out


def _empty(q: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape),
        a.new_empty(a.shape, dtype=torch.float32),
        a.new_empty(a.shape, dtype=torch.float32),
        q.new_empty(q.shape[:-1], dtype=torch.float32),
        q.new_empty(q.shape[:-1], dtype=torch.float32),
    )


def _fake(
    q: Tensor, k: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, top: float, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty(q, a)


def _backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor]:
    q, k, a, b, A_log, dt_bias, top = args
    q_inverse, k_inverse = saved
    slopes = [_dense(slope, like) for slope, like in zip(grads, (q, k, a, b), strict=True)]
    dq, dk, da, db = (fresh(x) for x in (q, k, a, b))
    D, count, BD, BR, tiles = _sizes(q)
    tokens, BH, BT, each, parts = parts_of(a.shape[0] * a.shape[1], a.shape[2])
    partial = torch.empty((2, parts, a.shape[2]), dtype=torch.float32, device=a.device)
    q, *q_layout = rows(q)
    k, *k_layout = rows(k)
    launch(
        prepare_backward_kernel, (parts + 2 * tiles,), q, k, a.contiguous(), b.contiguous(), A_log.contiguous(), dt_bias.contiguous(),
        q_inverse, k_inverse, *slopes, dq, dk, da, db, partial, top, tiles, parts, count, tokens, each, a.shape[2],
        *q_layout, *k_layout, D, BD, BR, BH, BT,
    )  # fmt: skip
    return [dq, dk, da, db, partial[0].sum(0), partial[1].sum(0)]


def _sizes(q: Tensor) -> tuple[int, int, int, int, int]:
    """Width, number of vectors, columns and rows of a tile, tiles."""
    D = q.shape[3]
    count = q.shape[0] * q.shape[1] * q.shape[2]
    BD = power_of_two(D)
    BR = max(1, TILE // BD)
    return D, count, BD, BR, -(-count // BR)


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device) if gradient is None else gradient.contiguous()


_PREPARE = Opaque(
    "gdn::delta_core_prepare_portable",
    _forward,
    _backward,
    fake=_fake,
    results=4,
    differentiable=("q", "k", "a", "b", "A_log", "dt_bias"),
    replay=True,
)
