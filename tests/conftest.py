"""Without a GPU, Triton's kernels run in its interpreter. That is decided before Triton is first imported, so for all tests here.
With several GPUs the workers of pytest-xdist take one each, in turn."""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterator
from glob import glob
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from gdn.core.device import has_package, interprets_triton

EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

GPUS = len(glob("/dev/nvidia[0-9]*"))
if (WORKER := os.environ.get("PYTEST_XDIST_WORKER")) and GPUS > 1:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", str(int(WORKER.removeprefix("gw")) % GPUS))

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

    compiled_check = TritonSemantic.binary_op_sanitize_overflow_impl
    prepare, numpy_type = interpreter._patch_lang, functools.cache(interpreter._get_np_dtype)
    done, scopes = set[int](), list[Any]()

    class Scope(interpreter._LangPatchScope):
        """What one launch has changed, and calls inside of its kernel, which never restore: of `tl.core`, for functions of Triton's own."""

        def restore(self) -> None:
            for scope in reversed(scopes):
                super(Scope, scope).restore()
            scopes.clear()
            done.clear()

    def prepare_once(function: Any) -> Any:
        seen = {id(value) for value in function.__globals__.values() if value is tl or value is tl.core}
        if seen and seen <= done:
            return Scope()
        done.update(seen)
        scopes.append(scope := prepare(function))
        return scope

    def type_of(kind: Any) -> np.dtype[Any]:
        return np.dtype(np.uint64) if isinstance(kind.scalar, tl.pointer_type) else numpy_type(kind.scalar)

    def check_overflow(self: Any, left: Any, right: Any, operation: Callable[..., Any]) -> None:
        if not isinstance(left.handle, interpreter.TensorHandle):  # a kernel is being compiled
            compiled_check(self, left, right, operation)
            return
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


@pytest.fixture
def replayed_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the kernels that replays run, as they do. Without a GPU calls on the CPU are replayed, and what stands for a compiled
    kernel runs the interpreter on the addresses that it gets."""
    pytest.importorskip("triton")
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime import interpreter

    from gdn.core import portable_launch, portable_plan, portable_product, replay, replay_known

    names: list[str] = []
    plan = portable_plan.plan

    def noted(launches: Any, addresses: int) -> Any:
        started = [what.name if isinstance(what, portable_plan.Kernel) else "product" for what, _, _ in launches]
        start = plan(launches, addresses)
        assert start is not None
        return lambda *args: (names.extend(started), start(*args))

    def interpret(what: Any, grid: tuple[int, ...], device: int) -> Any:
        kernel, args = what.kernel, what.args
        with _disable_current_modes():
            kernel[grid](*args)
        dtypes = [a.dtype if isinstance(a, torch.Tensor) else None for a in args]

        def run(x: int, y: int, z: int, *rest: Any) -> None:
            assert rest[:6] == ("stream", "function", "metadata", None, None, None)
            names.append(kernel.fn.__name__)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, named: (args, named))
                patch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)
                kernel[x, y, z](*[a if dtype is None else pointer(a, dtype) for a, dtype in zip(rest[6:], dtypes, strict=True)])

        known = portable_plan.Kernel(kernel.fn.__name__, cast(int, run), 128, 0, ())
        return SimpleNamespace(function="function", packed_metadata="metadata", run=run, known=known)

    def interpreted(launches: Any, addresses: int) -> Any:
        def start(stream: str, *given: int) -> None:
            assert len(given) == addresses
            for what, grid, arguments in launches:
                places = [given[a[0]] + a[1] if isinstance(a, tuple) else a[0] for a in arguments]
                if isinstance(what, portable_plan.Nodes):
                    names.append("product")
                    assert len(places) == 3 + (what.workspace > 0)
                    if what.workspace:
                        ctypes.memset(places[3], 0xFF, what.workspace)
                    what.chain(*places[:3])
                else:
                    what.function(*grid, stream, "function", "metadata", None, None, None, *places)

        return start

    def pointer(address: int, dtype: torch.dtype) -> Any:
        return SimpleNamespace(data_ptr=lambda: address, dtype=dtype)

    # fmt: off
    def multiplying(
        device: int, beta: int, kind: int, result: int, turned_a: bool, turned_b: bool,
        m: int, n: int, k: int, after_a: int, after_b: int, after_c: int,
    ) -> Any:
        # fmt: on
        def matrix(address: int, rows: int, columns: int, after: int, kind: int, turned: bool = False) -> torch.Tensor:
            rows, columns = (columns, rows) if turned else (rows, columns)
            assert after >= rows  # cuBLAS refuses others
            dtype = {0: torch.float32, 2: torch.float16, 14: torch.bfloat16}[kind]
            memory = (ctypes.c_int8 * (dtype.itemsize * (after * (columns - 1) + rows))).from_address(address)
            by_columns = torch.frombuffer(memory, dtype=dtype).as_strided((rows, columns), (1, after))
            return by_columns.T if turned else by_columns

        def multiply(second: int, first: int, out: int) -> None:
            product = matrix(first, m, k, after_a, kind, turned_a).float() @ matrix(second, k, n, after_b, kind, turned_b).float()
            there = matrix(out, m, n, after_c, result)
            there.copy_(product + there if beta else product)

        return multiply

    if torch.cuda.is_available():
        monkeypatch.setattr(replay, "plan", noted)
    else:
        monkeypatch.setattr(portable_product, "_multiply", multiplying)
        monkeypatch.setattr(portable_product, "_DEVICE", "cpu")
        monkeypatch.setattr(replay, "nodes", lambda multiply, *matrices: portable_plan.Nodes(multiply, 300 * (len(matrices[0]) % 2)))
        monkeypatch.setattr(replay, "plan", interpreted)
        monkeypatch.setattr(portable_plan, "of_compiled", lambda compiled: compiled.known)
        monkeypatch.setattr(portable_launch, "JITFunction", object)
        monkeypatch.setattr(portable_launch, "_launch", interpret)
        monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
        monkeypatch.setattr(replay_known, "FIRST_DEVICE", -1)
        monkeypatch.setattr("gdn.ops.loss._check_values", lambda *args: None)  # values are looked at on the CPU only
    replay_known.forget()
    yield names
    replay_known.forget()
