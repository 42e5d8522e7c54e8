"""The rotary embedding in Triton, any GPU from sm_80 on: one pass each way. The gradient is turned back by the same angles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import Opaque
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64
from gdn.core.portable_rows import fresh, power_of_two, rows

TILE = 2048
"""Pairs of channels of a program."""


@triton.jit
def rotary_kernel(
    x, cos, sin, y, sign, count, heads, period, group, outer, inner,
    K: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, REST: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BR heads of tokens; their angles repeat after `period` tokens. Grid [blocks of heads]."""
    r = int64(tl.program_id(0)) * BR + tl.arange(0, BR)
    source = x + (r // group * outer + r % group * inner)[:, None]
    target = y + r[:, None] * K
    c = tl.arange(0, BN)[None, :]
    valid = (r < count)[:, None] & (c < N)
    angle = (r // heads % period)[:, None] * N + c
    cosine = tl.load(cos + angle, mask=valid, other=0.0)
    sine = tl.load(sin + angle, mask=valid, other=0.0) * sign
    a = tl.load(source + c, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(source + N + c, mask=valid, other=0.0).to(tl.float32)
    tl.store(target + c, (a * cosine - b * sine).to(y.dtype.element_ty), mask=valid)
    tl.store(target + N + c, (a * sine + b * cosine).to(y.dtype.element_ty), mask=valid)
    if REST > 0:
        c = 2 * N + tl.arange(0, REST)[None, :]
        valid = (r < count)[:, None] & (c < K)
        tl.store(target + c, tl.load(source + c, mask=valid, other=0.0), mask=valid)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `gdn.ops.rotary_embedding`."""
    return _ROTARY(x, cos, sin)[0]


def _turn(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    y = fresh(x)
    H, K, N = x.shape[2], x.shape[3], cos.shape[-1]
    count, period, BN = x.numel() // K, cos.numel() // N, power_of_two(N)
    rest = power_of_two(K - 2 * N) if K > 2 * N else 0
    x, *layout = rows(x)
    BR = max(1, TILE // max(BN, rest))
    launch(
        rotary_kernel, (-(-count // BR),), x, cos.contiguous(), sin.contiguous(), y, sign, count, H, period, *layout, K, N, BN, rest, BR
    )  # fmt: skip
    return y


def _forward(x: Tensor, cos: Tensor, sin: Tensor, keep: bool) -> tuple[Tensor]:
    return (_turn(x, cos, sin, 1.0),)


def _fake(x: Tensor, cos: Tensor, sin: Tensor, keep: bool) -> tuple[Tensor]:
    return (x.new_empty(x.shape),)


def _backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor]:
    _, cos, sin = args
    (dy,) = grads
    assert dy is not None
    return [_turn(dy, cos, sin, -1.0)]


_ROTARY = Opaque("gdn::rotary_embedding_portable", _forward, _backward, fake=_fake, results=1, differentiable=("x",), replay=True)
