"""Without a GPU, Triton's kernels run in its interpreter. That is decided before Triton is first imported, so for all tests here."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from gdn.core.device import has_package, interprets_triton

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def quick_interpreter() -> Iterator[None]:
    """Let Triton's interpreter do in half the time what it does: prepare its language once a launch instead of at every call inside a
    kernel, look numpy's types up instead of listing them all, and see integers overflow without its own arithmetic."""
    if not (has_package("triton") and interprets_triton()):
        yield
        return
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    prepare, numpy_type, done = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype), set[int]()

    class Scope(interpreter._LangPatchScope):
        """What one launch has changed; calls inside a kernel never restore."""

        def restore(self) -> None:
            super().restore()
            done.clear()

    def prepare_once(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= done:
            return None
        done.update(seen)
        return prepare(function)

    def type_of(kind: Any) -> np.dtype[Any]:
        return np.dtype(np.uint64) if isinstance(kind.scalar, tl.pointer_type) else numpy_type(kind.scalar)

    def check_overflow(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> None:
        kind, name = left.type.scalar, operation.__name__
        if kind.int_bitwidth < 64:
            found = EXACT[name](left.handle.data.astype(np.int64), right.handle.data.astype(np.int64))
            fits = (found >= kind.get_int_min_value()) & (found <= kind.get_int_max_value())
            assert fits.all(), f"int{kind.int_bitwidth} overflow detected for operation {name}"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_LangPatchScope", Scope)
        patch.setattr(interpreter, "_patch_lang", prepare_once)
        patch.setattr(interpreter, "_get_np_dtype", type_of)
        patch.setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", check_overflow)
        yield
