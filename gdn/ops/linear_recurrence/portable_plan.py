"""Sizes and launch parameters of a call of a Triton row: by rule from the shapes, never by trial."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn.core import device as hardware
from gdn.core.packing import CHUNK
from gdn.core.portable_launch import integer_kind
from gdn.ops.sequences.portable import Launch, padded


@dataclass(frozen=True)
class Plan:
    """Sizes of one call. A memory has K rows and V columns; H heads of x share the HV memories."""

    tokens: int
    length: int
    """Tokens of a row of the batch; all tokens when packed."""
    per_row: int
    """Chunks of a row of the batch."""
    chunks: int
    documents: int
    H: int
    HV: int
    K: int
    V: int
    packed: bool
    wide: bool
    S: int
    """Chunks of a segment, 0 without segments."""
    parts: int
    """Programs among which the value heads of a query/key head are divided."""

    @property
    def BK(self) -> int:
        """Key columns of a tile. In 16 bits at least 64, so that every tile in shared memory has rows of 128 bytes; with rows of 32 beside them
        ptxas 12.8 gets the addresses of products wrong (notes/triton_pipelines.md)."""
        return padded(self.K) if self.wide else max(64, padded(self.K))

    @property
    def group(self) -> int:
        return self.HV // self.H

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.S) if self.S else 0

    @property
    def runs(self) -> int:
        """What walks by itself: segments, or documents."""
        return self.segments or self.documents

    @functools.cached_property
    def launches(self) -> Mapping[str, Launch]:
        return launches(self.BK, self.wide)

    @functools.cached_property
    def code(self) -> tuple[Any, ...]:
        """Names the compiled kernels: constants, and what Triton specialises on in the other integers (1, and multiples of 16)."""
        integers = (self.length, self.per_row, self.chunks, self.documents, self.tokens, self.segments)
        kinds = tuple(integer_kind(n) for n in integers)
        return (self.H, self.HV, self.K, self.V, self.S, self.parts, self.packed, self.wide, kinds)

    def columns(self, name: str) -> int:
        """Blocks of columns of a kernel."""
        return -(-self.V // self.launches[name].block)


@functools.lru_cache(maxsize=4096)
def plan(
    batch: int, length: int, documents: int, chunks: int, H: int, HV: int, K: int, V: int, packed: bool, wide: bool, processors: int
) -> Plan:
    """For a shape on a GPU with this many multiprocessors."""
    processors = processors or 132
    block = launches(padded(K), wide)["output"].block
    return Plan(
        tokens=batch * length,
        length=batch * length if packed else length,
        per_row=-(-length // CHUNK),
        chunks=chunks,
        documents=documents,
        H=H,
        HV=HV,
        K=K,
        V=V,
        packed=packed,
        wide=wide,
        S=segment_chunks(chunks, documents, HV * -(-V // block), packed, processors),
        parts=group_parts(2 * chunks * H, HV // H, processors),
    )


def plan_of(x: Tensor, V: int, HV: int, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Plan:
    """For x `[B, T, H, K]` and HV memories with V columns."""
    B, T, H, K = x.shape
    wide, processors = x.dtype == torch.float32, hardware.multiprocessors(x.device.index or 0)
    if cu_seqlens is None or chunk_table is None:
        return plan(B, T, B, B * -(-T // CHUNK), H, HV, K, V, False, wide, processors)
    return plan(B, T, cu_seqlens.shape[0] - 1, chunk_table.shape[0], H, HV, K, V, True, wide, processors)


def launches(BK: int, wide: bool) -> dict[str, Launch]:
    """Launch parameters of each kernel by padded key width and whether inputs are fp32.

    Products of 64 tokens take 4 warps, never 8 (notes/triton_pipelines.md). Rows of values in 16 bits are at least 64 wide, 128 bytes of
    shared memory.
    """
    BV, big = 32 if wide else 64, BK > 128
    return {
        "gates": Launch(block=0, warps=2),
        "handover": Launch(block=16, warps=8 if big else 4),
        "states": Launch(block=BV, warps=8 if big else 4, stages=1 if wide else 2 if big else 3),
        "output": Launch(block=BV, warps=4, stages=1 if wide else 2),
        "gradient": Launch(block=BV, warps=4, stages=1 if wide or big else 2),
        "between": Launch(block=0, warps=4),
        "channels": Launch(block=BV, warps=4),
        "channel output": Launch(block=BV, warps=4, stages=1 if wide else 2),
        "channel read": Launch(block=BV, warps=4, stages=1 if wide else 2),
        "other gradient": Launch(block=BV, warps=4),
        "channel gradient": Launch(block=BV, warps=4, stages=1 if wide else 2),
    }


def segment_chunks(chunks: int, documents: int, programs: int, packed: bool, processors: int) -> int:
    """Chunks of a segment, 0 for none, by the estimated time in microseconds.

    A step of a program is taken as 1.5 alone on a multiprocessor and 1.2 a program when there are several. Without segments: the steps of the
    longest document (twice the mean when packed, for lengths are on the device). With them: 1.7 times the steps of a segment, for the
    summary reads keys and values as well, 1 for each link of the chain, and two more launches.
    """

    def step(count: int) -> float:
        return 1.5 if count <= processors else 1.2 * math.ceil(count / processors)

    longest = min(chunks, -(-chunks // max(documents, 1)) * (2 if packed and documents > 1 else 1))
    best, S = longest * step(documents * programs), 0
    for size in (4, 8, 16, 32, 64, 128):
        segments = -(-chunks // size)
        cost = 1.7 * step(segments * programs) * size + segments + 10
        if segments > 1 and cost < best:
            best, S = cost, size
    return S


def group_parts(programs: int, group: int, processors: int) -> int:
    """Into how many parts a group of value heads is divided, so that there are two programs for each multiprocessor."""
    parts = 1
    while parts < group and programs * parts < 2 * processors:
        parts *= 2
    return min(parts, group)
