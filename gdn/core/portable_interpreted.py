"""Triton's interpreter, which runs the kernels on a CPU under `TRITON_INTERPRET=1`, made to compute what a GPU does.

As it comes (3.6 and 3.7) it multiplies the bits of bfloat16 matrices instead of their numbers, which gives numbers without meaning and no
error; it cuts float32 off where a GPU rounds to the nearest bfloat16, which doubles every error; it warns where numbers overflow; and it takes
exponentials and logarithms from numpy, which on some processors are wrong by more than two units in the last place, and sums keep that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_ELEMENTARY = (np.exp, np.exp2, np.log, np.log2)
_active = False


@contextmanager
def like_a_gpu() -> Iterator[None]:
    """Within it the interpreter computes like a GPU, in all threads: one after another, as it can only be used."""
    global _active
    if _active:
        yield
        return
    builder = interpreter.InterpreterBuilder
    convert, product, unary = interpreter._convert_float, builder.create_dot, builder.unary_op

    def rounding(data: Any, source: Any, target: Any, *rest: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)).bfloat16()
            return rounded.view(torch.int16).numpy().view(np.uint16)
        return _widened(data) if source == tl.bfloat16 and target == tl.float32 else convert(data, source, target, *rest)

    def multiplying(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return product(self, _as_numbers(a), _as_numbers(b), *rest)

    def near(self: Any, argument: Any, function: Callable[..., Any]) -> Any:
        if function not in _ELEMENTARY or argument.data.dtype != np.float32:
            return unary(self, argument, function)
        return interpreter.TensorHandle(function(argument.data.astype(np.float64)).astype(np.float32), argument.dtype.scalar)

    _active = True
    interpreter._convert_float, builder.create_dot, builder.unary_op = rounding, multiplying, near
    try:
        with np.errstate(over="ignore"):
            yield
    finally:
        interpreter._convert_float, builder.create_dot, builder.unary_op = convert, product, unary
        _active = False


def _as_numbers(x: Any) -> Any:
    """A matrix of bfloat16 in float32."""
    return interpreter.TensorHandle(_widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x


def _widened(data: Any) -> Any:
    """float32 of the bits of bfloat16."""
    return (np.ascontiguousarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
