"""The rotary embedding of given angles: contract and table."""

from __future__ import annotations

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.replay import replayed

OP = Op(
    "rotary_embedding",
    (
        Impl("portable", "gdn.ops.rotary.portable:rotary_embedding", triton_gpu(N=range(1, 2049))),
        Impl("torch", "gdn.ops.rotary.plain:rotary_embedding"),
        Impl("reference", "gdn.ops.rotary.reference:rotary_embedding"),
    ),
)
"""Rows take `(x, cos, sin)`."""


@replayed
def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    r"""Turn pairs of channels by given angles (RoFormer, arXiv 2104.09864). Channel i of the first N is paired with channel i + N: halves,
    as in LLaMA, not neighbours.

        y_i = x_i cos_i - x_{i+N} sin_i        y_{i+N} = x_i sin_i + x_{i+N} cos_i        for i < N; channels from 2N on stay

    Args:
        x: `[B, T, H, K]`.
        cos, sin: of the angles, `[T, N]` or `[B, T, N]`, 2N at most K. float32 (float64 with float64 x). They get no gradient.

    Returns:
        y, the shape and dtype of x; computed in the dtype of the angles. Differentiable with respect to x.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or cos or sin requires a gradient.

    Example:
        A quarter of a turn.

        >>> import torch
        >>> rotary_embedding(torch.tensor([3.0, 4.0, 5.0]).reshape(1, 1, 1, 3), torch.zeros(1, 1), torch.ones(1, 1)).flatten()
        tensor([-4.,  3.,  5.])
    """
    sizes = checks.shapes(("x", x, "B T H K"))
    checks.tensors(("cos", cos))
    tables = "T N" if cos.ndim == 2 else "B T N"
    sizes = checks.shapes(("cos", cos, tables), ("sin", sin, tables), **sizes)
    if 2 * sizes["N"] > sizes["K"]:
        raise ArgumentError(f"cos: expected angles for at most half of the {sizes['K']} channels of x, got {sizes['N']}")
    checks.floating(("x", x))
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != checks.accumulate_dtype(x.dtype):
            raise ArgumentError(f"{name}: expected {checks.accumulate_dtype(x.dtype)}, got {table.dtype}")
        if table.requires_grad:
            raise ArgumentError(f"{name}: expected angles without a gradient, got a tensor that requires one")
    checks.same_device(("x", x), ("cos", cos), ("sin", sin))
    return OP.pick(x, N=sizes["N"])(x, cos, sin)
