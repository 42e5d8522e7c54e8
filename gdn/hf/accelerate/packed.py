"""Packed documents in the arguments of a transformers model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.packing_graph import packing_from_starts
from gdn.hf.names import CACHE


def find_packing(
    tokens: Tensor,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Any,
    use_cache: bool | None,
    kwargs: dict[str, Any],
) -> tuple[Packing, Tensor] | None:
    """The documents of a batch `[B, T, ...]` and the positions of its tokens in them; None if each row is one document.

    Looks for `packing`, `cu_seqlens`, `cu_seq_lens_q` and `seq_idx` among the keyword arguments (the first three of which are removed when
    the model would not know them), then at positions that restart. As in transformers, positions are not looked at when there is a mask
    or a cache: they restart at padding too.
    """
    batch, length = tokens.shape[:2]
    name, packing = _explicit(batch, length, tokens.device, kwargs)
    if packing is None and position_ids is not None and attention_mask is None and cache is None:
        name, packing = "position_ids", _from_positions(position_ids, batch)
    if packing is None:
        return None
    _refuse(name, attention_mask, cache, use_cache)
    if position_ids is None:
        position_ids = packing.positions.view(batch, length).long()
    return packing, position_ids


def _explicit(batch: int, length: int, device: torch.device, kwargs: dict[str, Any]) -> tuple[str, Packing | None]:
    packing, bounds = kwargs.pop("packing", None), kwargs.pop("cu_seqlens", None)
    numbers, flash = kwargs.pop("seq_idx", None), kwargs.get("cu_seq_lens_q")
    if packing is not None:
        packing.check(batch, length, device)
        return "packing", packing
    if bounds is None and flash is not None:
        bounds = flash
    if bounds is not None:
        return "cu_seqlens", _from_bounds(bounds, batch, length, device)
    if numbers is not None:
        if tuple(numbers.shape) != (batch, length):
            raise ArgumentError(f"seq_idx: expected [{batch}, {length}] like the tokens, got {list(numbers.shape)}")
        return "seq_idx", _from_starts(numbers[:, 1:] != numbers[:, :-1])
    return "", None


def _from_bounds(bounds: Tensor, batch: int, length: int, device: torch.device) -> Packing:
    if torch.compiler.is_compiling():
        marks = torch.zeros(batch * length + 1, dtype=torch.bool, device=device).index_fill(0, bounds.to(device).long(), True)
        return _from_starts(marks[:-1].view(batch, length)[:, 1:])
    packing = Packing.from_cu_seqlens(bounds, device=device)
    packing.check(batch, length, device)
    return packing


def _from_positions(position_ids: Tensor, batch: int) -> Packing | None:
    if position_ids.ndim == 3:  # Qwen3.5: of text, time, height and width; without those of text there is nothing to see
        if position_ids.shape[0] != 4:
            return None
        position_ids = position_ids[0]
    ids = position_ids.expand(batch, -1)
    packing = _from_starts(ids[:, 1:] != ids[:, :-1] + 1)
    if torch.compiler.is_compiling():
        return packing  # whether a row holds several documents is not known before it runs
    return packing if packing.num_documents > batch else None


def _from_starts(later: Tensor) -> Packing:
    """From whether each token but the first of a row begins a document, `[B, T - 1]`."""
    return packing_from_starts(torch.nn.functional.pad(later, (1, 0), value=True))


def _refuse(name: str, attention_mask: Any, cache: Any, use_cache: bool | None) -> None:
    if cache is not None:
        raise ArgumentError(f"{CACHE}: cannot be given together with packed documents ({name}); each begins empty")
    if use_cache:
        raise ArgumentError(f"use_cache: expected False with packed documents ({name}), a cache has one state for each row; got True")
    if attention_mask is None:
        return
    whole = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    if not whole or torch.compiler.is_compiling() or not bool(attention_mask.all()):
        raise ArgumentError(f"attention_mask: cannot be given together with packed documents ({name}); leave it out, and padding too")
