"""What delta-rule mixers do to queries and keys between the convolution and the memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from gdn.ops import l2norm

QKActivation = Literal["silu", "relu", "elu+1", "identity"]
QKNorm = Literal["l2", "l1", "none"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "elu+1": lambda x: F.elu(x) + 1,
    "identity": lambda x: x,
}


def normalise(x: Tensor, norm: QKNorm) -> Tensor:
    """Each vector `[..., K]` over its length ("l2", see `l2norm`), over the sum of its absolute values ("l1"), or as it is ("none")."""
    if norm == "l2":
        return l2norm(x)
    if norm == "l1":
        return x / x.abs().sum(-1, keepdim=True).clamp_min(1e-6)
    return x
