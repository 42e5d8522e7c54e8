"""Triton's interpreter, which runs the kernels on a CPU under `TRITON_INTERPRET=1`, made to compute what a GPU does where our kernels need it.

As it comes (3.6 and 3.7) it multiplies the bits of bfloat16 matrices instead of their numbers, which gives numbers without meaning and no
error; it cuts off where a GPU rounds to the nearest bfloat16, which doubles every error; it rounds the product in a fused multiply-add, which
the exponential of `portable_math` lives by; it sums along most axes one number after another; it takes exponentials and logarithms from numpy,
which on some processors are wrong by more than two units in the last place, and sums keep that; and it warns where numbers overflow or there is
none, as where blocks for documents that a batch does not have multiply memory that nobody wrote, for no result. Left as they are: arithmetic of
bfloat16 other than products of matrices, which takes bits for numbers too (our kernels widen first), sums of all of a block, scans, a fused
multiply-add in float16, and warnings of divisions by zero.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_ELEMENTARY = (np.exp, np.exp2, np.log, np.log2)
_LOCK = threading.Lock()
_depth = 0
_before: dict[tuple[Any, str], Any] = {}


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Within it the interpreter computes like a GPU; it stays so until all who entered have left."""
    global _depth
    with _LOCK:
        if _depth == 0:
            _change()
        _depth += 1
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            yield
    finally:
        with _LOCK:
            _depth -= 1
            if _depth == 0:
                _restore()


def _change() -> None:
    builder, reductions = interpreter.InterpreterBuilder, interpreter.ReduceOps
    places = {"_convert_float": interpreter, "create_dot": builder, "create_fma": builder, "unary_op": builder, "sum": reductions}
    missing = [name for name, place in places.items() if not hasattr(place, name)]
    if missing:
        warnings.warn(f"this Triton's interpreter has no {', '.join(missing)}: its bfloat16 may be wrong", stacklevel=4)
        return
    _before.update({(place, name): getattr(place, name) for name, place in places.items()})
    convert, product, fused, unary, added = _before.values()

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return _widened(data)
        if source == tl.float32 and target == tl.bfloat16 and mode != interpreter._ir.ROUNDING_MODE.RTZ:
            rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return convert(data, source, target, mode)

    def multiplying(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, _as_numbers(a), _as_numbers(b), *rest)

    def rounding_once(self: Any, x: Any, y: Any, z: Any) -> Any:
        if z.data.dtype != np.float32:
            return fused(self, x, y, z)
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    def near(self: Any, argument: Any, function: Callable[..., Any]) -> Any:
        if function not in _ELEMENTARY or argument.data.dtype != np.float32:
            return unary(self, argument, function)
        return interpreter.TensorHandle(function(argument.data.astype(np.float64)).astype(np.float32), argument.dtype.scalar)

    def in_pairs(self: Any, x: Any) -> Any:
        if x.handle.data.dtype != np.float32 or self.axis is None:
            return added(self, x)
        left = np.moveaxis(x.handle.data, self.axis, 0)
        while len(left) > 1:  # a power of two
            left = left[0::2] + left[1::2]
        return self.to_tensor(np.moveaxis(left, 0, self.axis) if self.keep_dims else left[0], x.dtype)

    for (place, name), changed in zip(_before, (rounding, multiplying, rounding_once, near, in_pairs), strict=True):
        setattr(place, name, changed)


def _restore() -> None:
    for (place, name), function in _before.items():
        setattr(place, name, function)
    _before.clear()


def _as_numbers(x: Any) -> Any:
    """A matrix of bfloat16 in float32."""
    return interpreter.TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x


def _widened(data: Any) -> Any:
    """float32 of the bits of bfloat16."""
    return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
