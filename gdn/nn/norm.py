"""Root-mean-square normalisation over the last dimension, statistics in fp32, weight initialised at one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdn.ops import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight`, x `[..., width]`."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """`rms_norm(x) * silu(gate)`: norm first, then gate, as in Gated DeltaNet. Mamba2 gates first and norms after."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, eps=self.eps)
