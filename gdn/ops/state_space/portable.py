"""The parts of a state-space layer in Triton, any GPU from sm_80 on: one pass each way. Gradients of parameters are summed by each of at most `PARTS`
programs over its tokens, then over the programs: no atomics, one order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import Opaque
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64, sigmoid_for
from gdn.core.portable_rows import power_of_two, rows

TILE = 4096
"""Numbers of a program's tile where heads are scaled."""
PARTS = 1024
"""Most programs a group of a backward pass that sums gradients over tokens."""

Saved = tuple[Tensor, ...]
Grads = Sequence[Tensor | None]


@triton.jit
def scale_kernel(x, factor, y, count, group, outer, inner, P: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr):
    """BR heads of tokens. Grid [blocks of heads]."""
    r = int64(tl.program_id(0)) * BR + tl.arange(0, BR)
    c = tl.arange(0, BP)[None, :]
    valid = (r < count)[:, None] & (c < P)
    value = tl.load(x + (r // group * outer + r % group * inner)[:, None] + c, mask=valid, other=0.0).to(tl.float32)
    by = tl.load(factor + r, mask=r < count, other=0.0)[:, None]
    tl.store(y + r[:, None] * P + c, (value * by).to(y.dtype.element_ty), mask=valid)


@triton.jit
def scale_backward_kernel(
    x, factor, dy, dx, dfactor, count, group, outer, inner, P: tl.constexpr, BP: tl.constexpr, BR: tl.constexpr
):  # fmt: skip
    """BR heads of tokens. Grid [blocks of heads]."""
    r = int64(tl.program_id(0)) * BR + tl.arange(0, BR)
    c = tl.arange(0, BP)[None, :]
    valid = (r < count)[:, None] & (c < P)
    value = tl.load(x + (r // group * outer + r % group * inner)[:, None] + c, mask=valid, other=0.0).to(tl.float32)
    by = tl.load(factor + r, mask=r < count, other=0.0)[:, None]
    slope = tl.load(dy + r[:, None] * P + c, mask=valid, other=0.0).to(tl.float32)
    tl.store(dx + r[:, None] * P + c, (slope * by).to(dx.dtype.element_ty), mask=valid)
    tl.store(dfactor + r, tl.sum(slope * value, 1), mask=r < count)


@triton.jit
def gated_skip(y, x, gate, D, at, x_at, gate_at, c, d, inside):
    """y + D x, x, D and the gate, of the channels c of one token."""
    of_x = tl.load(x + x_at + c, mask=inside, other=0.0).to(tl.float32)
    skip = tl.load(D + d, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(y + at + c, mask=inside, other=0.0).to(tl.float32) + skip * of_x
    return value, of_x, skip, tl.load(gate + gate_at + c, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def skip_norm_kernel(
    y, x, D, gate, weight, out, inverse, eps, x_token, gate_token, groups, P: tl.constexpr, W: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """The W channels of a group of one token. Grid [tokens * groups]."""
    t = int64(tl.program_id(0)) // groups
    first = tl.program_id(0) % groups * W
    c = first + tl.arange(0, BW)
    inside = tl.arange(0, BW) < W
    at = t * groups * W
    value, _, _, z = gated_skip(y, x, gate, D, at, t * x_token, t * gate_token, c, c // P, inside)
    value *= z * sigmoid_for(z, out.dtype.element_ty)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / W + eps)
    tl.store(inverse + int64(tl.program_id(0)), scale)
    out_of = value * scale * tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at + c, out_of.to(out.dtype.element_ty), mask=inside)


@triton.jit
def skip_norm_backward_kernel(
    y, x, D, gate, weight, inverse, d_out, dy, dx, d_gate, partial, tokens, each, x_token, gate_token, groups,
    P: tl.constexpr, W: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """The W channels of a group, `each` tokens one after another; partial [2, parts, groups * W] is of weight, and of D channel by channel.
    Grid [parts * groups]."""
    part = int64(tl.program_id(0)) // groups
    group = tl.program_id(0) % groups
    c = group * W + tl.arange(0, BW)
    inside = tl.arange(0, BW) < W
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    of_weight = tl.zeros((BW,), tl.float32)
    of_skip = tl.zeros((BW,), tl.float32)
    for token in range(part * each, tl.minimum((part + 1) * each, tokens)):
        t = int64(token)  # of a loop to an int64 the interpreter makes an int32
        at = t * groups * W
        value, of_x, skip, z = gated_skip(y, x, gate, D, at, t * x_token, t * gate_token, c, c // P, inside)
        s = sigmoid_for(z, dy.dtype.element_ty)
        scale = tl.load(inverse + t * groups + group)
        unit = value * z * s * scale
        slope = tl.load(d_out + at + c, mask=inside, other=0.0).to(tl.float32)
        of_weight += slope * unit
        slope *= w
        slope = (slope - unit * (tl.sum(slope * unit, 0) / W)) * scale
        tl.store(d_gate + at + c, (slope * value * s * (1.0 + z * (1.0 - s))).to(d_gate.dtype.element_ty), mask=inside)
        slope *= z * s
        of_skip += slope * of_x
        tl.store(dy + at + c, slope.to(dy.dtype.element_ty), mask=inside)
        tl.store(dx + at + c, (slope * skip).to(dx.dtype.element_ty), mask=inside)
    parts = tl.num_programs(0) // groups
    tl.store(partial + part * groups * W + c, of_weight, mask=inside)
    tl.store(partial + (parts + part) * groups * W + c, of_skip, mask=inside)


def scale_heads(x: Tensor, factor: Tensor) -> Tensor:
    """See `gdn.ops.scale_heads`."""
    return _SCALE(x, factor)[0]


def skip_gated_rms_norm(y: Tensor, x: Tensor, D: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """See `gdn.ops.skip_gated_rms_norm`."""
    return _SKIP_NORM(y, x, D, gate, weight, groups, eps)[0]


def _scale(x: Tensor, factor: Tensor, keep: bool) -> tuple[Tensor]:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    P, count, BP, BR = _heads(x)
    x, *layout = rows(x)
    launch(scale_kernel, (-(-count // BR),), x, factor.contiguous(), y, count, *layout, P, BP, BR)
    return (y,)


def _scale_fake(x: Tensor, factor: Tensor, keep: bool) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


def _scale_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor]:
    x, factor = args
    (dy,) = grads
    assert dy is not None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dfactor = torch.empty(factor.shape, dtype=factor.dtype, device=x.device)
    P, count, BP, BR = _heads(x)
    x, *layout = rows(x)
    launch(
        scale_backward_kernel, (-(-count // BR),), x, factor.contiguous(), dy.contiguous(), dx, dfactor, count, *layout, P, BP, BR
    )  # fmt: skip
    return [dx, dfactor]


def _heads(x: Tensor) -> tuple[int, int, int, int]:
    """Width of a head, heads of all tokens, padded width, heads of a program."""
    P = x.shape[3]
    BP = power_of_two(P)
    return P, x.shape[0] * x.shape[1] * x.shape[2], BP, max(1, TILE // BP)


def _tokens(x: Tensor) -> tuple[Tensor, int]:
    """x `[B, T, channels]` or `[B, T, H, P]`, or a dense copy, and the distance of its tokens. No view: a replay could not tell which of
    two tensors that share memory it is of."""
    heads_touch = x.ndim == 3 or x.shape[2] == 1 or x.stride(2) == x.shape[3]
    if x.stride(-1) == 1 and heads_touch and x.shape[1] * x.stride(1) == x.stride(0):
        return x, x.stride(1)
    return x.contiguous(), math.prod(x.shape[2:])


def _widths(y: Tensor, groups: int) -> tuple[int, int, int, int]:
    """Width of a head, channels of a group, padded, and warps."""
    W = y.shape[2] * y.shape[3] // groups
    BW = power_of_two(W)
    return y.shape[3], W, BW, min(16, max(4, BW // 512))


def _skip_norm(y: Tensor, x: Tensor, D: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float, keep: bool) -> tuple[Tensor, Tensor]:
    out = torch.empty(gate.shape, dtype=y.dtype, device=y.device)
    inverse = torch.empty((*y.shape[:2], groups), dtype=torch.float32, device=y.device)
    P, W, BW, warps = _widths(y, groups)
    (x, x_token), (gate, gate_token) = _tokens(x), _tokens(gate)
    launch(
        skip_norm_kernel, (inverse.numel(),), y.contiguous(), x, D.contiguous(), gate, weight.contiguous(), out, inverse, eps, x_token, gate_token,
        groups, P, W, BW, warps=warps,
    )  # fmt: skip
    return out, inverse


def _skip_norm_fake(
    y: Tensor, x: Tensor, D: Tensor, gate: Tensor, weight: Tensor, groups: int, eps: float, keep: bool
) -> tuple[Tensor, Tensor]:
    return y.new_empty(gate.shape), y.new_empty((*y.shape[:2], groups), dtype=torch.float32)


def _skip_norm_backward(args: tuple[Any, ...], saved: Saved, grads: Grads) -> list[Tensor]:
    y, x, D, gate, weight, groups, _ = args
    (inverse,), (d_out,) = saved, grads
    assert d_out is not None
    dy, dx = (torch.empty(y.shape, dtype=y.dtype, device=y.device) for _ in range(2))
    d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=y.device)
    P, W, BW, warps = _widths(y, groups)
    tokens = y.shape[0] * y.shape[1]
    each = max(1, -(-tokens // PARTS))
    parts = -(-tokens // each)
    partial = torch.empty((2, parts, groups * W), dtype=torch.float32, device=y.device)
    (x, x_token), (gate, gate_token) = _tokens(x), _tokens(gate)
    launch(
        skip_norm_backward_kernel, (parts * groups,), y.contiguous(), x, D.contiguous(), gate, weight.contiguous(), inverse, d_out.contiguous(), dy,
        dx, d_gate, partial, tokens, each, x_token, gate_token, groups, P, W, BW, warps=warps,
    )  # fmt: skip
    of_weight, of_skip = partial.sum(1)
    return [dy, dx, of_skip.unflatten(0, (-1, P)).sum(1).to(D.dtype), d_gate, of_weight.to(weight.dtype)]


_SCALE = Opaque(
    "gdn::scale_heads_portable", _scale, _scale_backward, fake=_scale_fake, results=1, differentiable=("x", "factor"), replay=True
)
_SKIP_NORM = Opaque(
    "gdn::skip_gated_rms_norm_portable",
    _skip_norm,
    _skip_norm_backward,
    fake=_skip_norm_fake,
    results=1,
    differentiable=("y", "x", "D", "gate", "weight"),
    replay=True,
)
