"""Rows: every token of every document is a target once, in order, after the token before it; boundaries stand where documents begin."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from gdn.data import ByteTokenizer, DataConfig, Loader
from gdn.data.pack import pack
from gdn.data.source import Source, Unit, View

END = ByteTokenizer.end_id

texts = st.lists(st.text(max_size=12), min_size=1, max_size=8).filter(any)


class Texts(Source):
    """The same texts each epoch, in order, one unit."""

    name = "texts"

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def units(self, view: View, epoch: int, start: Any = None) -> Iterator[Unit]:
        yield Unit(None, [text for text in self.texts if text])


def make(texts: list[str], **config: Any) -> Loader:
    return Loader(DataConfig(prefetch=0, **config), source=Texts(texts))


@given(texts=texts, length=st.integers(1, 20), batch=st.integers(1, 4))
def test_every_byte_of_every_document_is_a_target_once_in_order(texts: list[str], length: int, batch: int) -> None:
    epoch = [token for text in texts if text for token in [*text.encode(), END]]
    loader = make(texts, length=length, batch=batch)
    batches = [next(loader) for _ in range(2 * len(epoch) // (length * batch) + 1)]
    targets = torch.cat([b.targets.flatten() for b in batches]).tolist()
    assert targets == (epoch * (len(targets) // len(epoch) + 1))[: len(targets)]
    tokens = torch.cat([b.tokens.flatten() for b in batches]).tolist()
    assert tokens == [END, *targets[:-1]]
    assert all(b.tokens.shape == b.targets.shape == (batch, length) and b.tokens.dtype == b.targets.dtype == torch.int64 for b in batches)


@given(texts=texts, length=st.integers(1, 20), batch=st.integers(1, 4))
def test_boundaries_stand_at_documents_and_rows_and_nowhere_else(texts: list[str], length: int, batch: int) -> None:
    loader = make(texts, length=length, batch=batch)
    for _ in range(4):
        b = next(loader)
        assert b.packing is not None
        flat = b.tokens.flatten().tolist()
        starts = {i for i, token in enumerate(flat) if token == END} | set(range(0, len(flat), length))
        assert b.packing.host.tolist() == [*sorted(starts), len(flat)]
        b.packing.check(batch, length, b.tokens.device)
    assert next(make(texts, length=length, batch=batch, packing=False)).packing is None


@given(texts=texts, length=st.integers(1, 20), batch=st.integers(1, 4))
def test_bytes_are_those_of_the_targets(texts: list[str], length: int, batch: int) -> None:
    loader = make(texts, length=length, batch=batch)
    for _ in range(4):
        b = next(loader)
        assert b.num_targets == length * batch
        assert b.num_bytes == int((b.targets != END).sum())


def test_rows_by_hand() -> None:
    b = next(make(["ab", "c"], length=4, batch=2))
    a_, b_, c_ = b"abc"
    assert b.tokens.tolist() == [[END, a_, b_, END], [c_, END, a_, b_]]
    assert b.targets.tolist() == [[a_, b_, END, c_], [END, a_, b_, END]]
    assert b.packing is not None and b.packing.host.tolist() == [0, 3, 4, 5, 8]
    assert (b.num_targets, b.num_bytes) == (8, 5)


def test_bits_per_byte_of_a_uniform_model_over_bytes_and_the_end() -> None:
    """log2(257) bits a place; the places of end tokens cost bits and bring no bytes."""
    b = next(make(["x" * 9], length=10, batch=1))
    nats = b.num_targets * math.log(257)
    assert math.isclose(nats / math.log(2) / b.num_bytes, math.log2(257) * 10 / 9)


def test_padding_is_one_document_without_targets() -> None:
    tokens, targets = np.array([END, 1, 2, END, 4]), np.array([1, 2, END, 4, 5])
    b = pack(tokens, targets, ByteTokenizer(), batch=3, length=4, boundaries=True)
    assert b.tokens.tolist() == [[END, 1, 2, END], [4, END, END, END], [END] * 4]
    assert b.targets.tolist() == [[1, 2, END, 4], [5, -100, -100, -100], [-100] * 4]
    assert b.packing is not None and b.packing.host.tolist() == [0, 3, 4, 5, 8, 12]
    assert (b.num_targets, b.num_bytes) == (5, 4)


def test_to_a_device() -> None:
    b = next(make(["ab"], length=4, batch=2))
    moved = b.to("meta")
    assert moved.tokens.device.type == moved.targets.device.type == "meta"
    assert moved.num_bytes == b.num_bytes
    same = b.to("cpu")
    assert torch.equal(same.tokens, b.tokens) and same.packing is b.packing
