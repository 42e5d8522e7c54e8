"""In which order the chunks of many sequences are walked, and how their tokens come to that order and go back.

Sequences (rows of the batch, or packed documents) advance together, the longest first, so that those still running are always the first.
A *slot* is one chunk of one sequence. Slots are numbered by block of sequences, then chunk, then sequence. A *segment* is a few consecutive
chunks of a block: everything but the state is computed for all its slots at once, in buffers small enough to stay in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Segment:
    """A few consecutive chunks of a block of sequences."""

    block: slice
    """The sequences, in the order of the walk."""
    running: tuple[int, ...]
    """For each chunk, how many sequences of the block have it."""
    slots: slice
    """The segment's slots among all slots."""
    starts: slice
    """The states saved at the segment's begin among all saved states: one for each running sequence."""
    time: slice | None
    """Where every sequence of the block is a row of the batch, and every chunk is full: the tokens of each row. Otherwise None and"""
    tokens: Tensor | None
    """`[slots, C]`, the flat number of each token; beyond a sequence's end, its last one."""
    inside: Tensor | None
    """`[slots, C]`, whether a token is inside its sequence; None when all are."""

    @property
    def size(self) -> int:
        """Number of slots."""
        return self.slots.stop - self.slots.start

    def load(self, x: Tensor, into: Tensor) -> None:
        """Copy the tokens of x `[B, T, heads, width]` into `[slots, heads, copies, C, width]`, each head `copies` times."""
        if self.time is not None:
            rows = x[self.block, self.time].unflatten(1, (len(self.running), -1))
            into.unflatten(0, rows.shape[1::-1]).copy_(rows.permute(1, 0, 3, 2, 4).unsqueeze(3))
        else:
            assert self.tokens is not None
            tokens = x.flatten(0, 1).index_select(0, self.tokens.view(-1)).unflatten(0, self.tokens.shape)
            into.copy_(tokens.transpose(1, 2).unsqueeze(2))

    def store(self, values: Tensor, out: Tensor) -> None:
        """Write values `[slots, heads, C, width]` to their tokens in out `[B, T, heads, width]`."""
        if self.time is not None:
            rows = out[self.block, self.time].unflatten(1, (len(self.running), -1))
            rows.permute(1, 0, 3, 2, 4).copy_(values.unflatten(0, rows.shape[1::-1]))
        else:
            assert self.tokens is not None
            tokens, values = self.tokens, values.transpose(1, 2)
            if self.inside is not None:
                tokens, values = tokens[self.inside], values[self.inside]
            out.flatten(0, 1).index_copy_(0, tokens.reshape(-1), values.reshape(-1, *out.shape[2:]).to(out.dtype))

    def outside(self, heads: int) -> Tensor | None:
        """`[slots * heads, C]`: the places beyond a sequence's end, None when there are none."""
        return None if self.inside is None else (~self.inside).repeat_interleave(heads, dim=0)


class Walk:
    """The segments of `batch` rows of `length` tokens, or of the packed documents between `bounds`.

    Args:
        chunk: tokens per chunk.
        block: sequences that advance together.
        stretch: chunks per segment.
    """

    def __init__(
        self, batch: int, length: int, bounds: Tensor | None, device: torch.device, *, chunk: int, block: int, stretch: int
    ) -> None:
        host = torch.arange(batch + 1) * length if bounds is None else bounds.cpu()
        lengths = host.diff()
        order = torch.argsort(lengths, descending=True, stable=True)
        self.chunk, self.block, self.stretch, self.device = chunk, block, stretch, device
        self.regular = bounds is None
        self.order = order if self.regular else order.to(device)  # rows of a batch stay where they are, and nothing is copied
        self.begins, self.lengths = host[:-1][order], lengths[order]

    def __len__(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    def segments(self) -> Iterator[Segment]:
        """All segments; those of a block in the order of time."""
        slots = starts = 0
        for low in range(0, len(self), self.block):
            block = slice(low, min(low + self.block, len(self)))
            chunks = -(-self.lengths[block] // self.chunk)
            for first in range(0, int(chunks[0]), self.stretch):
                numbers = torch.arange(first, min(first + self.stretch, int(chunks[0])))
                running = tuple((chunks > numbers.unsqueeze(1)).sum(1).tolist())
                time, tokens, inside = self._place(block, numbers, running)
                size = sum(running)
                yield Segment(
                    block=block,
                    running=running,
                    slots=slice(slots, slots + size),
                    starts=slice(starts, starts + running[0]),
                    time=time,
                    tokens=tokens,
                    inside=inside,
                )
                slots, starts = slots + size, starts + running[0]

    def _place(self, block: slice, numbers: Tensor, running: tuple[int, ...]) -> tuple[slice | None, Tensor | None, Tensor | None]:
        """`time`, `tokens` and `inside` of a segment."""
        time = slice(int(numbers[0]) * self.chunk, (int(numbers[-1]) + 1) * self.chunk)
        if self.regular and time.stop <= int(self.lengths[0]):
            return time, None, None
        sequence = torch.cat([torch.arange(block.start, block.start + count) for count in running])
        place = torch.repeat_interleave(numbers, torch.tensor(running)).unsqueeze(1) * self.chunk + torch.arange(self.chunk)
        last = self.lengths[sequence].unsqueeze(1) - 1
        tokens = self.begins[sequence].unsqueeze(1) + torch.minimum(place, last)
        inside = place <= last
        return None, tokens.to(self.device), None if bool(inside.all()) else inside.to(self.device)

    def sort(self, states: Tensor) -> Tensor:
        """A copy of `[N, ...]` in the order of the walk."""
        return states.clone(memory_format=torch.contiguous_format) if self.regular else states.index_select(0, self.order)

    def unsort(self, states: Tensor) -> Tensor:
        """The opposite of `sort`; may return its argument."""
        return states if self.regular else torch.empty_like(states).index_copy_(0, self.order, states)
