"""One residual block: `x + mixer(norm(x))`, then `x + mlp(norm(x))`; or with the norms after, `x + norm(mixer(x))`."""

from __future__ import annotations

from torch import Tensor, nn

from gdn.core.packing import Packing
from gdn.mixers.base import MixerConfig, MixerState
from gdn.nn import RMSNorm, SwiGLU


class Block(nn.Module):
    """A block with its norms before its parts, or after them (`norm_after`). Without `inner` width there is no MLP (pure Mamba2 models)."""

    def __init__(
        self, mixer: MixerConfig, width: int, inner: int, norm_eps: float, *, norm_offset: float = 0.0, norm_after: bool = False
    ) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(width, norm_eps, norm_offset)
        self.mixer = mixer.build(width)
        if inner:
            self.mlp_norm = RMSNorm(width, norm_eps, norm_offset)
            self.mlp = SwiGLU(width, inner)
        self.has_mlp, self.norm_after = inner > 0, norm_after

    def forward(
        self, x: Tensor, state: MixerState | None = None, packing: Packing | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState | None]:
        y, state = self._mix(x if self.norm_after else self.mixer_norm(x), state, packing, mask)
        x = x + (self.mixer_norm(y) if self.norm_after else y)
        if self.has_mlp:
            x = x + (self.mlp_norm(self.mlp(x)) if self.norm_after else self.mlp(self.mlp_norm(x)))
        return x, state

    def _mix(self, x: Tensor, state: MixerState | None, packing: Packing | None, mask: Tensor | None) -> tuple[Tensor, MixerState | None]:
        if state is None or packing is not None:  # the mixer refuses both together
            return self.mixer(x, state=state, packing=packing, mask=mask)
        return self.mixer.read(x, state, mask)
