"""Products of two matrices by cuBLAS, asked without torch: what a replay does in place of `torch.mm`, which takes the host half as long.

    made = multiplied(a, b)                                                   # None where torch has to do it
    out, multiply = made
    multiply(a.data_ptr(), b.data_ptr(), out.data_ptr())                      # again, with others like these
    found = nodes(multiply, a, b, out)                                        # or as part of a plan (portable_plan.py); None where it can't be

It is the call that torch makes of cuBLAS, with torch's handle, which has its stream and workspace, for matrices of 16 bits under the `ordinary`
settings of torch. products.c makes it. Where torch's `linear` takes the host 15 to 17 microseconds, it takes 9 to 11, and as part of a graph,
with what cuBLAS has the GPU do, 1 to 3: the same kernels, so the same bits.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gdn.core import portable_plan
from gdn.core.device import capability

Multiply = Callable[..., None]
"""Of the addresses of both factors and the product."""

_TYPES = {torch.float16: 2, torch.bfloat16: 14}
"""By cuBLAS's numbers (cudaDataType)."""
_FLOAT32 = 0
_DEVICE, _LARGEST = "cuda", 2**31 - 1
_OPERATORS = {"aten/mm/CUDA", "aten/mm.dtype_out/CUDA", "aten/addmm.dtype_out/CUDA"}
_OVERRIDES: set[str] = getattr(torch.library, "_impls", _OPERATORS)
"""Of torch's operators, by their users: kernels whose results do not depend on the batch, say."""


def _of_torch(name: str, otherwise: Any = bool) -> Any:
    """What torch keeps to itself."""
    return getattr(torch._C, name, otherwise)


_backend, _cublas = _of_torch("_get_blas_preferred_backend"), getattr(_of_torch("_BlasBackend"), "Cublas", None)
_reduced_bf16 = _of_torch("_get_cublas_allow_bf16_reduced_precision_reduction")
_reduced16 = _of_torch("_get_cublas_allow_fp16_reduced_precision_reduction")
_accumulates16, _tuned = _of_torch("_get_cublas_allow_fp16_accumulation"), _of_torch("_cuda_tunableop_is_enabled")
_deterministic = _of_torch("_get_deterministic_algorithms")
_BOTH = (True, True)

_handle: Callable[[], int] = _of_torch("_cuda_getCurrentBlasHandle", int)
"""Torch's, of this thread, for the current device and stream."""


def ordinary() -> bool:
    """Whether torch would leave a product of 16 bits to cuBLAS and to its choice of kernels: its settings are as they are by default."""
    return (
        _backend() == _cublas
        and _reduced_bf16() == _BOTH
        and _reduced16() == _BOTH
        and not (_accumulates16() or _tuned() or _deterministic())
        and untouched()
    )


def untouched() -> bool:
    """Whether no user has put a kernel of his own in place of torch's products."""
    return _OVERRIDES.isdisjoint(_OPERATORS)


_WORKSPACES = {8: 8320 << 10, 9: 32 << 20}
"""Bytes that torch gives cuBLAS, by the generation of the GPU, where torch does not tell and its users do not say how many."""
_given: Callable[[], int] | None = _of_torch("_cuda_getCublasWorkspaceSize", None)
"""What torch tells of them, from 2.13 on."""


def _workspace(device: int) -> int | None:
    """Bytes that torch gives cuBLAS there; None where they are not known."""
    if _given is not None:
        return _given()
    return None if "CUBLAS_WORKSPACE_CONFIG" in os.environ else _WORKSPACES.get(capability(device) // 10)


@functools.cache
def _is_given(workspace: int) -> Callable[[], bool]:
    return lambda: _given is not None and _given() == workspace


def workspace_as_now() -> dict[Callable[[], bool], bool]:
    """What has to be asked, and the answer, for torch to give cuBLAS as much workspace as now."""
    return {} if _given is None else {_is_given(_given()): True}


def multiplied(a: Tensor, b: Tensor, out: Tensor | None = None, *, added: bool = False) -> tuple[Tensor, Multiply] | None:
    """`a b` of `[n, k]` and `[k, m]`, and how to multiply others of their dtypes, shapes and strides; None where torch has to do it, or to
    say what is wrong.

    Args:
        out: where the product is written, in float32 and more than a row or a column; by default a new tensor of the factors' dtype.
        added: to what is there.
    """
    alike = a.dtype == b.dtype and a.device == b.device and a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    if not alike or a.dtype not in _TYPES or a.device.type != _DEVICE or not ordinary():
        return None
    first, second = _columns(b), _columns(a)  # cuBLAS goes by columns: the product in rows is that of b^T and a^T in columns
    n, k, m = *a.shape, b.shape[1]
    if first is None or second is None or min(n, k, m) < 1:
        return None
    leading, result = m, _TYPES[a.dtype]
    if out is not None:  # but torch has other ways to a row or a column in float32
        fits = min(n, m) > 1 and out.dtype == torch.float32 and out.device == a.device and out.shape == (n, m)
        third = _columns(out) if fits else None
        if third is None or third[0]:
            return None
        leading, result = third[1], _FLOAT32
    multiply = _multiply(a.get_device(), int(added), _TYPES[a.dtype], result, first[0], second[0], m, n, k, first[1], second[1], leading)
    if multiply is None:
        return None
    if out is None:
        out = a.new_empty((n, m))
    with torch.cuda.device_of(a):
        multiply(a.data_ptr(), b.data_ptr(), out.data_ptr())
    return out, multiply


def nodes(multiply: Multiply, *matrices: Tensor) -> portable_plan.Nodes | None:
    """What cuBLAS has the GPU do in this multiplication. None where that is not known for sure, and while the stream is captured."""
    library = portable_plan.module()
    if library is None or torch.cuda.is_current_stream_capturing():
        return None
    with torch.cuda.device_of(matrices[0]):
        most = _workspace(matrices[0].get_device())
        found = None if most is None else library.nodes(multiply, most, *[x.data_ptr() & 15 for x in matrices])
    return None if found is None else portable_plan.Nodes(*found)


def _columns(x: Tensor) -> tuple[bool, int] | None:
    """Whether a matrix lies in memory by columns, and numbers from one row (or column) to the next; None if neither is without gaps."""
    (rows, columns), (down, right) = x.shape, x.stride()
    for by_columns, inner, length, outer, count in ((False, right, columns, down, rows), (True, down, rows, right, columns)):
        if (inner == 1 or length == 1) and (outer >= length or count == 1):
            return by_columns, length if count == 1 else outer
    return None


def _multiply(*numbers: int) -> Multiply | None:
    """products.c says what they are."""
    library = portable_plan.module()
    if library is None or max(numbers) > _LARGEST:
        return None
    assert torch.version.cuda is not None
    try:
        return library.product(f"libcublas.so.{torch.version.cuda.split('.')[0]}", _handle, *numbers)
    except ImportError:  # another cuBLAS, or inside of torch
        return None
