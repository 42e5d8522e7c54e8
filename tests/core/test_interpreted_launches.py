"""Launches in Triton's interpreter leave its language as it was, for those who compile in the same process, and compute what a GPU does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime import interpreter  # noqa: E402

from gdn.core.device import interprets_triton  # noqa: E402
from gdn.core.dispatch import use  # noqa: E402
from gdn.core.portable_math import sigmoid  # noqa: E402
from gdn.ops import windowed_sigmoid_attention  # noqa: E402

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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_operators_compute_what_a_gpu_does(dtype: torch.dtype) -> None:
    """Errors of one rounding to the nearest, and no warning. As Triton comes products of bfloat16 are those of their bits."""
    exact = [torch.randn(1, 40, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    narrow, slopes, before = [x.to(dtype) for x in exact], torch.ones(2), interpreter.InterpreterBuilder.create_dot
    with use(windowed_sigmoid_attention="portable"), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = windowed_sigmoid_attention(*narrow, slopes, window=20)
    with use(windowed_sigmoid_attention="reference"):
        truth = windowed_sigmoid_attention(*(x.double() for x in narrow), slopes.double(), window=20)
    error = float((found.double() - truth).norm() / truth.norm())
    assert error < {torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    assert interpreter.InterpreterBuilder.create_dot is before, "other kernels find Triton's as it was"
