"""From projections to normalised queries and keys, and values: contract and table."""

from __future__ import annotations

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.replay import replayed

EPS = 1e-6
"""That of l2norm."""

OP = Op(
    "convolved_qkv",
    (
        Impl("portable", "gdn.ops.qkv.portable:convolved_qkv", triton_gpu(W=range(1, 9), K=range(1, 1025))),
        Impl("composed", "gdn.ops.qkv.composed:convolved_qkv"),
        Impl("reference", "gdn.ops.qkv.reference:convolved_qkv"),
    ),
)
"""Rows take `(x, weight, heads, head_dim, packing)`."""


@replayed
def convolved_qkv(x: Tensor, weight: Tensor, *, heads: int, head_dim: int, packing: Packing | None = None) -> tuple[Tensor, Tensor, Tensor]:
    r"""The short convolution over queries, keys and values, and the length of queries and keys, as in Gated DeltaNet (arXiv 2412.06464):

        q, k, v = split( causal_conv1d(x, weight, activation="silu") )        l2norm(q), l2norm(k), v

    Args:
        x: projections to queries, keys and values side by side, `[B, T, 2 heads head_dim + VD]`, any floating dtype.
        weight: taps `[2 heads head_dim + VD, W]`, any floating dtype, see `causal_conv1d`.
        heads, head_dim: of queries and keys.
        packing: boundaries of packed documents over the `B * T` tokens; a tap reaches into none but its own.

    Returns:
        q and k `[B, T, heads, head_dim]`, each vector of length one, and v `[B, T, VD]`, in the dtype of x. Sums are float32 (float64
        with float64 inputs). Differentiable with respect to x and weight.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.

    Example:
        One tap of one. silu(1) is 0.731; a vector of one number has length one when normalised, whatever the number.

        >>> import torch
        >>> q, k, v = convolved_qkv(torch.ones(1, 1, 3), torch.ones(3, 1), heads=1, head_dim=1)
        >>> round(q.item(), 3), round(k.item(), 3), round(v.item(), 3)
        (1.0, 1.0, 0.731)
    """
    sizes = checks.shapes(("x", x, "B T D"), ("weight", weight, "D W"))
    heads, head_dim = checks.integer("heads", heads, least=1), checks.integer("head_dim", head_dim, least=1)
    if 2 * heads * head_dim > sizes["D"]:
        raise ArgumentError(f"x: expected room for queries and keys of {heads} heads of {head_dim}, got {list(x.shape)}")
    if sizes["W"] < 1:
        raise ArgumentError(f"weight: expected at least one tap, got {list(weight.shape)}")
    checks.floating(("x", x), ("weight", weight))
    checks.same_device(("x", x), ("weight", weight))
    checks.boundaries(packing, sizes["B"], sizes["T"], x.device)
    return OP.pick(x, W=sizes["W"], K=head_dim)(x, weight, heads, head_dim, packing)
