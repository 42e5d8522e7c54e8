"""One residual block: `x + mixer(norm(x))`, then `x + mlp(norm(x))`."""

from __future__ import annotations

from torch import Tensor, nn

from gdn.core.packing import Packing
from gdn.mixers.base import MixerConfig, MixerState
from gdn.nn import RMSNorm, SwiGLU


class Block(nn.Module):
    """A pre-norm block. Without `inner` width there is no MLP (pure Mamba2 models)."""

    def __init__(self, mixer: MixerConfig, width: int, inner: int, norm_eps: float, norm_offset: float = 0.0) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width, norm_eps, norm_offset)
        self.mixer = mixer.build(width)
        if inner:
            self.mlp_norm = RMSNorm(width, norm_eps, norm_offset)
            self.mlp = SwiGLU(width, inner)
        self.has_mlp = inner > 0

    def forward(
        self, x: Tensor, state: MixerState | None = None, packing: Packing | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState | None]:
        h = self.mixer_norm(x)
        if state is None or packing is not None:  # the mixer refuses both together
            y, state = self.mixer(h, state=state, packing=packing, mask=mask)
        else:
            y, state = self.mixer.read(h, state, mask)
        x = x + y
        if self.has_mlp:
            x = x + self.mlp(self.mlp_norm(x))
        return x, state
