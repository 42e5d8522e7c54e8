"""Root-mean-square normalisation over the last dimension, statistics in fp32, weight initialised at one."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gdn.core.checks import accumulate_dtype
from gdn.nn.linear import is_hooked, is_matrix
from gdn.ops import add_rms_norm, gated_rms_norm, gated_rms_norm_linear, rms_norm


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * (weight + offset)`, x `[..., width]`. An offset of 1 stores weights around zero, as Qwen3-Next does."""

    def __init__(self, width: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.factors(), eps=self.eps)

    def factors(self) -> Tensor:
        """What channels are multiplied by."""
        return self.weight.to(accumulate_dtype(self.weight.dtype)) + self.offset if self.offset else self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


class GatedRMSNorm(RMSNorm):
    """`rms_norm(x) * silu(gate)`, or `sigmoid(gate)`: norm first, then gate, as in Gated DeltaNet. Mamba2 gates first and norms after."""

    def __init__(self, width: int, eps: float = 1e-5, activation: Literal["silu", "sigmoid"] = "silu") -> None:
        super().__init__(width, eps)
        self.activation: Literal["silu", "sigmoid"] = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return gated_rms_norm(x, gate, self.weight, activation=self.activation, eps=self.eps)


def add_and_norm(norm: nn.Module, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """The norm of `x + added`, and that sum. One operator if `norm` is an `RMSNorm` that nobody has wrapped and both are of one dtype."""
    if added is None:
        return norm(x), x
    if type(norm) is RMSNorm and not is_hooked(norm) and x.dtype == added.dtype:
        return add_rms_norm(added, x, norm.factors(), eps=norm.eps)
    total = x + added
    return norm(total), total


def norm_and_project(norm: nn.Module, x: Tensor, gate: Tensor, layer: nn.Module) -> Tensor:
    """The heads `[..., H, width]`, normed and gated, through a linear layer over all of them: `[..., out]`. One operator if `norm` is a
    `GatedRMSNorm` and `layer` a matrix, and nobody has wrapped either."""
    if type(norm) is not GatedRMSNorm or is_hooked(norm) or not is_matrix(layer):
        return layer(norm(x, gate).flatten(-2))
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.to(x.dtype)
    return gated_rms_norm_linear(x, gate, norm.weight, weight, activation=norm.activation, eps=norm.eps)
