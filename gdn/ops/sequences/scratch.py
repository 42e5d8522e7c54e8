"""Buffers that are used again and again."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Scratch:
    """Named buffers that every segment uses again, so that they stay in the cache."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self.dtype = like, dtype
        self._flat: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size = math.prod(shape)
        flat = self._flat.get(name)
        if flat is None or flat.numel() < size:
            flat = self._flat[name] = self._like.new_empty(size, dtype=dtype or self.dtype)
        return flat[:size].view(shape)
