"""What the hosts of Triton rows over sequences share: how arguments must lie in memory, launch parameters, and boundaries as arguments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gdn.core.packing import Packing
from gdn.core.portable_launch import launch

Bounds = tuple[Tensor | None, Tensor | None, Tensor | None]
"""cu_seqlens, chunk table and chunk offsets of a packing; None without one."""


@dataclass(frozen=True)
class Launch:
    """Block size and resources of one kernel."""

    block: int
    """Columns of V of a program, or at a time."""
    warps: int
    stages: int = 1
    """Depth of the software pipeline."""
    registers: int | None = None
    """Most registers of a thread."""

    def __call__(self, kernel: Any, key: Any, programs: int, *args: Any) -> None:
        launch(kernel, (programs,), *args, warps=self.warps, registers=self.registers, key=(key, self))


def bounds_of(packing: Packing | None) -> Bounds:
    return (None, None, None) if packing is None else (packing.cu_seqlens, packing.chunk_table, packing.chunk_offsets)


def padded(size: int) -> int:
    """The least power of two that is not less, and at least 16: the least that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())
