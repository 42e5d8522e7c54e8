"""The buffers of a call of Triton kernels in one allocation: for a kernel a buffer is an address, and to allocate takes longer than to add.

workspace = Workspace({"gates": ((chunks, 5, 64), torch.float32), "phi": ((chunks, 64, 64), torch.bfloat16)})
space = workspace.allocate(x)
workspace.views(space)["phi"]
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""

_ALIGNMENT = 256


class Workspace:
    """Where each buffer lies.

    Args:
        buffers: those that are alive all the time.
        turns: buffers that are alive one group after another, and share memory.
    """

    def __init__(self, buffers: Buffers, *turns: Buffers) -> None:
        self.buffers: Buffers = {}
        self._offsets: list[tuple[str, int]] = []
        shared = self._place(buffers, 0)
        self.size = max([self._place(group, shared) for group in turns], default=shared)

    def _place(self, buffers: Buffers, offset: int) -> int:
        """Where the next buffer may begin."""
        for name, (shape, dtype) in buffers.items():
            if name in self.buffers:
                raise ValueError(f"workspace: two buffers are called {name}")
            self.buffers[name] = shape, dtype
            self._offsets.append((name, offset))
            offset += -(-math.prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        return offset

    def allocate(self, like: Tensor) -> Tensor:
        """Fresh memory where `like` is. Keep it until the last kernel that uses it has been launched; its stream does the rest."""
        return torch.empty(self.size, dtype=torch.uint8, device=like.device)

    def views(self, space: Tensor) -> dict[str, Tensor]:
        return {name: self._view(space, name, offset) for name, offset in self._offsets}

    def _view(self, space: Tensor, name: str, offset: int) -> Tensor:
        shape, dtype = self.buffers[name]
        return space[offset : offset + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
