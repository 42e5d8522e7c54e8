"""What a state-space layer (Mamba2, arXiv 2405.21060) does beside its memory: contracts and tables."""

from __future__ import annotations

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.replay import replayed

SCALE_HEADS = Op(
    "scale_heads",
    (
        Impl("portable", "gdn.ops.state_space.portable:scale_heads", triton_gpu(P=range(1, 4097))),
        Impl("torch", "gdn.ops.state_space.plain:scale_heads"),
        Impl("reference", "gdn.ops.state_space.reference:scale_heads"),
    ),
)
"""Rows take `(x, factor)`."""

SKIP_GATED_RMS_NORM = Op(
    "skip_gated_rms_norm",
    (
        Impl("portable", "gdn.ops.state_space.portable:skip_gated_rms_norm", triton_gpu(W=range(1, 8193))),
        Impl("torch", "gdn.ops.state_space.plain:skip_gated_rms_norm"),
        Impl("reference", "gdn.ops.state_space.reference:skip_gated_rms_norm"),
    ),
)
"""Rows take `(y, x, D, gate, weight, groups, eps)`."""


@replayed
def scale_heads(x: Tensor, factor: Tensor) -> Tensor:
    r"""Multiply each head of each token by a number of its own, as by a time step:

        y = factor x

    Args:
        x: `[B, T, H, P]`, any floating dtype.
        factor: `[B, T, H]`, float32 (float64 with float64 x).

    Returns:
        y, the shape and dtype of x, rounded once. Differentiable with respect to both.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.

    Example:
        >>> import torch
        >>> scale_heads(torch.tensor([3.0, 4.0]).reshape(1, 1, 1, 2), torch.full((1, 1, 1), 0.5)).flatten()
        tensor([1.5000, 2.0000])
    """
    sizes = checks.shapes(("x", x, "B T H P"), ("factor", factor, "B T H"))
    checks.floating(("x", x))
    if factor.dtype != checks.accumulate_dtype(x.dtype):
        raise ArgumentError(f"factor: expected {checks.accumulate_dtype(x.dtype)}, got {factor.dtype}")
    checks.same_device(("x", x), ("factor", factor))
    return SCALE_HEADS.pick(x, P=sizes["P"])(x, factor)


@replayed
def skip_gated_rms_norm(y: Tensor, x: Tensor, D: Tensor, gate: Tensor, weight: Tensor, *, groups: int = 1, eps: float = 1e-5) -> Tensor:
    r"""Skip, then gate, then norm, the output of Mamba2:

        u = (y + D x) silu(gate)        out = u / sqrt( mean of u^2 over the channels of a group + eps ) * weight

    Args:
        y, x: of H heads, `[B, T, H, P]`, any floating dtype, the same for both.
        D: `[H]`, any floating dtype.
        gate: `[B, T, C]` with C = H * P, the dtype of y.
        weight: `[C]`, any floating dtype.
        groups: of heads, H a multiple of it; each is normed by itself.
        eps: above 0.

    Returns:
        out `[B, T, C]`, the dtype of y; computed in float32 (float64 with float64 inputs). Differentiable with respect to all tensors.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or groups or eps is out of range.

    Example:
        The gate 100 is large, so that its sigmoid is 1; u is 100 and 700.

        >>> import torch
        >>> y, gate = torch.tensor([0.0, 3.0]).reshape(1, 1, 1, 2), torch.full((1, 1, 2), 100.0)
        >>> out = skip_gated_rms_norm(y, torch.tensor([1.0, 4.0]).reshape(1, 1, 1, 2), torch.ones(1), gate, torch.tensor([5.0, 10.0]))
        >>> [round(channel, 3) for channel in out.flatten().tolist()]
        [1.0, 14.0]
    """
    sizes = checks.shapes(("y", y, "B T H P"), ("x", x, "B T H P"), ("D", D, "H"))
    channels = sizes["H"] * sizes["P"]
    checks.shapes(("gate", gate, "B T C"), ("weight", weight, "C"), B=sizes["B"], T=sizes["T"], C=channels)
    checks.same_dtype(("y", y), ("x", x), ("gate", gate))
    checks.floating(("y", y), ("D", D), ("weight", weight))
    checks.same_device(("y", y), ("x", x), ("D", D), ("gate", gate), ("weight", weight))
    groups, eps = checks.integer("groups", groups, least=1), checks.number("eps", eps, above=0)
    if sizes["H"] % groups:
        raise ArgumentError(f"groups: expected a divisor of the {sizes['H']} heads of y, got {groups}")
    return SKIP_GATED_RMS_NORM.pick(y, W=channels // groups)(y, x, D, gate, weight, groups, eps)
