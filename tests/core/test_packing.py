"""Document boundaries: the four constructors agree, empty documents, what kernels read, and errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gdn.core.errors import ArgumentError
from gdn.core.packing import CHUNK, Packing

CPU = torch.device("cpu")
WRONG: list[Any] = [None, 5, "abc"]
TENSORS = [f.name for f in fields(Packing) if not f.name.startswith("_")]


def same(a: Packing, b: Packing) -> None:
    for name in TENSORS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 3 * CHUNK), max_size=6))
def test_tensors_say_where_each_token_and_chunk_is(lengths: list[int]) -> None:
    packing = Packing.from_lengths(lengths)
    documents = [i for i, n in enumerate(lengths) for _ in range(n)]
    chunks = [(i, c) for i, n in enumerate(lengths) for c in range(-(-n // CHUNK))]
    assert packing.num_documents == len(lengths)
    assert packing.total == sum(lengths)
    assert packing.host.tolist() == packing.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert packing.documents.tolist() == documents
    assert packing.positions.tolist() == [t for n in lengths for t in range(n)]
    assert packing.chunk_table.tolist() == [list(c) for c in chunks]
    assert packing.chunk_table.shape == (len(chunks), 2)
    for i in range(len(lengths)):
        begin, end = packing.chunk_offsets[i : i + 2].tolist()
        assert [c for c in chunks if c[0] == i] == chunks[begin:end]
    assert {getattr(packing, name).dtype for name in TENSORS if name != "host"} == {torch.int32}


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_the_constructors_agree(lengths: list[int]) -> None:
    packing = Packing.from_lengths(lengths)
    same(packing, Packing.from_lengths(torch.tensor(lengths, dtype=torch.int32)))
    same(packing, Packing.from_cu_seqlens(packing.host.tolist()))
    same(packing, Packing.from_cu_seqlens(packing.cu_seqlens))
    same(packing, Packing.from_position_ids(packing.positions))
    same(packing, Packing.from_seq_idx(packing.documents))
    same(packing, Packing.from_seq_idx(7 * packing.documents[None] - 3))


def test_rows_of_a_batch_end_documents() -> None:
    rows = Packing.from_lengths([2, 1, 3])
    same(rows, Packing.from_seq_idx(torch.tensor([[0, 0, 1], [1, 1, 1]])))
    same(rows, Packing.from_position_ids(torch.tensor([[0, 1, 0], [1, 2, 3]])))


def test_empty_documents_have_a_place() -> None:
    packing = Packing.from_cu_seqlens([0, 0, 2, 2, 3, 3])
    same(packing, Packing.from_lengths([0, 2, 0, 1, 0]))
    assert packing.num_documents == 5
    assert packing.documents.tolist() == [1, 1, 3]
    same(Packing.from_lengths([]), Packing.from_cu_seqlens([0]))
    assert Packing.from_lengths([]).num_documents == Packing.from_lengths([]).total == 0


def test_moves_between_devices_and_stays_where_it_is() -> None:
    packing = Packing.from_lengths([3, 4])
    assert packing.to("cpu") is packing
    moved = packing.to("meta")
    assert moved.cu_seqlens.device.type == "meta"
    assert moved.host.device.type == "cpu"
    assert Packing.from_lengths([3, 4], device="meta").positions.device.type == "meta"


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2 * CHUNK), max_size=6), st.integers(1, 5))
def test_stretched_is_the_packing_of_longer_documents(lengths: list[int], n: int) -> None:
    packing = Packing.from_lengths(lengths)
    same(packing.stretched(n), Packing.from_lengths([length * n for length in lengths]))
    assert packing.stretched(n) is packing.stretched(n)


def test_a_compiled_graph_stretches_into_a_table_with_chunks_beyond_the_end() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def stretched(packing: Packing) -> tuple[Tensor, ...]:
        longer = packing.stretched(3)
        return tuple(getattr(longer, name) for name in TENSORS)

    for lengths in ([30, 0, 64, 1], [7, 50, 0, 0]):
        packing = Packing.from_lengths(lengths)
        made, exact = dict(zip(TENSORS, stretched(packing))), Packing.from_lengths([3 * length for length in lengths])
        table, chunks = made["chunk_table"], len(exact.chunk_table)
        assert len(table) == 3 * sum(lengths) // CHUNK + len(lengths) > chunks
        same(replace(exact, **{**made, "chunk_table": table[:chunks]}), exact)
        last, own = len(lengths) - 1, -(-3 * lengths[-1] // CHUNK)
        assert table[chunks:].tolist() == [[last, own + i] for i in range(len(table) - chunks)]
        assert not packing._stretched


def test_stretched_may_be_made_in_inference_mode_and_serve_training() -> None:
    packing = Packing.from_lengths([3, 4])
    with torch.inference_mode():
        made = packing.stretched(2)
    assert not any(getattr(made, name).is_inference() for name in TENSORS)


def test_numbers_of_documents_may_come_in_lists() -> None:
    ids: Any = [0, 0, 1]
    assert Packing.from_seq_idx(ids).host.tolist() == Packing.from_position_ids(torch.tensor([0, 1, 0])).host.tolist() == [0, 2, 3]


def test_check_accepts_what_it_describes() -> None:
    Packing.from_lengths([4, 0, 2, 6]).check(2, 6, CPU)
    Packing.from_lengths([4, 0, 2, 6]).check(1, 12, CPU)
    Packing.from_lengths([0, 0]).check(3, 0, CPU)
    packing = Packing.from_lengths([4, 2, 6])
    packing.check(2, 6, CPU)
    with pytest.raises(ArgumentError, match="expected a boundary each 4 tokens"):  # not answered by the row length seen before
        packing.check(3, 4, CPU)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Packing.from_lengths([3, -1]), r"lengths: expected no negative length, got \[3, -1\]"),
        (lambda: Packing.from_lengths(torch.tensor([1.5])), r"lengths: expected integers \[N\], got torch.float32 \[1\]"),
        (lambda: Packing.from_lengths(torch.ones(1, 2, dtype=torch.int64)), r"lengths: expected integers \[N\], got torch.int64 \[1, 2\]"),
        (lambda: Packing.from_cu_seqlens([0, 3, 2]), r"cu_seqlens: expected 0 first and no decrease, got \[0, 3, 2\]"),
        (lambda: Packing.from_cu_seqlens([1, 3]), "cu_seqlens: expected 0 first"),
        (lambda: Packing.from_cu_seqlens([0, *range(20), 3]), r"got \[0, 0, 1, 2, 3, 4, '...', 18, 19, 3\]"),
        (lambda: Packing.from_cu_seqlens(torch.tensor([0.0, 1.0])), "cu_seqlens: expected integers"),
        (lambda: Packing.from_cu_seqlens(torch.tensor([False, True])), r"cu_seqlens: expected integers \[N \+ 1\], got torch.bool \[2\]"),
        (lambda: Packing.from_cu_seqlens(torch.tensor([0j, 3])), "cu_seqlens: expected integers .*, got torch.complex64"),
        (lambda: Packing.from_cu_seqlens(WRONG[0]), r"cu_seqlens: expected integers \[N \+ 1\], got NoneType"),
        (lambda: Packing.from_lengths(WRONG[1]), r"lengths: expected integers \[N\], got torch.int64 \[\]"),
        (lambda: Packing.from_lengths(WRONG[2]), r"lengths: expected integers \[N\], got str"),
        (lambda: Packing.from_position_ids(WRONG[2]), r"position_ids: expected integers \[T\] or \[B, T\], got str"),
        (lambda: Packing.from_cu_seqlens([]), r"cu_seqlens: expected integers \[N \+ 1\]"),
        (lambda: Packing.from_cu_seqlens([0, 2**31]), r"packing: expected fewer than 2\*\*31 tokens"),
        (lambda: Packing.from_lengths([3]).stretched(2**30), r"packing: expected at most 2147483647 tokens, got 3 x 1073741824"),
        (lambda: Packing.from_lengths([3]).stretched(0), r"n: expected at least 1, got 0"),
        (lambda: Packing.from_seq_idx(torch.tensor([0, 1, 0])), "seq_idx: expected numbers that never decrease"),
        (lambda: Packing.from_seq_idx(torch.zeros(1, 1, 1, dtype=torch.int64)), r"seq_idx: expected integers \[T\] or \[B, T\]"),
        (lambda: Packing.from_position_ids(torch.zeros(3)), "position_ids: expected integers"),
        (lambda: Packing.from_lengths([5]).check(2, 3, CPU), "packing: describes 5 tokens, but the input has 2 x 3"),
        (lambda: Packing.from_lengths([5, 1]).check(2, 3, CPU), "packing: a document crosses the end of a row; expected a boundary each 3"),
        (
            lambda: Packing.from_lengths([6]).check(1, 6, torch.device("meta")),
            r"packing: is on cpu, but the input is on meta; use packing.to\('meta'\)",
        ),
    ],
)
def test_errors_name_the_argument(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_one_compiled_graph_serves_all_boundaries() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count, dynamic=True)
    def starts(x: Tensor, packing: Packing) -> Tensor:
        packing.check(x.shape[0], x.shape[1], x.device)
        return x.flatten()[packing.cu_seqlens[:-1].long()] + packing.num_documents

    for lengths in ([3, 5], [1, 1, 4], [6, 2, 2, 2]):
        x = torch.arange(float(sum(lengths)))[None]
        packing = Packing.from_lengths(lengths)
        assert starts(x, packing).tolist() == [n + len(lengths) for n in packing.host.tolist()[:-1]]
    assert len(graphs) == 1
