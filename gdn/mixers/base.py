"""What a token mixer is: a configuration that knows its costs, a module, and a state of fixed size.

A mixer maps `x [B, T, width]` to `y [B, T, width]`, causally. It runs in three modes over one state object:

    y, _ = mixer(x)                                     a whole sequence
    y, state = mixer(x, state=state)                    more tokens of sequences already begun (prefill), or a few (decoding)

A state of fixed size is the rule; a mixer may let go of a part of it for good. Attention to the whole past cannot keep the rule: its
configuration says so (`state_grows`) and its state is a `GrowingState`, which declares its size at every length.

The state given is updated in place and returned. Only when a gradient has to flow through it (gradients enabled and a tensor of the state
requires one) is a new state returned and the given one left as it was.
"""

from __future__ import annotations

import dataclasses
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

    @property
    def state_grows(self) -> bool:
        """Whether the state takes more memory the more tokens it has seen."""
        return False

    def build(self, width: int) -> Mixer:
        """The module, for residual streams of `width` channels."""
        raise NotImplementedError

    def num_parameters(self, width: int) -> int:
        """Exact number of parameters."""
        raise NotImplementedError

    def flops_per_token(self, width: int, length: int) -> int:
        """Floating-point operations of the forward pass per token, two per multiply-add: the mean over a sequence of `length`."""
        raise NotImplementedError

    def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
        """Bytes of state per sequence after `length` tokens, with activations of `itemsize` bytes."""
        raise NotImplementedError

    def saved_channels(self, width: int) -> int:
        """Values per token that a training step keeps for the backward pass, beyond the mixer's input. An estimate."""
        raise NotImplementedError


@dataclass(eq=False)
class MixerState:
    """Named tensors, each with the sequences of a batch as its first dimension. Its size does not depend on the tokens seen, unless it is a
    `GrowingState`."""

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
        return dataclasses.replace(self, tensors={name: t.clone() for name, t in self.tensors.items()})

    def copy_(self, other: MixerState) -> None:
        """Return to a snapshot, in place."""
        for name in self.tensors:
            self._put(name, other.tensors[name])

    def select(self, sequences: Tensor) -> MixerState:
        """A state for the given sequences `[n]` of the batch, in that order: reorder, drop or repeat them."""
        return dataclasses.replace(self, tensors={name: t.index_select(0, sequences) for name, t in self.tensors.items()})

    def update(self, **tensors: Tensor) -> MixerState:
        """The state after some tokens: in place, or a new one where a gradient flows."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in [*tensors.values(), *self.tensors.values()]):
            return dataclasses.replace(self, tensors={**self.tensors, **tensors})
        for name, tensor in tensors.items():
            self._put(name, tensor)
        return self

    def _put(self, name: str, tensor: Tensor) -> None:
        self.tensors[name].copy_(tensor)


LEAST_ROOM = 64
"""Tokens that an empty growing state has room for."""


def room(tokens: int) -> int:
    """Tokens that a growing state has room for when it holds `tokens`: `LEAST_ROOM`, doubled as often as needed, so that copying what it
    holds into a larger one costs less than two writes per token in all."""
    return LEAST_ROOM << max(0, (tokens - 1) // LEAST_ROOM).bit_length()


@dataclass(eq=False)
class GrowingState(MixerState):
    """A state whose second dimension is room for tokens. When they fill it, tensors of twice the room take the place of the full ones in
    the same object: between doublings its addresses stay, and its size is that of `room(tokens)` tokens at every length."""

    tokens: int = 0
    """Tokens of the longest sequence; the host knows them without asking the device."""

    def with_room(self, name: str, tokens: int) -> Tensor:
        """The tensor of that name with room for `tokens`: itself, or a larger copy with zeros behind."""
        tensor = self.tensors[name]
        missing = room(tokens) - tensor.shape[1]
        if missing <= 0:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], missing, *tensor.shape[2:])], dim=1)

    def copy_(self, other: MixerState) -> None:
        super().copy_(other)
        assert isinstance(other, GrowingState)
        self.tokens = other.tokens

    def _put(self, name: str, tensor: Tensor) -> None:
        if self.tensors[name].shape == tensor.shape:
            super()._put(name, tensor)
        else:
            self.tensors[name] = tensor.detach().clone()


class Mixer(nn.Module):
    """Base of every token mixer."""

    def scaled_by_depth(self) -> tuple[Tensor, ...]:
        """Matrices into the residual stream that the official initialisation redraws and divides by `sqrt(2 layers)`."""
        return ()

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
