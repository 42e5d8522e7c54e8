"""What a token mixer is: a configuration that knows its costs, a module, and a state of fixed size.

A mixer maps `x [B, T, width]` to `y [B, T, width]`, causally. It runs in three modes over one state object:

    y, _ = mixer(x)                                     a whole sequence
    y, state = mixer(x, state=state)                    more tokens of sequences already begun (prefill), or a few (decoding)

The state given is updated in place and returned. Only when a gradient has to flow through it (gradients enabled and a tensor of the state
requires one) is a new state returned and the given one left as it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from gdn.core.config import Config
from gdn.core.packing import Packing


class MixerConfig(Config):
    """Base of every mixer's configuration. The subclass is nested in its mixer; its tag is the name of its file."""

    variants: ClassVar[str | None] = "gdn.mixers"

    def build(self, width: int) -> Mixer:
        """The module, for residual streams of `width` channels."""
        raise NotImplementedError

    def num_parameters(self, width: int) -> int:
        """Exact number of parameters."""
        raise NotImplementedError

    def flops_per_token(self, width: int, length: int) -> int:
        """Floating-point operations of the forward pass per token, at context length `length`: two per multiply-add."""
        raise NotImplementedError

    def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
        """Bytes of state per sequence after `length` tokens, with activations of `itemsize` bytes."""
        raise NotImplementedError

    def saved_channels(self, width: int) -> int:
        """Values per token that a training step keeps for the backward pass, beyond the mixer's input. An estimate."""
        raise NotImplementedError


@dataclass(eq=False)
class MixerState:
    """Named tensors, each with the sequences of a batch as its first dimension. Its size does not depend on the tokens seen."""

    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def clone(self) -> MixerState:
        """A snapshot that later tokens do not touch."""
        return MixerState({name: t.clone() for name, t in self.tensors.items()})

    def copy_(self, other: MixerState) -> None:
        """Return to a snapshot, in place."""
        for name, tensor in self.tensors.items():
            tensor.copy_(other.tensors[name])

    def select(self, sequences: Tensor) -> MixerState:
        """A state for the given sequences `[n]` of the batch, in that order: reorder, drop or repeat them."""
        return MixerState({name: t.index_select(0, sequences) for name, t in self.tensors.items()})

    def update(self, **tensors: Tensor) -> MixerState:
        """The state after some tokens: in place, or a new one where a gradient flows."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in [*tensors.values(), *self.tensors.values()]):
            return MixerState({**self.tensors, **tensors})
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)
        return self


class Mixer(nn.Module):
    """Base of every token mixer."""

    def forward(
        self,
        x: Tensor,
        *,
        state: MixerState | None = None,
        packing: Packing | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        """
        Args:
            x: `[B, T, width]`.
            state: continue from here. Not together with packing.
            packing: boundaries of packed documents; nothing passes from one to the next.
            mask: bool `[B, T]`, False at padding on the left of a sequence. Padding leaves no trace in outputs or state.

        Returns:
            y `[B, T, width]` and the state after the last token (None when none was given).
        """
        raise NotImplementedError

    def join(self, layers: Sequence[Mixer]) -> None:
        """Called once by a model with the mixers of all its layers in order, for mixers that share something with others of their kind."""

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """An empty state for `batch` sequences. `dtype` is that of the activations; recurrent memory is float32."""
        raise NotImplementedError
