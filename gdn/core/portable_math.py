"""Functions for Triton kernels that Triton lacks or has with too large an error. All take and give float32."""

from __future__ import annotations

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950216293335)
_LOG2_E_LOW = tl.constexpr(1.9259629911266175e-08)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def int64(x):
    """A scalar as int64: offsets into whole tensors pass 2^31."""
    return x + tl.full((), 0, tl.int64)


@triton.jit
def exp(x):
    """exp(x), right to 2e-7 for every x: the plain one multiplies by log2(e) first and loses 6e-8 |x|. Exactly 0 at minus infinity."""
    x = tl.clamp(x, -200.0, 200.0, propagate_nan=tl.PropagateNan.ALL)
    high = x * _LOG2_E
    over = tl.fma(x, -_LOG2_E, high) - x * _LOG2_E_LOW
    return tl.exp2(high) * (1.0 - over * _LN_2)


@triton.jit
def log1p(x):
    """log(1 + x) for x from 0 to 1, right to 2e-7 of itself however small: twice the series of atanh(x / (2 + x))."""
    t = x / (2.0 + x)
    s = t * t
    series = 1.0 / 15
    series = series * s + 1.0 / 13
    series = series * s + 1.0 / 11
    series = series * s + 1.0 / 9
    series = series * s + 1.0 / 7
    series = series * s + 1.0 / 5
    series = series * s + 1.0 / 3
    return 2.0 * t * (series * s + 1.0)


@triton.jit
def softplus(x):
    """log(1 + exp(x)) without overflow; 0 at minus infinity."""
    return tl.where(x > 0, x, 0.0) + log1p(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)). A division takes eight instructions, this five: the square of a root, wrong by up to 2.6e-7, and one step of Newton's
    method, after which what is left is the error of exp. Exactly 0 at minus infinity."""
    below = 1.0 + exp(-x)
    root = tl.rsqrt(below)
    near = root * root
    return tl.fma(near, tl.fma(-tl.minimum(below, 3e38), near, 1.0), near)


@triton.jit
def quick_sigmoid(x):
    """The same with an error of up to 2.6e-7 + 7.4e-8 |x|: five instructions, where a plain exponential and a division take thirteen."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -_LOG2_E))
    return root * root


@triton.jit
def sigmoid_for(x, dtype: tl.constexpr):
    """The exact one for results in float32, the quick one for those in 16 bits."""
    return sigmoid(x) if dtype == tl.float32 else quick_sigmoid(x)
