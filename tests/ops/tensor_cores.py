"""Products of float32 as tensor cores make them, for Triton's interpreter, whose own are too good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from gdn.core.device import interprets_triton

Numbers = np.ndarray[Any, Any]


@contextmanager
def sums_are_cut() -> Iterator[None]:
    """Let `tl.dot` with `tf32x3` split its operands in two of 11 bits, and cut the sums after every eight products towards zero instead of
    rounding them to nearest, as an H200 was found to. Nothing changes where kernels do not run in the interpreter."""
    if not interprets_triton():
        yield
        return
    from triton.runtime import interpreter

    product = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        if "TF32x3" not in str(precision) or a.data.dtype != np.float32:
            return product(self, a, b, d, precision, *rest)
        high_a, high_b = _tf32(a.data), _tf32(b.data)
        low_a, low_b = _tf32(a.data - high_a), _tf32(b.data - high_b)
        total = np.zeros_like(d.data)
        for x, y in ((low_a, high_b), (high_a, low_b), (high_a, high_b)):
            total = _add_products(total, x, y)
        return interpreter.TensorHandle(total + d.data, d.dtype.scalar)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
        yield


def _tf32(x: Numbers) -> Numbers:
    bits = np.ascontiguousarray(x).view(np.uint32)
    return ((bits + np.uint32(1 << 12)) & np.uint32(0xFFFFE000)).view(np.float32)


def _add_products(total: Numbers, x: Numbers, y: Numbers) -> Numbers:
    for i in range(0, x.shape[-1], 8):
        exact = x[..., i : i + 8].astype(np.float64) @ y[..., i : i + 8, :].astype(np.float64) + total
        total = exact.astype(np.float32)
        total = np.where(np.abs(total) > np.abs(exact), np.nextafter(total, np.float32(0)), total)
    return total
