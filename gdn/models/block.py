"""One residual block: `x + mixer(norm(x))`, then `x + mlp(norm(x))`; or with the norms after, `x + norm(mixer(x))`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gdn.core.packing import Packing
from gdn.mixers.base import MixerConfig, MixerState
from gdn.nn import RMSNorm, SwiGLU
from gdn.nn.norm import add_and_norm


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
        self.compiled = False
        """Whether torch.compile has its say: all blocks share one function, so that equal ones share what is compiled."""

    def forward(
        self, x: Tensor, state: MixerState | None = None, packing: Packing | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, MixerState | None]:
        x, added, state = self.terms(x, None, state, packing, mask)
        return x + added, state

    def terms(
        self, x: Tensor, added: Tensor | None, state: MixerState | None, packing: Packing | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, MixerState | None]:
        """What `forward` gives for `x + added`, as two terms, and the state: whoever norms their sum takes it in the same pass.

        This block's own such pass comes before what is compiled, which so sees no difference between the first block and others.
        """
        if self.norm_after:
            normed = x = x if added is None else x + added
        else:
            normed, x = add_and_norm(self.mixer_norm, x, added)
        alone = self.compiled and not torch.compiler.is_compiling()
        return (_compiled_terms() if alone else Block._terms)(self, normed, x, state, packing, mask)

    def _terms(
        self, normed: Tensor, x: Tensor, state: MixerState | None, packing: Packing | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, MixerState | None]:
        y, state = self._mix(normed, state, packing, mask)
        if self.norm_after:
            return *self._norm_after(x, y), state
        if self.has_mlp:
            normed, x = add_and_norm(self.mlp_norm, x, y)
            y = self.mlp(normed)
        return x, y, state

    def _norm_after(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = self.mixer_norm(y)
        if self.has_mlp:
            x = x + y
            y = self.mlp_norm(self.mlp(x))
        return x, y

    def _mix(self, x: Tensor, state: MixerState | None, packing: Packing | None, mask: Tensor | None) -> tuple[Tensor, MixerState | None]:
        if state is None or packing is not None:  # the mixer refuses both together
            return self.mixer(x, state=state, packing=packing, mask=mask)
        return self.mixer.read(x, state, mask)


@functools.cache
def _compiled_terms() -> Callable[..., tuple[Tensor, Tensor, MixerState | None]]:
    """Not before it is wanted: the compiler takes a second to import."""
    return torch.compile(Block._terms)
