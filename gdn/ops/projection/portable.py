"""In Triton, any GPU from sm_80 on; the matrix products by torch, but for those of a few tokens (portable_few.py). One pass of the backward
makes gradients and, over the gradient of the product, the product itself."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64, sigmoid_for
from gdn.core.portable_rows import fresh
from gdn.ops.norm import portable as norm
from gdn.ops.projection import portable_few, recompute

COLUMNS = 1024
"""Of a row, a program's: a vector of 16 bytes for each thread and tensor in 16 bits."""


@triton.jit
def places(N, BN: tl.constexpr):
    """The row of a program, its columns and which of them exist. Programs that run together are neighbours in memory."""
    blocks = tl.cdiv(N, BN)
    c = tl.program_id(0) % blocks * BN + tl.arange(0, BN)
    return int64(tl.program_id(0) // blocks), c, c < N


@triton.jit
def swiglu_kernel(x, y, N, BN: tl.constexpr):
    """x [count, 2 N], y [count, N]. Grid [count * column blocks]."""
    r, c, valid = places(N, BN)
    gate = tl.load(x + r * 2 * N + c, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(x + r * 2 * N + N + c, mask=valid, other=0.0).to(tl.float32)
    tl.store(y + r * N + c, (gate * sigmoid_for(gate, y.dtype.element_ty) * up).to(y.dtype.element_ty), mask=valid)


@triton.jit
def swiglu_backward_kernel(x, slope, dx, N, BN: tl.constexpr):
    """The gradient of x, and the product over its gradient `slope [count, N]`. Grid as forward."""
    r, c, valid = places(N, BN)
    gate = tl.load(x + r * 2 * N + c, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(x + r * 2 * N + N + c, mask=valid, other=0.0).to(tl.float32)
    dy = tl.load(slope + r * N + c, mask=valid, other=0.0).to(tl.float32)
    s = sigmoid_for(gate, dx.dtype.element_ty)
    opened = gate * s
    tl.debug_barrier()  # all of the slope is read before any of it is overwritten
    tl.store(slope + r * N + c, (opened * up).to(slope.dtype.element_ty), mask=valid)
    tl.store(dx + r * 2 * N + c, (dy * up * (s + opened * (1.0 - s))).to(dx.dtype.element_ty), mask=valid)
    tl.store(dx + r * 2 * N + N + c, (dy * opened).to(dx.dtype.element_ty), mask=valid)


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `gdn.ops.swiglu_linear`."""
    return _SWIGLU(x, weight)[0]


def gated_rms_norm_linear(x: Tensor, gate: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """See `gdn.ops.gated_rms_norm_linear`."""
    return _GATED_RMS_NORM(x, gate, norm_weight, weight, eps, silu)[0]


def _product(x: Tensor) -> Tensor:
    N = x.shape[-1] // 2
    y = torch.empty((*x.shape[:-1], N), dtype=x.dtype, device=x.device)
    launch(swiglu_kernel, _grid(y), x.contiguous(), y, N, COLUMNS)
    return y


def _product_backward(x: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    dx = fresh(x)
    launch(swiglu_backward_kernel, _grid(slope), x.contiguous(), slope, dx, slope.shape[-1], COLUMNS)
    return dx, slope


def _grid(y: Tensor) -> tuple[int]:
    """Programs for y `[..., N]`."""
    N = y.shape[-1]
    return (y.numel() // max(N, 1) * -(-N // COLUMNS),)


def _norm(x: Tensor, gate: Tensor, norm_weight: Tensor, eps: float, silu: bool, keep: bool) -> tuple[Tensor, Tensor]:
    return norm.run(x, gate, norm_weight, eps, x.shape[-1], keep, silu)


def _norm_backward(
    x: Tensor, gate: Tensor, norm_weight: Tensor, inverse: Tensor, slope: Tensor, eps: float, silu: bool
) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], Tensor]:
    y = fresh(x)
    return norm.run_backward(x, gate, norm_weight, inverse, slope, x.shape[-1], silu, y), y


_SWIGLU = recompute.swiglu_linear(
    "gdn::swiglu_linear_portable",
    _product,
    _product_backward,
    whole=portable_few.swiglu_linear,
    linear=portable_few.linear,
    replay=True,
)
_GATED_RMS_NORM = recompute.gated_rms_norm_linear(
    "gdn::gated_rms_norm_linear_portable",
    _norm,
    _norm_backward,
    whole=portable_few.gated_rms_norm_linear,
    linear=portable_few.linear,
    replay=True,
)
