"""`Packing` from marks on the tokens, inside a compiled graph too: the number of documents is then a size known only when it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.packing import Packing


def packing_from_starts(starts: Tensor) -> Packing:
    """A document begins at each True of `starts`, bool `[B, T]`, whose first column is True."""
    build = _operator if torch.compiler.is_compiling() else _build
    cu_seqlens, documents, positions, chunk_table, chunk_offsets, host = build(starts)
    return Packing(
        cu_seqlens=cu_seqlens,
        documents=documents,
        positions=positions,
        chunk_table=chunk_table,
        chunk_offsets=chunk_offsets,
        host=host,
    )


def _build(starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    begin = starts.reshape(-1).nonzero().reshape(-1).cpu()
    bounds = torch.cat([begin, begin.new_tensor([starts.numel()])])
    made = Packing.from_cu_seqlens(bounds, device=starts.device)
    return made.cu_seqlens, made.documents, made.positions, made.chunk_table, made.chunk_offsets, made.host.clone()


def _fake(starts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    context = torch.library.get_ctx()
    bounds, chunks = context.new_dynamic_size(min=2), context.new_dynamic_size(min=1)

    def integers(*shape: int) -> Tensor:
        return starts.new_empty(shape, dtype=torch.int32)

    tokens = starts.numel()
    host = torch.empty(bounds, dtype=torch.int64, device="cpu")
    return integers(bounds), integers(tokens), integers(tokens), integers(chunks, 2), integers(bounds), host


_operator = torch.library.custom_op("gdn::packing_from_starts", _build, mutates_args=())
_operator.register_fake(_fake)
