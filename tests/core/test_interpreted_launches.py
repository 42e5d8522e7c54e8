"""Launches in Triton's interpreter leave its language as it was, for those who compile in the same process."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from gdn.core.device import interprets_triton  # noqa: E402
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
