"""Recurrent memories stored in fewer bits between tokens; the arithmetic stays float32.

    int8    one scale for each row of a memory (each of its K keys), rounded to nearest: V + 4 bytes a row
    fp8     e4m3 with one scale a head
    bf16, fp16

Only the recurrent memory is stored so. Other parts of a state (convolution inputs, keys and values of attention) keep their dtype.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from gdn.core.errors import ArgumentError
from gdn.mixers.base import MixerState

Precision = Literal["fp32", "bf16", "fp16", "int8", "fp8"]

PRECISIONS: tuple[Precision, ...] = get_args(Precision)

MEMORY = "memory"
"""The name of a recurrent memory in a mixer's state; with several of them what their names begin with ("memory_keys")."""

SCALE = ".scale"
"""What is put after the name of a memory for that of its scales."""
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
_LARGEST_FP8 = 448.0


@dataclass(eq=False)
class StoredState(MixerState):
    """A state whose memory is stored at `precision`. Gradients do not pass through it."""

    precision: Precision = "fp32"
    wide: torch.dtype = torch.float32
    """The dtype of the arithmetic."""

    def full(self) -> MixerState:
        wide = {name: _expand(self.tensors, name, self.precision).to(self.wide) for name in memories(self)}
        return MixerState({**wide, **{name: t for name, t in self.tensors.items() if not name.startswith(MEMORY)}})

    def keep(self, after: MixerState) -> MixerState:
        with torch.no_grad():
            for name, tensor in {**after.tensors, **_shrunk(after, self.precision)}.items():
                self.tensors[name].copy_(tensor)
        return self


def memories(state: MixerState) -> list[str]:
    """The names of a state's recurrent memories `[B, heads, K, V]`."""
    return [name for name in state.tensors if name == MEMORY or (name.startswith(f"{MEMORY}_") and not name.endswith(SCALE))]


def stored(state: MixerState, precision: Precision) -> MixerState:
    """The state with its memory at another precision; a state without a recurrent memory as it is."""
    if precision not in PRECISIONS:
        raise ArgumentError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not memories(state):
        return state
    if type(state) not in (MixerState, StoredState):
        if precision == "fp32":
            return state
        raise ArgumentError(f"precision: a {type(state).__name__} stores its memory in fp32 only, got {precision!r}")
    full = state.full()
    past = state.past if state.past is None else dataclasses.replace(state.past, start=stored(state.past.start, precision))
    if precision == "fp32":
        return MixerState(full.clone().tensors, past)
    names = memories(full)
    rest = {name: t.clone() for name, t in full.tensors.items() if name not in names}
    return StoredState({**_shrunk(full, precision), **rest}, past, precision, full[names[0]].dtype)


def precision_of(state: MixerState) -> Precision:
    """The precision that a state is stored at."""
    return state.precision if isinstance(state, StoredState) else "fp32"


def _shrunk(full: MixerState, precision: Precision) -> dict[str, Tensor]:
    """All memories of a state at a precision, by the names that they are stored under."""
    return {stored_name: t for name in memories(full) for stored_name, t in _shrink(name, full[name].detach(), precision).items()}


def _shrink(name: str, memory: Tensor, precision: Precision) -> dict[str, Tensor]:
    if precision in _HALF:
        return {name: memory.to(_HALF[precision])}
    axes, top = ((-1,), 127.0) if precision == "int8" else ((-2, -1), _LARGEST_FP8)
    scale = memory.abs().amax(axes, keepdim=True).float().clamp_(min=1e-30) / top
    scaled = memory / scale
    if precision == "int8":
        bits = scaled.round().to(torch.int8)
    else:
        bits = scaled.to(torch.float8_e4m3fn).view(torch.uint8)  # few operations know float8; selecting and copying bytes always works
    return {name: bits, name + SCALE: scale}


def _expand(tensors: dict[str, Tensor], name: str, precision: Precision) -> Tensor:
    memory = tensors[name]
    if precision in _HALF:
        return memory.float()
    values = memory if precision == "int8" else memory.view(torch.float8_e4m3fn)
    return values.float() * tensors[name + SCALE]
