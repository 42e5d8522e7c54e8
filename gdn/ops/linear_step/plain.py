"""The steps in vectorised torch, any device, on the memories in their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import InPlace
from gdn.ops.sequences.slots import update_rows, vectors


def linear_attention_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    """See `gdn.ops.linear_attention_step`."""
    return _COLUMNS(q, k, v, g.unsqueeze(-1), state, scale, slots)


def gated_linear_attention_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    """See `gdn.ops.gated_linear_attention_step`."""
    return _ROWS(q, k, v, g, state, scale, slots)


def value_gated_linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None
) -> Tensor:
    """See `gdn.ops.value_gated_linear_attention_step`."""
    return _COLUMNS(q, k, v, g, state, scale, slots)


def _on_columns(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    """g `[B, T, HV, 1 or V]`: a factor for the memory, or for each of its columns."""
    return update_rows(lambda tokens, memory: _update(tokens, memory, scale, turn=False), (q, k, v, g), state, slots)


def _on_rows(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    """g `[B, T, H, K]`: a factor for each row of the memory."""
    return update_rows(lambda tokens, memory: _update(tokens, memory, scale, turn=True), (q, k, v, g), state, slots)


def _update(tokens: Sequence[Tensor], state: Tensor, scale: float, *, turn: bool) -> Tensor:
    """All sequences, sequence b on row b of `state`, in place."""
    q, k, v, g = tokens
    wide = accumulate_dtype(v.dtype)
    memory = state.to(wide).reshape(-1, k.shape[3], v.shape[3])  # the state itself, where it has this dtype and is contiguous
    tokens = (q.to(wide) * scale, k.to(wide), v.to(wide), g.to(wide).exp())
    outputs = []
    for query, key, value, decay in zip(*(vectors(x, v.shape[2]) for x in tokens)):
        memory.mul_(decay.mT if turn else decay).addcmul_(key.mT, value)
        outputs.append(torch.bmm(query, memory).view(v.shape[0], *v.shape[2:]))
    if memory.data_ptr() != state.data_ptr():
        state.copy_(memory.view(state.shape))
    return torch.stack(outputs, dim=1).to(v.dtype) if outputs else v.new_empty(v.shape)


def _fake(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float, slots: Tensor | None) -> Tensor:
    return v.new_empty(v.shape)


_COLUMNS = InPlace("gdn::linear_attention_step", _on_columns, mutates=("state",), fake=_fake)
_ROWS = InPlace("gdn::gated_linear_attention_step", _on_rows, mutates=("state",), fake=_fake)
