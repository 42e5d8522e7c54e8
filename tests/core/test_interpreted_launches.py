"""Launches in Triton's interpreter leave its language as it was, for those who compile in the same process, and compute what a GPU does."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from gdn.core.device import interprets_triton  # noqa: E402
from gdn.core.portable_interpreted import like_a_gpu  # noqa: E402
from gdn.core.portable_math import sigmoid  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not interprets_triton(), reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("quick_interpreter"),
]


@triton.jit
def blocks_kernel(x, y, count, BLOCK: tl.constexpr):
    """A function of ours and one of Triton's own, whose module has another name for the language."""
    i = tl.arange(0, BLOCK)
    tl.store(y + i, sigmoid(tl.load(x + i)) + tl.cdiv(count, BLOCK))


def language() -> dict[tuple[Any, str], Any]:
    return {(part, name): getattr(part, name) for part in (tl, tl.core, tl.math, tl.tensor) for name in dir(part)}


def test_what_a_launch_changes_is_as_before() -> None:
    before, x, y = language(), torch.zeros(4), torch.zeros(4)
    for _ in range(2):
        blocks_kernel[(1,)](x, y, 9, 4)
        assert torch.equal(y, torch.full((4,), 3.5))
        assert [name for (part, name), now in language().items() if now != before.get((part, name))] == []


def test_a_function_called_outside_of_a_launch_does_no_harm() -> None:
    x, y = torch.zeros(4), torch.zeros(4)
    sigmoid(0.0)
    blocks_kernel[(1,)](x, y, 9, 4)
    assert torch.equal(y, torch.full((4,), 3.5))


IN_BFLOAT16 = """
import torch
from triton.runtime import interpreter
from gdn.core.dispatch import use
from gdn.ops import windowed_sigmoid_attention

narrow = [torch.randn(1, 40, 2, 16, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(3)]
before = interpreter.InterpreterBuilder.create_dot
with use(windowed_sigmoid_attention="portable"):
    found = windowed_sigmoid_attention(*narrow, torch.ones(2), window=20)
with use(windowed_sigmoid_attention="reference"):
    truth = windowed_sigmoid_attention(*(x.double() for x in narrow), torch.ones(2).double(), window=20)
assert interpreter.InterpreterBuilder.create_dot is before, "other kernels find Triton's as it was"
print(float((found.double() - truth).norm() / truth.norm()))
"""


def test_operators_compute_in_bfloat16_what_a_gpu_does() -> None:
    """One rounding to the nearest, and no warning of overflow, for those who do not test. Triton alone multiplies bits of bfloat16."""
    found = subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", IN_BFLOAT16], capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 3e-3


def functions() -> list[Any]:
    builder = interpreter.InterpreterBuilder
    return [interpreter._convert_float, builder.create_dot, builder.create_fma, builder.unary_op, interpreter.ReduceOps.sum]


def test_the_interpreter_is_as_before_when_all_have_left() -> None:
    """Also after an error, and another thread may leave first."""
    before, settings = functions(), np.geterr()
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        with like_a_gpu():
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=other)
    with pytest.raises(ZeroDivisionError), like_a_gpu():
        thread.start()
        assert inside.wait(60)
        within, kept = functions(), np.geterr()
        raise ZeroDivisionError
    assert functions() == within and kept["over"] == kept["invalid"] == "ignore"
    leave.set()
    thread.join()
    assert functions() == before and np.geterr() == settings


@triton.jit
def difference_kernel(x, y, BLOCK: tl.constexpr):
    value = tl.load(x + tl.arange(0, BLOCK))
    tl.store(y + tl.arange(0, BLOCK), value - value)


def test_what_has_no_value_is_no_number_and_no_warning() -> None:
    found = torch.zeros(4)
    with like_a_gpu():
        difference_kernel[(1,)](torch.full((4,), torch.inf), found, 4)
    assert found.isnan().all()


@triton.jit
def widened_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(tl.float32))


@triton.jit
def narrowed_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_conversions_are_those_of_torch() -> None:
    """Every bfloat16, and float32 between two of them, at the middle too."""
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    wide = torch.empty(2**16)
    with like_a_gpu():
        widened_kernel[(1,)](narrow, wide, 2**16)
    assert torch.equal(wide.view(torch.int32), narrow.float().view(torch.int32))
    finite = narrow[narrow.isfinite()][: 2**15].float()
    between = (finite.view(torch.int32) + torch.arange(finite.numel(), dtype=torch.int32) % 3 * 2**14 + 2**14).view(torch.float32)
    found = torch.empty(2**15, dtype=torch.bfloat16)
    with like_a_gpu():
        narrowed_kernel[(1,)](between, found, 2**15)
    assert torch.equal(found.view(torch.int16), between.bfloat16().view(torch.int16))


@triton.jit
def fused_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i)
    tl.store(y + i, tl.fma(value, value, -1.0))


def test_a_fused_product_is_not_rounded() -> None:
    x, y = torch.tensor([1 + 2**-20, 1 + 2**-13], dtype=torch.float32), torch.empty(2)
    with like_a_gpu():
        fused_kernel[(1,)](x, y, 2)
    assert torch.equal(y, (x.double() ** 2 - 1).float())
    assert not torch.equal(y, x * x - 1)


@triton.jit
def sum_kernel(x, y, AXIS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    value = tl.load(x + rows[:, None] * COLUMNS + columns[None, :])
    tl.store(y + (columns if AXIS == 0 else rows), tl.sum(value, AXIS))


@pytest.mark.parametrize("axis", [0, 1])
def test_sums_are_those_of_a_tree(axis: int) -> None:
    """One after another small numbers vanish beside a large one."""
    x = torch.full((64, 32) if axis == 0 else (32, 64), 2.0**-24)
    x.select(axis, 0).fill_(1.0)
    y = torch.empty(32)
    with like_a_gpu():
        sum_kernel[(1,)](x, y, axis, *x.shape)
    assert torch.equal(y, torch.full((32,), 1 + 62 * 2.0**-24))
