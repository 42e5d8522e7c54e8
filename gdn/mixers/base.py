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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gdn.core.config import Config
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing


class MixerConfig(Config):
    """Base of every mixer's configuration. The subclass is nested in its mixer; its tag is the name of its file."""

    variants: ClassVar[str | None] = "gdn.mixers"
    typical: ClassVar[Mapping[str, Any]] = {}
    """Usual values of fields without a default, for lists of all mixers."""

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


FLOAT32 = ("A_log", "dt_bias")
"""Parameters that no cast may narrow: rounding the decay of one token is a different memory after a thousand."""


@dataclass(eq=False)
class MixerState:
    """Named tensors, each with the sequences of a batch as its first dimension. Its size does not depend on the tokens seen, unless it is a
    `GrowingState`."""

    tensors: dict[str, Tensor]
    past: Past | None = None
    """What takes the last tokens back, while that is being kept (`Past`)."""

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())

    def clone(self) -> MixerState:
        """A snapshot that later tokens do not touch."""
        return self._map(Tensor.clone)

    def copy_(self, other: MixerState) -> None:
        """Return to a snapshot, in place."""
        for name in self.tensors:
            self._put(name, other.tensors[name])

    def select(self, sequences: Tensor) -> MixerState:
        """A state for the given sequences `[n]` of the batch, in that order: reorder, drop or repeat them."""
        return self._map(lambda t: t.index_select(0, sequences.to(t.device)))

    def update(self, **tensors: Tensor) -> MixerState:
        """The state after some tokens: in place, or a new one where a gradient flows."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in [*tensors.values(), *self.tensors.values()]):
            return dataclasses.replace(self, tensors={**self.tensors, **tensors})
        for name, tensor in tensors.items():
            self._put(name, tensor)
        return self

    def full(self) -> MixerState:
        """The state as the mixer computes with it. Another object where it is stored in fewer bits."""
        return self

    def keep(self, after: MixerState) -> MixerState:
        """Store what `full` gave and some tokens changed."""
        return after

    def mark(self) -> MixerState:
        """A snapshot to go back to, as `copy_` does; it may share what later tokens do not overwrite."""
        return self._map(Tensor.clone)

    def _put(self, name: str, tensor: Tensor) -> None:
        self.tensors[name].copy_(tensor)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Any:
        past = None if self.past is None else self.past.map(function)
        return dataclasses.replace(self, tensors={name: function(t) for name, t in self.tensors.items()}, past=past)


@dataclass(eq=False)
class Past:
    """What takes the last tokens of a state back: the state before them and the mixer's inputs since.

    Going back is starting again from `start` and reading the inputs that stay, in the pieces they were read in: the state is bit for bit
    what it was, for every mixer. The inputs are the smallest thing that allows it. Numbers per token and layer of Qwen3.5-9B: the inputs
    4096; what the convolution and the gates read 8256; what was written after them (k, beta v, g, beta) 6208; a snapshot of the memory
    524288. Undoing a write arithmetically would keep even less, but divides by exp(g), which may be zero, and rounds.
    """

    start: MixerState
    window: int
    """At least this many of the last tokens can be taken back."""
    inputs: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens that can be taken back now."""
        return sum(x.shape[1] for x, _ in self.inputs)

    @property
    def nbytes(self) -> int:
        return self.start.nbytes + sum(x.nbytes for x, _ in self.inputs)

    def map(self, function: Callable[[Tensor], Tensor]) -> Past:
        inputs = [(function(x), None if mask is None else function(mask)) for x, mask in self.inputs]
        return Past(self.start._map(function), self.window, inputs)


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

    def mark(self) -> GrowingState:
        """Tokens are only ever added behind those that are held: their tensors are shared, and what counts them is copied."""
        return dataclasses.replace(self, tensors={name: t.clone() if t.ndim == 1 else t for name, t in self.tensors.items()})

    def copy_(self, other: MixerState) -> None:
        super().copy_(other)
        assert isinstance(other, GrowingState)
        self.tokens = other.tokens
        counts = next(t for t in self.tensors.values() if t.ndim == 1)
        first = int(counts.min())
        for tensor in self.tensors.values():
            if tensor.ndim > 1:  # what stood behind may be of tokens taken back
                behind = torch.arange(first, tensor.shape[1], device=tensor.device) >= counts.unsqueeze(1)
                tensor[:, first:].masked_fill_(behind.reshape(*behind.shape, *[1] * (tensor.ndim - 2)), 0)

    def _put(self, name: str, tensor: Tensor) -> None:
        if self.tensors[name] is tensor:
            return
        if self.tensors[name].shape == tensor.shape:
            super()._put(name, tensor)
        else:
            self.tensors[name] = tensor.detach().clone()


@dataclass(eq=False)
class FixedState(MixerState):
    """A state with room for a given number of tokens from the start. A step changes tensors only, at addresses that stay: it can be
    captured as a CUDA graph, or compiled once for all tokens."""

    begun: bool = False
    """Whether tokens have been read."""

    def copy_(self, other: MixerState) -> None:
        super().copy_(other)
        assert isinstance(other, FixedState)
        self.begun = other.begun


class Mixer(nn.Module):
    """Base of every token mixer."""

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        """Rows of each of the matrices that are stored in one, by the name of the module that holds them."""
        return {}

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

    def fixed_state(
        self, batch: int, room: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        """An empty state for at most `room` tokens, of which a step changes nothing but tensors in place."""
        state = self.init_state(batch, device=device, dtype=dtype)
        if type(state) is not MixerState:
            raise ArgumentError(f"room: expected None, {type(self).__name__} has no state whose steps change tensors only, got {room}")
        return state

    def read(self, x: Tensor, state: MixerState, mask: Tensor | None = None) -> tuple[Tensor, MixerState]:
        """`forward` with a state, stored as the state is stored, keeping what takes the tokens back if the state wants that."""
        past = state.past
        if past is None:
            return self._advance(x, state, mask)
        old = max(x.shape[1] - past.window, 0)  # too far back to be taken back
        outputs = []
        for begin, end in [(0, old), (old, x.shape[1])] if old else [(0, x.shape[1])]:
            part, seen = x[:, begin:end], None if mask is None else mask[:, begin:end]
            y, state = self._advance(part, state, seen)
            outputs.append(y)
            past.inputs.append((part.detach(), seen))
            self._forget(past)
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state

    @torch.no_grad()
    def rollback(self, state: MixerState, tokens: int) -> None:
        """Take the last tokens back, in place, exactly. What remains can still be taken back."""
        past = state.past
        if past is None:
            raise ArgumentError("state: keeps nothing to go back to; call record() before the tokens that may be taken back")
        if not 0 <= tokens <= past.length:
            raise ArgumentError(f"tokens: expected 0 to {past.length}, the number that can be taken back, got {tokens}")
        if tokens == 0:
            return
        past.inputs = _first(past.inputs, past.length - tokens)
        state.copy_(past.start)
        for x, mask in past.inputs:
            self._advance(x, state, mask)

    @torch.no_grad()
    def _forget(self, past: Past) -> None:
        """Move the start past what is too far back, in the pieces it was read in, so that not one bit changes."""
        while past.length - past.inputs[0][0].shape[1] >= past.window:
            x, mask = past.inputs.pop(0)
            _, past.start = self._advance(x, past.start, mask)

    def _advance(self, x: Tensor, state: MixerState, mask: Tensor | None) -> tuple[Tensor, MixerState]:
        y, after = self(x, state=state.full(), mask=mask)
        return y, state.keep(after)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Mixer:
        """Casts leave the gates in float32; moves and widening to float64 go through."""
        wide = {name: p.data for name, p in self._parameters.items() if p is not None and name in FLOAT32}
        super()._apply(fn, recurse)
        for name, data in wide.items():
            now = self._parameters[name]
            if now is not None and now.dtype in (torch.bfloat16, torch.float16):
                now.data = data.to(now.device, torch.float32)
        return self


def _first(inputs: list[tuple[Tensor, Tensor | None]], tokens: int) -> list[tuple[Tensor, Tensor | None]]:
    """The pieces that hold the first `tokens` tokens."""
    kept = []
    for x, mask in inputs:
        if tokens <= 0:
            break
        kept.append((x[:, :tokens], None if mask is None else mask[:, :tokens]))
        tokens -= x.shape[1]
    return kept
