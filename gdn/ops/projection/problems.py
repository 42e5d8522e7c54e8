"""Named shapes of the activations with a matrix, for tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Problem:
    """`shape` of what goes into the matrix, the last two dimensions being heads and their width; M numbers come out."""

    name: str
    shape: tuple[int, ...]
    M: int

    def build_swiglu(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `swiglu_linear`, the same numbers for every dtype and device up to rounding."""
        *rows, heads, D = self.shape
        return self._draw(seed, device, dtype, x=(*rows, 2 * heads * D), weight=(self.M, heads * D))

    def build_norm(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `gated_rms_norm_linear`, likewise."""
        heads, D = self.shape[-2:]
        return self._draw(seed, device, dtype, x=self.shape, gate=self.shape, norm_weight=(D,), weight=(self.M, heads * D))

    def _draw(self, seed: int, device: torch.device | str, dtype: torch.dtype, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for name, shape in shapes.items()}


PROBLEMS = (
    Problem(name="some", shape=(2, 9, 3, 8), M=10),
    Problem(name="one row", shape=(2, 12), M=5),
    Problem(name="two rows", shape=(2, 9, 130), M=20),
    Problem(name="several blocks", shape=(7, 4, 130), M=6),
    Problem(name="most of few rows", shape=(64, 2, 8), M=20),
    Problem(name="more than few rows", shape=(65, 3, 8), M=10),
    Problem(name="no row", shape=(2, 0, 2, 8), M=4),
)
