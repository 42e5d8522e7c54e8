"""Tensors as rows of vectors for Triton kernels, without copying slices of wider tensors."""

from __future__ import annotations

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
