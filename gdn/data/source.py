"""Where text comes from: a source yields documents in units, from any place, in an order fixed by (seed, epoch)."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gdn.core.errors import DataError
from gdn.data import order

Document = str | NDArray[np.int64]
"""Text, or tokens that a tokenizer made earlier, without the token that ends a document."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

Side = Literal["train", "validation", "all"]


@dataclass(frozen=True, kw_only=True)
class View:
    """Which documents of a source a reader sees and in what order. Readers of different ranks see different documents."""

    side: Side = "train"
    seed: int = 0
    shuffle: bool = True
    rank: int = 0
    world: int = 1


@dataclass(frozen=True)
class Unit:
    """Some documents that are read together, and the place in the epoch that they were read from."""

    at: Any
    documents: Sequence[Document]


class Source(ABC):
    """Documents, split into a training and a validation side by a rule that looks at nothing but the document and its name."""

    name: str
    """What the user asked for, for messages."""

    @abstractmethod
    def units(self, view: View, epoch: int, start: Any = None) -> Iterator[Unit]:
        """The units of one epoch in order, beginning with the unit at `start` (a `Unit.at`, plain JSON values) or with the first."""

    def documents(self, view: View | None = None) -> Iterator[Document]:
        """The documents of the first epoch; by default all of them, unshuffled."""
        for unit in self.units(view or View(side="all", shuffle=False), epoch=0):
            yield from unit.documents


class IndexedSource(Source):
    """A source whose units are known by number, and can be read in any order."""

    unit_keys: order.Keys
    """A number that stands for each unit's name. See `gdn.data.order`."""

    @abstractmethod
    def read(self, unit: int, side: Side) -> Sequence[Document]:
        """The documents of one unit that belong to a side; none is empty."""

    def select(self, side: Side) -> NDArray[np.int64]:
        """The units that may hold documents of a side."""
        return np.arange(len(self.unit_keys))

    def units(self, view: View, epoch: int, start: Any = None) -> Iterator[Unit]:
        chosen = self.select(view.side)
        places = order.epoch_keys(self.unit_keys[chosen], view.seed, epoch) if view.shuffle else chosen.astype(np.uint64)
        turn = np.argsort(places, kind="stable")[view.rank :: view.world]
        chosen, places = chosen[turn], places[turn]
        first = 0 if start is None else int(np.searchsorted(places, np.uint64(start)))
        for unit, place in zip(chosen[first:].tolist(), places[first:].tolist()):
            documents = self.read(unit, view.side)
            yield Unit(place, shuffled(documents, place, epoch) if view.shuffle else documents)


class FileBlocks(IndexedSource):
    """A source of files that are read in blocks: `blocks` gives their number for each path."""

    def __init__(self, name: str, blocks: Mapping[str, int]) -> None:
        self.name = name
        self._paths = list(blocks)
        self._first = np.cumsum([0, *blocks.values()])
        file_keys = order.keys(self._paths).tolist()
        self.unit_keys = np.concatenate([order.block_keys(file, n) for file, n in zip(file_keys, blocks.values())])

    def locate(self, unit: int) -> tuple[str, int]:
        """The path and the number of the block in that file."""
        file = int(np.searchsorted(self._first, unit, side="right")) - 1
        return self._paths[file], unit - int(self._first[file])


class JoinedSource(IndexedSource):
    """Several indexed sources as one."""

    def __init__(self, name: str, parts: Sequence[IndexedSource]) -> None:
        self.name = name
        self.parts = parts
        self.unit_keys = order.distinct(np.concatenate([part.unit_keys for part in parts]))
        self._first = np.cumsum([0, *(len(part.unit_keys) for part in parts)])

    def select(self, side: Side) -> NDArray[np.int64]:
        return np.concatenate([first + part.select(side) for first, part in zip(self._first, self.parts)])

    def read(self, unit: int, side: Side) -> Sequence[Document]:
        part = int(np.searchsorted(self._first, unit, side="right")) - 1
        return self.parts[part].read(unit - int(self._first[part]), side)


def up_to(documents: Iterable[Document], num_bytes: float) -> Iterator[str]:
    """The first documents of text, until they have so many bytes."""
    left = num_bytes
    for document in documents:
        assert isinstance(document, str)
        if left <= 0:
            return
        left -= len(document.encode())
        yield document


def shuffled(documents: Sequence[Document], seed: int, epoch: int) -> Sequence[Document]:
    """The documents of a unit in an order that depends on the seed and the epoch."""
    if len(documents) < 2:
        return documents
    turn = np.argsort(order.epoch_keys(np.arange(len(documents), dtype=np.uint64), seed, epoch))
    return [documents[i] for i in turn]


def on_side(documents: Sequence[Document], side: Side, fraction: float) -> list[Document]:
    """The documents of a side by their content, so that equal documents are always on the same side; empty ones are left out."""
    kept = [document for document in documents if len(document)]
    if side == "all":
        return kept
    return [document for document in kept if order.is_held_out(_content_key(document), fraction) == (side == "validation")]


def _content_key(document: Document) -> int:
    return order.key(document.encode() if isinstance(document, str) else document.astype("<u4").tobytes())


def row_text(value: Any, where: str, field: str) -> str:
    """The text of a row, or `DataError` that says where it was expected. A null is an empty text.

    Lone surrogates, which JSON can spell and UTF-8 cannot, become U+FFFD.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f'{where}: expected text in the field "{field}", got {type(value).__name__}')
    return value if value.isascii() else _LONE_SURROGATE.sub("\ufffd", value)
