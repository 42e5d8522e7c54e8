"""A model's state as the cache that `transformers.generate` knows: beams, assistants with exact rollback, reuse between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from gdn.core.errors import ArgumentError
from gdn.hf.names import CACHE
from gdn.models.lm import LM
from gdn.models.state import LMState

WINDOW = 1024
"""Most tokens that an assistant may propose at once, and so most that `crop` can take back."""


class GdnCache(Cache):
    """Wraps an `LMState`, made at the first forward pass. Its size does not grow with the text unless a mixer's does.

    `cache.state` is the state itself: save it, fork it, store it in fewer bits, and go on with `GdnCache(state)`.
    """

    def __init__(self, state: LMState | None = None) -> None:
        self.layers = []
        self.layer_class_to_replicate = None
        self.offloading = False
        self.state = state
        self.recording = False

    def __repr__(self) -> str:
        return f"GdnCache(length={self.get_seq_length()})"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def open(self, lm: LM, batch: int, device: torch.device) -> LMState:
        """The state to go on from, for `batch` sequences of a model that is given tokens on a device."""
        if self.state is None:
            self.state = lm.init_state(batch, device=_place(lm, device))
            if self.recording:
                self.state.record(WINDOW)
        return _fitting(self.state, lm, batch)

    def close(self, after: LMState | None) -> None:
        """Take the state after the tokens."""
        self.state = after

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return 0 if self.state is None else self.state.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.get_seq_length() > 0

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        """Asked as `all(cache.is_linear)`. If so, `generate` takes it that a cache does not know its length, and begins texts anew."""
        return [False]

    def activate_past_recording(self) -> None:
        """Keep what takes tokens back from now on."""
        if not self.recording and self.state is not None:
            self.state.record(WINDOW)
        self.recording = True

    def is_recording_past(self, layer_idx: int) -> bool:
        return self.recording

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens back exactly, and forget what took them back.

        Args:
            tokens_to_remove: minus the number of tokens, as transformers passes it.
        """
        if tokens_to_remove > 0:
            raise ArgumentError(f"tokens_to_remove: expected minus the number of tokens, got {tokens_to_remove}")
        if self.state is None:
            return
        if tokens_to_remove:
            self.state.rollback(-tokens_to_remove)
        if self.recording:
            self.state.record(WINDOW)

    def reset(self) -> None:
        """Empty: the next tokens begin a text."""
        self.state = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences, in that order."""
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times."""
        if self.state is not None:
            self.state = self.state.select(torch.arange(self.state.batch).repeat_interleave(repeats))


def _place(lm: LM, device: torch.device) -> torch.device | None:
    """Where states are: beside each layer's weights, or with the tokens where weights are offloaded between calls (`device_map`)."""
    return device if any(p.is_meta for p in lm.parameters()) else None


def _fitting(state: LMState, lm: LM, batch: int) -> LMState:
    if state.batch != batch:
        raise ArgumentError(f"{CACHE}: holds {state.batch} sequences, but the input has {batch}")
    if state.model is not None and state.model is not lm:
        raise ArgumentError(f"{CACHE}: holds the state of another model")
    return state


class GdnStaticCache(GdnCache):
    """A cache whose steps change tensors in place and nothing else, for at most `room` tokens: one compiled graph, or one CUDA graph,
    is for every step. The number of tokens is a tensor on the device.

    It is read without gradients, and does not take tokens back.
    """

    def __init__(self, room: int) -> None:
        self.seen: Tensor | None = None
        super().__init__()
        self.room = room

    @property
    def state(self) -> LMState | None:  # type: ignore[override]
        """The state itself. Asking for it waits for the device, to know its length."""
        if self._state is not None and self.seen is not None:
            self._state.length = int(self.seen)
        return self._state

    @state.setter
    def state(self, state: LMState | None) -> None:
        self._state = state

    def open(self, lm: LM, batch: int, device: torch.device) -> LMState:
        if torch.is_grad_enabled():
            raise ArgumentError(f"{CACHE}: a static cache is written in place; expected torch.no_grad() around the call")
        if self._state is None:
            self._state = lm.init_state(batch, room=self.room, device=_place(lm, device))
            self.seen = torch.zeros((), dtype=torch.int64, device=device)
            for tensor in (self.seen, *(t for layer in self._state.layers for t in layer.tensors.values())):
                torch._dynamo.mark_static_address(tensor)
        mine = _fitting(self._state, lm, batch)
        # The model notes lengths in what it is given; here `seen` tells them.
        return LMState(mine.layers, mine.length, mine.model)

    def close(self, after: LMState | None) -> None:
        assert self.seen is not None and self._state is not None and after is not None
        self.seen.add_(after.length - self._state.length)

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        return 0 if self.seen is None else self.seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.room

    @property
    def is_compileable(self) -> bool:
        return True

    @property
    def is_croppable(self) -> bool:
        return False

    def activate_past_recording(self) -> None:
        raise ArgumentError(f"{CACHE}: a static cache takes no tokens back; expected a GdnCache")

    def reset(self) -> None:
        """Empty, at new addresses: the next tokens begin a text."""
        super().reset()
        self.seen = None
