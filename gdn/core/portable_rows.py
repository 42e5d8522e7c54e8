"""Tensors as rows of vectors for Triton kernels, without copying slices of wider tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """x `[..., D]` as vectors: (x or a dense copy, vectors of a group, stride of groups, stride of vectors in a group).

    Vector r begins at `r // group * outer + r % group * inner`. A head view of a wider tensor, `[B, T, H, D]` with dense heads, needs no copy.
    """
    D = x.shape[-1]
    if x.is_contiguous() or x.ndim < 2:
        return x.contiguous(), 1, D, 0
    sizes, strides = x.shape[:-1], x.stride()[:-1]
    even = all(strides[i] == strides[i + 1] * sizes[i + 1] for i in range(len(sizes) - 2))
    if x.stride(-1) != 1 or not even:
        return x.contiguous(), 1, D, 0
    return x, sizes[-1], strides[-2] if len(sizes) > 1 else 0, strides[-1]


def power_of_two(size: int) -> int:
    """The least power of two that is not less."""
    return 1 << max(size - 1, 0).bit_length()


def aligned(x: Tensor) -> Tensor:
    """x, contiguous and at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def token_rows(x: Tensor) -> Tensor:
    """x [B, T, heads, width] with dense heads and one stride over all tokens: itself when it is a slice of wider rows, or a copy."""
    token, head, last = x.stride()[1:]
    if last == 1 and head == x.shape[3] and x.stride(0) == token * x.shape[1] and token % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return dense(x)


def dense(x: Tensor) -> Tensor:
    """Like `aligned`, with the strides that follow from the shape: a contiguous x of one token may have any stride over tokens."""
    return aligned(x).view(-1).view(x.shape)


def fresh(x: Tensor) -> Tensor:
    """Uninitialised, dense, of the shape, dtype and device of x. Half of what `torch.empty` takes to read these."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)
