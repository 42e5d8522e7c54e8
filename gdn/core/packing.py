"""Document boundaries, built once a batch and handed to every layer.

A packed batch `[B, T, ...]` holds several documents a row, one after another. `Packing` says where they begin, for the flattened
`B * T` tokens; a row's end is always a boundary. State and convolution start anew at each document. Kernels read only the tensors here and
take sizes from their shapes: nothing goes back to the host, and a compiled graph serves every batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.errors import ArgumentError

CHUNK = 64
"""Tokens per chunk of the precomputed chunk table."""
MOST_TOKENS = 2**31 - 1
"""Numbers of tokens are int32."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Packing:
    """Boundaries of N documents over `total` tokens. Made by `from_lengths`, `from_cu_seqlens`, `from_position_ids` or `from_seq_idx`.

    Empty documents are allowed: they have a state and no token. Recurrent states are `[N, ...]`, one per document, in order.
    """

    cu_seqlens: Tensor
    """int32 `[N + 1]` on the device: document i is tokens `cu_seqlens[i] : cu_seqlens[i + 1]`."""
    documents: Tensor
    """int32 `[total]` on the device: the document of each token."""
    positions: Tensor
    """int32 `[total]` on the device: the place of each token in its document."""
    chunk_table: Tensor
    """int32 `[chunks, 2]` on the device: (document, chunk in the document) of each chunk of `CHUNK` tokens; none spans two documents.
    In a compiled graph `stretched` adds rows at the end: chunks of the last document that lie beyond its last token."""
    chunk_offsets: Tensor
    """int32 `[N + 1]` on the device: the row of `chunk_table` where each document begins."""
    host: Tensor
    """int64 `[N + 1]`, `cu_seqlens` on the host."""
    _rows: dict[int, bool] = field(default_factory=dict, repr=False)
    _stretched: dict[int, Packing] = field(default_factory=dict, repr=False)

    @property
    def num_documents(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def total(self) -> int:
        """Number of tokens."""
        return self.positions.shape[0]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, *, device: torch.device | str | None = None) -> Packing:
        """From the number of tokens of each document, in order."""
        lengths = _integers(lengths, "lengths", "[N]", (1,))
        if bool((lengths < 0).any()):
            raise ArgumentError(f"lengths: expected no negative length, got {lengths.tolist()}")
        return cls._build(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), device)

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | Tensor, *, device: torch.device | str | None = None) -> Packing:
        """From cumulative lengths `[0, n1, n1 + n2, ...]`, as in FlashAttention. Stays on the tensor's device."""
        if device is None and isinstance(cu_seqlens, Tensor):
            device = cu_seqlens.device
        host = _integers(cu_seqlens, "cu_seqlens", "[N + 1]", (1,))
        if host.numel() < 1:
            raise ArgumentError("cu_seqlens: expected integers [N + 1], got none")
        if int(host[0]) != 0 or bool((host.diff() < 0).any()):
            raise ArgumentError(f"cu_seqlens: expected 0 first and no decrease, got {_short(host)}")
        return cls._build(host, device)

    @classmethod
    def from_position_ids(cls, position_ids: Tensor, *, device: torch.device | str | None = None) -> Packing:
        """From positions `[T]` or `[B, T]` that restart at each document: a document begins wherever a position is not its
        predecessor plus one, and at each row."""
        ids = _rows(position_ids, "position_ids")
        return cls._from_breaks(ids[:, 1:] != ids[:, :-1] + 1, ids, _device(position_ids, device))

    @classmethod
    def from_seq_idx(cls, seq_idx: Tensor, *, device: torch.device | str | None = None) -> Packing:
        """From document numbers `[T]` or `[B, T]`, never decreasing along a row: a document begins wherever the number changes."""
        ids = _rows(seq_idx, "seq_idx")
        if bool((ids.diff(dim=1) < 0).any()):
            raise ArgumentError("seq_idx: expected numbers that never decrease along a row; sort each row's documents")
        return cls._from_breaks(ids[:, 1:] != ids[:, :-1], ids, _device(seq_idx, device))

    @classmethod
    def _from_breaks(cls, breaks: Tensor, ids: Tensor, device: torch.device | str) -> Packing:
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = breaks
        begin = starts.reshape(-1).nonzero().reshape(-1)
        return cls._build(torch.cat([begin, begin.new_tensor([ids.numel()])]), device)

    @classmethod
    def _build(cls, host: Tensor, device: torch.device | str | None) -> Packing:
        if int(host[-1]) > MOST_TOKENS:
            raise ArgumentError(f"packing: expected fewer than 2**31 tokens, got {int(host[-1])}")
        lengths = host.diff()
        documents, positions = _enumerate(lengths)
        chunks = _chunks(lengths)
        table = torch.stack(_enumerate(chunks), dim=1)
        offsets = torch.cat([chunks.new_zeros(1), chunks.cumsum(0)])

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device=device, dtype=torch.int32)

        return cls(
            cu_seqlens=move(host),
            documents=move(documents),
            positions=move(positions),
            chunk_table=move(table),
            chunk_offsets=move(offsets),
            host=host,
        )

    def replay_parts(self) -> tuple[Any, ...]:
        """For `gdn.core.replay`: all that a kernel reads, and which lengths of a row have been found to fit."""
        found = [part for item in self._rows.items() for part in item]
        return self.cu_seqlens, self.documents, self.positions, self.chunk_table, self.chunk_offsets, *found

    def to(self, device: torch.device | str) -> Packing:
        """The same boundaries on another device."""
        return self if self.cu_seqlens.device == torch.device(device) else self._build(self.host, device)

    def stretched(self, n: int) -> Packing:
        """The boundaries when each token becomes n tokens. Made on the device, and the host does not wait for it.

        How many chunks there are depends on the lengths. Outside a compiled graph `host` tells; a compiled graph knows no values, so there
        the chunk table has as many rows as it could need. They are chunks without a token, in which kernels load and store nothing.
        """
        if n < 1:
            raise ArgumentError(f"n: expected at least 1, got {n}")
        if n == 1:
            return self
        if self.total * n > MOST_TOKENS:
            raise ArgumentError(f"packing: expected at most {MOST_TOKENS} tokens, got {self.total} x {n}")
        if torch.compiler.is_compiling():
            return self._stretch(n, self.total * n // CHUNK + self.num_documents if self.total else 0)
        if n in self._stretched:
            return self._stretched[n]
        with torch.inference_mode(False):  # it may serve a training step later
            made = self._stretch(n, int(_chunks(self.host.diff() * n).sum()))
        if not (made.cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing()):  # memory of a captured graph is the graph's
            self._stretched[n] = made
        return made

    def _stretch(self, n: int, chunks: int) -> Packing:
        """Each token n times, with so many rows in the chunk table."""
        cu_seqlens = self.cu_seqlens * n
        offsets = F.pad(_chunks(cu_seqlens.diff()).cumsum(0, dtype=torch.int32), (1, 0))
        places = torch.arange(chunks, dtype=torch.int32, device=offsets.device)
        documents = (torch.searchsorted(offsets, places, right=True, out_int32=True) - 1).clamp(max=self.num_documents - 1)
        each = torch.arange(n, dtype=torch.int32, device=offsets.device)
        return Packing(
            cu_seqlens=cu_seqlens,
            documents=self.documents.unsqueeze(1).expand(-1, n).reshape(-1),
            positions=(self.positions.unsqueeze(1) * n + each).reshape(-1),
            chunk_table=torch.stack([documents, places - offsets[documents]], dim=1),
            chunk_offsets=offsets,
            host=self.host * n,
        )

    def check(self, batch: int, length: int, device: torch.device) -> None:
        """Raise `ArgumentError` unless this packing describes a `[batch, length]` array of tokens on `device`."""
        if self.total != batch * length:
            raise ArgumentError(f"packing: describes {self.total} tokens, but the input has {batch} x {length}")
        if self.cu_seqlens.device != device:
            raise ArgumentError(f"packing: is on {self.cu_seqlens.device}, but the input is on {device}; use packing.to({str(device)!r})")
        if batch > 1 and not torch.compiler.is_compiling() and not self._covers_rows(length):
            raise ArgumentError(f"packing: a document crosses the end of a row; expected a boundary each {length} tokens")

    def _covers_rows(self, length: int) -> bool:
        if length not in self._rows:
            ends = torch.arange(0, self.total + 1, length) if length else self.host[:0]
            self._rows[length] = bool(torch.isin(ends, self.host).all())
        return self._rows[length]


def _chunks(lengths: Tensor) -> Tensor:
    return (lengths + CHUNK - 1) // CHUNK


def _enumerate(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For groups of the given sizes: the group of each member, and the member's place in its group."""
    groups = torch.repeat_interleave(torch.arange(counts.numel()), counts)
    first = counts.cumsum(0) - counts
    return groups, torch.arange(groups.numel()) - first[groups]


def _integers(values: Sequence[int] | Tensor, name: str, letters: str, dimensions: tuple[int, ...]) -> Tensor:
    """int64 on the host from integers, whatever holds them."""
    try:
        found = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError):
        raise ArgumentError(f"{name}: expected integers {letters}, got {type(values).__name__}") from None
    if found.shape == (0,):
        found = found.long()  # an empty list makes numbers of float32
    if found.ndim not in dimensions or found.dtype == torch.bool or found.is_floating_point() or found.is_complex():
        raise ArgumentError(f"{name}: expected integers {letters}, got {found.dtype} {list(found.shape)}")
    return found.to("cpu", torch.int64)


def _device(ids: Sequence[int] | Tensor, device: torch.device | str | None) -> torch.device | str:
    return device or (ids.device if isinstance(ids, Tensor) else "cpu")


def _rows(values: Tensor, name: str) -> Tensor:
    ids = _integers(values, name, "[T] or [B, T]", (1, 2))
    if ids.numel() == 0:
        raise ArgumentError(f"{name}: expected integers [T] or [B, T], got {list(ids.shape)}")
    return ids.reshape(1, -1) if ids.ndim == 1 else ids


def _short(values: Tensor) -> str:
    shown = values.tolist()
    return str(shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-3:]])
