"""Normalisations over the last dimension: contracts and tables. README.md has the backward passes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.replay import replayed

L2NORM = Op(
    "l2norm",
    (
        Impl("portable", "gdn.ops.norm.portable:l2norm", triton_gpu(D=range(1, 16385))),
        Impl("torch", "gdn.ops.norm.plain:l2norm"),
        Impl("reference", "gdn.ops.norm.reference:l2norm"),
    ),
)
"""Rows take `(x, eps)`."""

RMS_NORM = Op(
    "rms_norm",
    (
        Impl("portable", "gdn.ops.norm.portable:rms_norm", triton_gpu(D=range(1, 16385))),
        Impl("torch", "gdn.ops.norm.plain:rms_norm"),
        Impl("reference", "gdn.ops.norm.reference:rms_norm"),
    ),
)
"""Rows take `(x, weight, eps)`."""

ADD_RMS_NORM = Op(
    "add_rms_norm",
    (
        Impl("portable", "gdn.ops.norm.portable:add_rms_norm", triton_gpu(D=range(1, 16385))),
        Impl("torch", "gdn.ops.norm.plain:add_rms_norm"),
        Impl("reference", "gdn.ops.norm.reference:add_rms_norm"),
    ),
)
"""Rows take `(x, residual, weight, eps)`."""

GATED_RMS_NORM = Op(
    "gated_rms_norm",
    (
        Impl("portable", "gdn.ops.norm.portable:gated_rms_norm", triton_gpu(D=range(1, 16385))),
        Impl("torch", "gdn.ops.norm.plain:gated_rms_norm"),
        Impl("reference", "gdn.ops.norm.reference:gated_rms_norm"),
    ),
)
"""Rows take `(x, gate, weight, eps, silu)`."""


@replayed
def l2norm(x: Tensor, *, eps: float = 1e-6) -> Tensor:
    r"""Scale each vector to length one:

        y = x / sqrt( sum of x^2 over the last dimension + eps )

    eps stands inside the root, as in the official Gated DeltaNet (arXiv 2412.06464): a vector of zeros gives zeros and a finite gradient.

    Args:
        x: `[..., D]`, any floating dtype.
        eps: above 0.

    Returns:
        The shape and dtype of x; computed in float32 (float64 with float64 inputs). Differentiable.

    Raises:
        ArgumentError: x has no dimension or no floating dtype, or eps is not above 0.

    Example:
        >>> import torch
        >>> l2norm(torch.tensor([3.0, 4.0]), eps=75.0)
        tensor([0.3000, 0.4000])
    """
    eps = _check(x, eps)
    return L2NORM.pick(x, D=x.shape[-1])(x, eps)


@replayed
def rms_norm(x: Tensor, weight: Tensor, *, eps: float = 1e-5) -> Tensor:
    r"""Scale each vector to a root mean square of one, then each channel by its weight (arXiv 1910.07467):

        y = x / sqrt( mean of x^2 over the last dimension + eps ) * weight

    Args:
        x: `[..., D]`, any floating dtype.
        weight: `[D]`, any floating dtype.
        eps: above 0.

    Returns:
        The shape and dtype of x; computed in float32 (float64 with float64 inputs). Differentiable with respect to x and weight.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or eps is not above 0.

    Example:
        >>> import torch
        >>> rms_norm(torch.tensor([1.0, 7.0]), torch.tensor([5.0, 10.0]), eps=1e-12)
        tensor([ 1., 14.])
    """
    eps = _check(x, eps, weight=weight)
    return RMS_NORM.pick(x, D=x.shape[-1])(x, weight, eps)


@replayed
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    r"""Add to the residual stream, and norm the sum for who reads it next:

        total = x + residual        y = rms_norm(total, weight)

    Args:
        x: `[..., D]`, any floating dtype.
        residual: the shape and dtype of x.
        weight: `[D]`, any floating dtype.
        eps: above 0.

    Returns:
        y and total, the shape and dtype of x: total is rounded to that dtype before the norm, which is computed in float32 (float64 with
        float64 inputs). Differentiable with respect to x, residual and weight. The backward pass needs total and one number a vector, and
        keeps neither x nor residual.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or eps is not above 0.

    Example:
        >>> import torch
        >>> add_rms_norm(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 4.0]), torch.tensor([5.0, 10.0]), eps=1e-12)
        (tensor([ 1., 14.]), tensor([1., 7.]))
    """
    eps = _check(x, eps, weight=weight)
    checks.tensors(("residual", residual))
    checks.same_dtype(("x", x), ("residual", residual))
    checks.same_device(("x", x), ("residual", residual))
    if residual.shape != x.shape:
        raise ArgumentError(f"residual: expected {list(x.shape)} like x, got {list(residual.shape)}")
    return ADD_RMS_NORM.pick(x, D=x.shape[-1])(x, residual, weight, eps)


@replayed
def gated_rms_norm(
    x: Tensor, gate: Tensor, weight: Tensor, *, activation: Literal["silu", "sigmoid"] = "silu", eps: float = 1e-5
) -> Tensor:
    r"""Norm first, then gate, the output of Gated DeltaNet (arXiv 2412.06464):

        y = rms_norm(x, weight) * gate * sigmoid(gate)

    or with "sigmoid" the output of Kimi Delta Attention (arXiv 2510.26692), without the factor `gate`.

    Args:
        x: `[..., D]`, any floating dtype.
        gate: the shape of x, any floating dtype.
        weight: `[D]`, any floating dtype.
        activation: of the gate, "silu" or "sigmoid".
        eps: above 0.

    Returns:
        The shape and dtype of x; computed in float32 (float64 with float64 inputs). Differentiable with respect to x, gate and weight.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, the activation is another one, or eps is not above 0.

    Example:
        The gate 100 is large, so that its sigmoid is 1.

        >>> import torch
        >>> gated_rms_norm(torch.tensor([1.0, 7.0]), torch.tensor([100.0, 0.0]), torch.tensor([5.0, 10.0]), eps=1e-12)
        tensor([100.,   0.])
    """
    eps = _check(x, eps, weight=weight, gate=gate)
    if activation not in ("silu", "sigmoid"):
        raise ArgumentError(f'activation: expected "silu" or "sigmoid", got {activation!r}')
    return GATED_RMS_NORM.pick(x, D=x.shape[-1])(x, gate, weight, eps, activation == "silu")


def _check(x: Tensor, eps: float, **others: Tensor) -> float:
    """`others` are the weight and the gate, of which an operator may have none. Returns eps."""
    checks.tensors(("x", x), *others.items())
    if x.ndim == 0:
        raise ArgumentError("x: expected [..., D], got a scalar")
    weight, gate = others.get("weight"), others.get("gate")
    if weight is not None:
        checks.shapes(("weight", weight, "D"), D=x.shape[-1])
    if gate is not None and gate.shape != x.shape:
        raise ArgumentError(f"gate: expected {list(x.shape)} like x, got {list(gate.shape)}")
    checks.floating(("x", x), ("gate", gate), ("weight", weight))
    checks.same_device(("x", x), ("gate", gate), ("weight", weight))
    return checks.number("eps", eps, above=0)
