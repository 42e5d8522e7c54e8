"""The memory of the chunked rows: how much of it a segment holds, and how it is carried from chunk to chunk.

Value heads that share queries and keys are one wide head to the memory: `[N, H, K, G V]` with `G = HV / H`. So queries and keys are never
repeated, and a product with them serves the whole group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.ops.sequences.walk import Segment, Walk

CHUNK = 64
"""Tokens per chunk at most; a power of two. Measured in README.md."""
BLOCK_ELEMENTS = 1 << 19
"""Elements of the memories of the sequences that advance together: 2 MiB in float32, the second-level caches of two cores."""
SEGMENT_ELEMENTS = 3 << 20
"""Elements of all buffers of a segment, about."""
ACCELERATED = 32
"""Both are so many times as large on a GPU, where each call costs a launch and memory is fast: up to 400 MB in float32."""


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from shapes and the kind of device alone."""

    chunk: int
    block: int
    stretch: int
    starts: int
    """At least the number of memories saved: one for each segment and sequence that runs in it."""

    @classmethod
    def of(cls, v: Tensor, bounds: Tensor | None, *, memory: int, token: int) -> Layout:
        """For values v `[B, T, ...]`, with `memory` elements per sequence and buffers of `token` elements per token."""
        batch, length = v.shape[:2]
        chunk = next((c for c in (1, 2, 4, 8, 16, 32) if length <= c), CHUNK)
        larger = 1 if v.device.type == "cpu" else ACCELERATED
        block = max(1, larger * BLOCK_ELEMENTS // max(1, memory))
        together = block if bounds is not None else min(block, max(1, batch))
        stretch = min(16, max(2, larger * SEGMENT_ELEMENTS // max(1, together * (chunk * token + 3 * memory))))
        if bounds is None:
            return cls(chunk, block, stretch, batch * -(-length // (chunk * stretch)))
        return cls(chunk, block, stretch, batch * length // (chunk * stretch) + bounds.shape[0] - 1)

    def walk(self, v: Tensor, bounds: Tensor | None) -> Walk:
        return Walk(v.shape[0], v.shape[1], bounds, v.device, chunk=self.chunk, block=self.block, stretch=self.stretch)


def carry(segment: Segment, state: Tensor, keep: Tensor, add: Tensor, out: Tensor, *, backwards: bool = False) -> Tensor:
    """`state = keep * state + add` for each chunk of a segment in turn, or from the last to the first.

    Args:
        state: `[sequences * heads, K, V]`, changed in place.
        keep, add: `[slots * heads, 1 or K, 1 or V]`.
        out: `[slots * heads, K, V]`, filled with the state that each chunk meets.
    """
    heads = len(add) // segment.size
    sizes = [count * heads for count in segment.running]
    chunks = list(zip(out.split(sizes), keep.split(sizes), add.split(sizes)))
    for met, factor, term in reversed(chunks) if backwards else chunks:
        s = state[: len(met)]
        met.copy_(s)
        s.mul_(factor).add_(term)
    return out


def fold(states: Tensor, heads: int, *, turned: bool = False) -> Tensor:
    """`[N, HV, K, V]` as `[N, H, K, G V]`, or turned as `[N, H, G V, K]`."""
    grouped = states.unflatten(1, (heads, -1))
    return grouped.transpose(3, 4).flatten(2, 3) if turned else grouped.transpose(2, 3).flatten(3, 4)


def unfold(memory: Tensor, groups: int, *, turned: bool = False) -> Tensor:
    """The opposite of `fold`, in memory of its own."""
    if turned:
        grouped = memory.unflatten(2, (groups, -1)).transpose(3, 4)
    else:
        grouped = memory.unflatten(3, (groups, -1)).transpose(2, 3)
    return grouped.flatten(1, 2).contiguous()


def start(
    initial_state: Tensor | None, like: Tensor, shape: tuple[int, ...], heads: int, walk: Walk, dtype: torch.dtype, *, turned: bool = False
) -> Tensor:
    """The memories `shape` of all sequences in the order of the walk, to be changed in place."""
    if initial_state is None:
        return like.new_zeros(shape, dtype=dtype)
    return fold(walk.sort(initial_state), heads, turned=turned).contiguous()
