"""The definitions: an activation is rounded to the dtype of its input before the matrix. Gradients by autograd."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.ops.norm import reference as norm


def swiglu_linear(x: Tensor, weight: Tensor) -> Tensor:
    """See `gdn.ops.swiglu_linear`."""
    gate, up = x.to(accumulate_dtype(x.dtype)).chunk(2, dim=-1)
    return F.linear((gate * gate.sigmoid() * up).to(x.dtype), weight)


def gated_rms_norm_linear(x: Tensor, gate: Tensor, norm_weight: Tensor, weight: Tensor, eps: float, silu: bool) -> Tensor:
    """See `gdn.ops.gated_rms_norm_linear`."""
    return F.linear(norm.gated_rms_norm(x, gate, norm_weight, eps, silu).flatten(-2), weight)


def parallel_linear(x: Tensor, *weights: Tensor | None) -> tuple[Tensor, ...]:
    """See `gdn.ops.parallel_linear`."""
    return tuple(x if weight is None else F.linear(x, weight) for weight in weights)
