"""The feed-forward part of a block."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gdn.nn.linear import is_matrix
from gdn.ops import swiglu_linear


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))` without biases. `gate_up` holds both input matrices, gate first."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.stacked_rows = {"gate_up": (inner, inner)}

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        if is_matrix(self.down):
            return swiglu_linear(both, self.down.weight.to(both.dtype))
        gate, up = both.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)
