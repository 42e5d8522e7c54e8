"""The norms in Triton, any GPU from sm_80 on: one pass forward, one backward.

All are y = x r [weight] [silu(gate) or sigmoid(gate)] with r = 1 / sqrt(sum of x^2 / divisor + eps), so they share one kernel each
way, in which absent arguments cost nothing. The backward keeps r. The gradient of the weight is summed by each of at most `PARTS` programs over
its rows, then over the programs: no atomics, one order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import Opaque
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64, sigmoid_for
from gdn.core.portable_rows import fresh, power_of_two, rows

PARTS = 1024
"""Most programs of a backward pass that sums a gradient over rows."""
TILE = 2048
"""Numbers of a tile of four warps. Backward twice as many for vectors of 1024 and 2048 (notes/memory_speed.md)."""

Saved = tuple[Tensor, ...]
Grads = Sequence[Tensor | None]


@triton.jit
def vectors(r, group, outer, inner, c):
    """Offsets of the numbers of the vectors r (int64), see `gdn.core.portable_rows`."""
    return (r // group * outer + r % group * inner)[:, None] + c[None, :]


@triton.jit
def norm_kernel(
    x, residual, total, gate, weight, y, inverse, eps, count, x_group, x_outer, x_inner, gate_group, gate_outer, gate_inner,
    DIVISOR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """BR vectors; with a residual `[count, D]` those of `total = x + residual`, which is written. Grid [row blocks]."""
    r = int64(tl.program_id(0)) * BR + tl.arange(0, BR)
    c = tl.arange(0, BD)
    valid = (r < count)[:, None] & (c < D)[None, :]
    value = tl.load(x + vectors(r, x_group, x_outer, x_inner, c), mask=valid, other=0.0).to(tl.float32)
    at = r[:, None] * D + c[None, :]
    if residual is not None:
        value += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=valid)
        value = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / DIVISOR + eps)
    if inverse is not None:
        tl.store(inverse + r, scale, mask=r < count)
    out = value * scale[:, None]
    if weight is not None:
        out *= tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    if gate is not None:
        z = tl.load(gate + vectors(r, gate_group, gate_outer, gate_inner, c), mask=valid, other=0.0).to(tl.float32)
        s = sigmoid_for(z, y.dtype.element_ty)
        out *= z * s if SILU else s
    tl.store(y + at, out.to(y.dtype.element_ty), mask=valid)


@triton.jit
def norm_backward_kernel(
    x, gate, weight, inverse, dy, dtotal, dx, dgate, partial, y, count, each, x_group, x_outer, x_inner, gate_group, gate_outer, gate_inner,
    DIVISOR: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """`each` blocks of BR vectors one after another; `dtotal`, if given, is added to the gradient of x, and y, if wanted, is the result of the
    forward pass again. Grid [parts]."""
    part = int64(tl.program_id(0))
    c = tl.arange(0, BD)
    if weight is not None:
        w = tl.load(weight + c, mask=c < D, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((BR, BD), tl.float32)
    for step in range(each):
        r = (part * each + step) * BR + tl.arange(0, BR)
        valid = (r < count)[:, None] & (c < D)[None, :]
        at = r[:, None] * D + c[None, :]
        scale = tl.load(inverse + r, mask=r < count, other=0.0)
        unit = tl.load(x + vectors(r, x_group, x_outer, x_inner, c), mask=valid, other=0.0).to(tl.float32) * scale[:, None]
        slope = tl.load(dy + at, mask=valid, other=0.0).to(tl.float32)
        if gate is not None:
            z = tl.load(gate + vectors(r, gate_group, gate_outer, gate_inner, c), mask=valid, other=0.0).to(tl.float32)
            s = sigmoid_for(z, dx.dtype.element_ty)
            more = 1.0 + z * (1.0 - s) if SILU else 1.0 - s
            if y is not None:
                tl.store(y + at, (unit * w * (z * s if SILU else s)).to(y.dtype.element_ty), mask=valid)
            tl.store(dgate + at, (slope * unit * w * s * more).to(dgate.dtype.element_ty), mask=valid)
            slope *= z * s if SILU else s
        if weight is not None:
            total += slope * unit
            slope *= w
        along = tl.sum(slope * unit, 1) / DIVISOR
        slope = (slope - unit * along[:, None]) * scale[:, None]
        if dtotal is not None:
            slope += tl.load(dtotal + at, mask=valid, other=0.0).to(tl.float32)
        tl.store(dx + at, slope.to(dx.dtype.element_ty), mask=valid)
    if weight is not None:
        tl.store(partial + part * D + c, tl.sum(total, 0), mask=c < D)


def l2norm(x: Tensor, eps: float) -> Tensor:
    """See `gdn.ops.l2norm`."""
    return _L2NORM(x, eps)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `gdn.ops.rms_norm`."""
    return _RMS_NORM(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.add_rms_norm`."""
    y, total = _ADD_RMS_NORM(x, residual, weight, eps)
    return y, total


def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool = True) -> Tensor:
    """See `gdn.ops.gated_rms_norm`."""
    return _GATED_RMS_NORM(x, gate, weight, eps, silu)[0]


def run(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    eps: float,
    divisor: int,
    keep: bool,
    silu: bool = True,
    residual: Tensor | None = None,
    total: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y, and for the backward pass the inverse of each vector's length or root mean square. With a residual y is of x + residual, which is
    written to `total`, dense."""
    y, inverse = fresh(x), _empty_inverse(x, keep)
    D = x.shape[-1]
    count = x.numel() // D
    BD, BR, warps = _sizes(D, TILE)
    x, *layout = rows(x)
    gate, *gate_layout = (None, 1, 1, 1) if gate is None else rows(gate)
    weight = None if weight is None else weight.contiguous()
    launch(
        norm_kernel, (-(-count // BR),), x, None if residual is None else residual.contiguous(), total, gate, weight, y,
        inverse if keep else None, eps, count, *layout, *gate_layout, divisor, D, BD, BR, silu, warps=warps,
    )  # fmt: skip
    return y, inverse


def run_backward(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    inverse: Tensor,
    dy: Tensor,
    divisor: int,
    silu: bool = True,
    y: Tensor | None = None,
    dtotal: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, gate and weight. y, dense, gets the result of the forward pass again, with a gate and a weight. `dtotal` is added to the
    gradient of x."""
    dx = fresh(x)
    dgate = None if gate is None else fresh(gate)
    D, count = x.shape[-1], inverse.numel()
    BD, BR, warps = _sizes(D, 2 * TILE if TILE < 4 * D <= 4 * TILE else TILE)
    blocks = -(-count // BR)
    each = max(1, -(-blocks // PARTS)) if weight is not None else 1
    parts = -(-blocks // each)
    partial = None if weight is None else torch.empty((parts, D), dtype=torch.float32, device=x.device)
    x, *layout = rows(x)
    gate, *gate_layout = (None, 1, 1, 1) if gate is None else rows(gate)
    launch(
        norm_backward_kernel, (parts,), x, gate, None if weight is None else weight.contiguous(), inverse, dy.contiguous(),
        None if dtotal is None else dtotal.contiguous(), dx, dgate, partial, y, count, each, *layout, *gate_layout, divisor, D, BD, BR, silu, warps=warps,
    )  # fmt: skip
    return dx, dgate, None if weight is None or partial is None else partial.sum(0).to(weight.dtype)


def _sizes(D: int, tile: int) -> tuple[int, int, int]:
    """Columns and rows of a program's tile, and its warps."""
    BD = power_of_two(D)
    return BD, max(1, tile // BD), min(16, 4 * max(1, BD // tile))


def _empty_inverse(x: Tensor, keep: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], 1) if keep else (0,), dtype=torch.float32)


def _l2norm(x: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    return run(x, None, None, eps, 1, keep)


def _l2norm_fake(x: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_inverse(x, keep)


def _l2norm_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor]:
    assert grads[0] is not None
    return [run_backward(args[0], None, None, saved[0], grads[0], 1)[0]]


def _rms_norm(x: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    return run(x, None, weight, eps, x.shape[-1], keep)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_inverse(x, keep)


def _rms_norm_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor | None]:
    x, weight, _ = args
    assert grads[0] is not None
    dx, _, dweight = run_backward(x, None, weight, saved[0], grads[0], x.shape[-1])
    return [dx, dweight]


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = fresh(x)
    y, inverse = run(x, None, weight, eps, x.shape[-1], keep, residual=residual, total=total)
    return y, total, inverse


def _add_rms_norm_fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape), _empty_inverse(x, keep)


def _add_rms_norm_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor | None]:
    _, _, weight, _ = args
    (total, inverse), (dy, dtotal) = saved, grads
    if dy is None:
        assert dtotal is not None
        return [dtotal.clone(), torch.zeros_like(weight)]
    dx, _, dweight = run_backward(total, None, weight, inverse, dy, total.shape[-1], dtotal=dtotal)
    return [dx, dweight]


def _gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    return run(x, gate, weight, eps, x.shape[-1], keep, silu)


def _gated_rms_norm_fake(x: Tensor, gate: Tensor, weight: Tensor, eps: float, silu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_inverse(x, keep)


def _gated_rms_norm_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor | None]:
    x, gate, weight, _, silu = args
    assert grads[0] is not None
    return list(run_backward(x, gate, weight, saved[0], grads[0], x.shape[-1], silu))


_L2NORM = Opaque("gdn::l2norm_portable", _l2norm, _l2norm_backward, fake=_l2norm_fake, results=1, differentiable=("x",), replay=True)
_RMS_NORM = Opaque(
    "gdn::rms_norm_portable", _rms_norm, _rms_norm_backward, fake=_rms_norm_fake, results=1, differentiable=("x", "weight"), replay=True
)
_ADD_RMS_NORM = Opaque(
    "gdn::add_rms_norm_portable",
    _add_rms_norm,
    _add_rms_norm_backward,
    fake=_add_rms_norm_fake,
    results=2,
    differentiable=("x", "weight"),
    follows={"residual": "x"},
    without={"x": 0, "residual": 0},
    saved_results=1,
    replay=True,
)
_GATED_RMS_NORM = Opaque(
    "gdn::gated_rms_norm_portable",
    _gated_rms_norm,
    _gated_rms_norm_backward,
    fake=_gated_rms_norm_fake,
    results=1,
    differentiable=("x", "gate", "weight"),
    replay=True,
)
