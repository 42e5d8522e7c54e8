"""Matrices with what stands before and beside them: contracts and tables.

A matrix keeps its input for the gradient of its weights. Where that input is cheap to make from what the backward pass needs anyway, the
first two operators make it again instead of keeping it: for SwiGLU a third of what a block's MLP keeps. The third adds up the gradients
that several matrices send to one input while it multiplies.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.replay import replayed

SWIGLU_LINEAR = Op(
    "swiglu_linear",
    (
        Impl("portable", "gdn.ops.projection.portable:swiglu_linear", triton_gpu()),
        Impl("torch", "gdn.ops.projection.plain:swiglu_linear"),
        Impl("reference", "gdn.ops.projection.reference:swiglu_linear"),
    ),
)
"""Rows take `(x, weight)`."""

GATED_RMS_NORM_LINEAR = Op(
    "gated_rms_norm_linear",
    (
        Impl("portable", "gdn.ops.projection.portable:gated_rms_norm_linear", triton_gpu(D=range(1, 16385))),
        Impl("torch", "gdn.ops.projection.plain:gated_rms_norm_linear"),
        Impl("reference", "gdn.ops.projection.reference:gated_rms_norm_linear"),
    ),
)
"""Rows take `(x, gate, norm_weight, weight, eps, silu)`."""

PARALLEL_LINEAR = Op(
    "parallel_linear",
    (
        Impl("torch", "gdn.ops.projection.plain:parallel_linear"),
        Impl("reference", "gdn.ops.projection.reference:parallel_linear"),
    ),
)
"""Rows take `(x, first, second, third)` and return three results, of no meaning where a matrix is None."""


@replayed
def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    r"""SwiGLU (arXiv 2002.05202) and the matrix after it:

        y = (silu(gate) * up) weight^T        x = [gate, up],  silu(z) = z sigmoid(z)

    Args:
        x: gates, then what they multiply, `[..., 2 N]`, any floating dtype.
        weight: `[M, N]`, the dtype of x.

    Returns:
        y `[..., M]` in the dtype of x. The product, computed in float32 (float64 with float64 inputs), is rounded to that dtype before the
        matrix, and made again in the backward pass, which keeps x and weight. Differentiable with respect to both.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.

    Example:
        The gate 100 is large, so that its sigmoid is 1.

        >>> import torch
        >>> swiglu_linear(torch.tensor([100.0, 0.0, 2.0, 5.0]), torch.tensor([[3.0, 7.0]]))
        tensor([600.])
    """
    sizes = checks.shapes(("weight", weight, "M N"))
    checks.tensors(("x", x))
    if x.ndim == 0 or x.shape[-1] != 2 * sizes["N"]:
        raise ArgumentError(f"x: expected [..., {2 * sizes['N']}] to fit weight, got {list(x.shape)}")
    _check(x, weight)
    return SWIGLU_LINEAR.pick(x)(x, weight)


@replayed
def gated_rms_norm_linear(
    x: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    *,
    activation: Literal["silu", "sigmoid"] = "silu",
    eps: float = 1e-5,
) -> Tensor:
    r"""The norm and the gate of each head, and the matrix over all heads:

        y = flatten( gated_rms_norm(x, gate, norm_weight) ) weight^T

    Args:
        x: heads `[..., H, D]`, any floating dtype.
        gate: the shape of x, any floating dtype.
        norm_weight: `[D]`, any floating dtype.
        weight: `[M, H D]`, the dtype of x.
        activation, eps: see `gated_rms_norm`.

    Returns:
        y `[..., M]` in the dtype of x. What goes into the matrix is rounded to that dtype, and made again in the backward pass, which keeps
        the arguments and one number a head. Differentiable with respect to x, gate, norm_weight and weight.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, the activation is another one, or eps is not above 0.

    Example:
        >>> import torch
        >>> x, gate = torch.tensor([[1.0, 7.0]]), torch.tensor([[100.0, 0.0]])
        >>> gated_rms_norm_linear(x, gate, torch.tensor([5.0, 10.0]), torch.tensor([[2.0, 1.0]]), eps=1e-12)
        tensor([200.])
    """
    checks.tensors(("x", x), ("gate", gate))
    if x.ndim < 2:
        raise ArgumentError(f"x: expected [..., H, D], got {list(x.shape)}")
    checks.shapes(("weight", weight, "M HD"), HD=x.shape[-2] * x.shape[-1])
    checks.shapes(("norm_weight", norm_weight, "D"), D=x.shape[-1])
    if gate.shape != x.shape:
        raise ArgumentError(f"gate: expected {list(x.shape)} like x, got {list(gate.shape)}")
    checks.floating(("gate", gate), ("norm_weight", norm_weight))
    checks.same_device(("x", x), ("gate", gate), ("norm_weight", norm_weight))
    if activation not in ("silu", "sigmoid"):
        raise ArgumentError(f'activation: expected "silu" or "sigmoid", got {activation!r}')
    eps = checks.number("eps", eps, above=0)
    _check(x, weight)
    return GATED_RMS_NORM_LINEAR.pick(x, D=x.shape[-1])(x, gate, norm_weight, weight, eps, activation == "silu")


def parallel_linear(x: Tensor, first: Tensor, second: Tensor | None = None, third: Tensor | None = None) -> tuple[Tensor, ...]:
    r"""One input and up to three matrices:

        y_i = x weight_i^T

    Args:
        x: `[..., N]`, any floating dtype.
        first, second, third: `[M_i, N]`, the dtype of x. The last ones may be None.

    Returns:
        y_i `[..., M_i]` in the dtype of x, one for each matrix. Differentiable with respect to all; the gradient of x is summed by
        the matrix products themselves, rounded to the dtype of x after each.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or third is given without second.

    Example:
        >>> import torch
        >>> parallel_linear(torch.tensor([1.0, 2.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 1.0]]))
        (tensor([11.]), tensor([2.]))
    """
    checks.tensors(("x", x), ("first", first))
    if x.ndim == 0:
        raise ArgumentError("x: expected [..., N], got a scalar")
    if second is None and third is not None:
        raise ArgumentError("third: expected none without second")
    weights = {"first": first, "second": second, "third": third}
    given = {name: weight for name, weight in weights.items() if weight is not None}
    for name, weight in given.items():
        checks.shapes((name, weight, "M N"), N=x.shape[-1])
    checks.same_dtype(("x", x), *given.items())
    checks.same_device(("x", x), *given.items())
    return PARALLEL_LINEAR.pick(x)(x, first, second, third)[: len(given)]


def _check(x: Tensor, weight: Tensor) -> None:
    checks.floating(("x", x))
    checks.same_dtype(("x", x), ("weight", weight))
    checks.same_device(("x", x), ("weight", weight))
