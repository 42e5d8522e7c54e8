"""From the many ways of saying where documents and padding are to what a model takes: `Packing`, a mask, an order of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.hf.names import CACHE


@dataclass(frozen=True)
class Boundaries:
    """What a caller of transformers says about documents and padding. Everything is optional."""

    attention_mask: Tensor | None = None
    """`[B, T]`, or `[B, past + T]` with a cache: 0 at padding, on any side."""
    position_ids: Tensor | None = None
    """`[B, T]`; a document begins wherever a position is not its predecessor plus one."""
    seq_idx: Tensor | None = None
    """`[B, T]`: the document of each token."""
    cu_seqlens: Tensor | None = None
    """`[N + 1]`: cumulative lengths over the flattened batch."""


@dataclass(frozen=True)
class Layout:
    """How a batch is laid out for the model."""

    packing: Packing | None = None
    mask: Tensor | None = None
    """bool `[B, T]`, False at padding, which stands on the left."""
    order: Tensor | None = None
    """int64 `[B, T]`: where each token of the model's rows stands in the caller's. None: in its place."""
    real: Tensor | None = None
    """bool `[B, T]` in the caller's order, False at padding; None without any."""

    def arrange(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` in the model's order."""
        return x if self.order is None else _gather(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` in the caller's order."""
        return x if self.order is None else _gather(x, self.order.argsort(dim=1))


def layout(batch: int, length: int, device: torch.device, given: Boundaries, *, cached: bool) -> Layout:
    """The layout of `[batch, length]` tokens. With a cache, positions say nothing new, and packed rows are refused."""
    mask = _mask(given.attention_mask, batch, length)
    documents = _documents(batch, length, given, mask, cached)
    if documents is not None:
        if cached:
            raise ArgumentError(f"{CACHE}: cannot be given with packed rows; the documents of a packed row begin empty")
        if mask is not None:  # padding becomes documents of its own
            changes = (mask[:, 1:] != mask[:, :-1]) | (documents[:, 1:] != documents[:, :-1])
            documents = torch.cat([changes.new_zeros(batch, 1), changes], 1).cumsum(1)
        return Layout(packing=Packing.from_seq_idx(documents, device=device), real=mask)
    if mask is None:
        return Layout()
    if bool((mask[:, 1:] >= mask[:, :-1]).all()):
        return Layout(mask=mask, real=mask)
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return Layout(mask=mask.gather(1, order), order=order, real=mask)


def _mask(mask: Tensor | None, batch: int, length: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < length:
        raise ArgumentError(f"attention_mask: expected [{batch}, {length}], or longer by the cached tokens, got {list(mask.shape)}")
    mask = mask[:, mask.shape[1] - length :].bool()
    return None if bool(mask.all()) else mask


def _documents(batch: int, length: int, given: Boundaries, mask: Tensor | None, cached: bool) -> Tensor | None:
    """The document of each token `[B, T]` on the host's terms, or None where each row is one document."""
    if given.cu_seqlens is not None:
        packing = Packing.from_cu_seqlens(given.cu_seqlens)
        packing.check(batch, length, packing.cu_seqlens.device)
        return packing.documents.reshape(batch, length)
    if given.seq_idx is not None:
        if given.seq_idx.numel() != batch * length:
            raise ArgumentError(f"seq_idx: expected [{batch}, {length}], got {list(given.seq_idx.shape)}")
        return given.seq_idx.reshape(batch, length)
    if given.position_ids is None or cached:
        return None
    positions = given.position_ids
    if positions.ndim > 2 or positions.shape[-1] != length:
        raise ArgumentError(f"position_ids: expected [{batch}, {length}], got {list(positions.shape)}")
    positions = positions.expand(batch, length)
    breaks = positions[:, 1:] != positions[:, :-1] + 1
    if mask is not None:
        breaks = breaks & mask[:, 1:] & mask[:, :-1]
    if not bool(breaks.any()):
        return None
    return torch.cat([breaks.new_zeros(batch, 1), breaks], 1).cumsum(1)


def _gather(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.reshape(*order.shape, *[1] * (x.ndim - 2)).expand(*order.shape, *x.shape[2:]))
