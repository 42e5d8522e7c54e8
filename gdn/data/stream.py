"""The endless sequence of tokens of a source, read from any place. See `gdn.data.pack`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdn.core.errors import DataError
from gdn.data.source import Document, Source, View
from gdn.data.tokenizer import Tokenizer

logger = logging.getLogger("gdn.data")

Tokens = NDArray[np.int64]


class TokenStream:
    """Places (input, target) one after another, epoch after epoch. `place` is where the next `take` begins, in plain JSON values."""

    def __init__(self, source: Source, tokenizer: Tokenizer, view: View) -> None:
        self._source, self._tokenizer, self._view = source, tokenizer, view
        self.restart({"epoch": 0, "unit": None, "document": 0, "token": 0})

    def restart(self, place: dict[str, Any]) -> None:
        """Go to a place."""
        self.place = dict(place)
        self._document = np.empty(0, dtype=np.int64)
        self._used = 0
        self._documents = self._read_from(place)

    def take(self, count: int) -> tuple[Tokens, Tokens]:
        """The next `count` inputs and targets."""
        tokens, targets = [], []
        while count:
            if self._used == len(self._document):
                self._next()
            stop = min(self._used + count, len(self._document))
            before = self._tokenizer.end_id if self._used == 0 else self._document[self._used - 1]
            targets.append(self._document[self._used : stop])
            tokens += [np.array([before]), targets[-1][:-1]]
            count -= stop - self._used
            self._used = self.place["token"] = stop
        return np.concatenate(tokens), np.concatenate(targets)

    def _next(self) -> None:
        place, self._document = next(self._documents)
        self.place, self._used = dict(place), place["token"]

    def _read_from(self, place: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Tokens]]:
        """The rest of the epoch of `place`, then the epochs after it."""
        yield from read_epoch(self._source, self._tokenizer, self._view, place)
        epoch = place["epoch"]
        while True:
            epoch += 1
            empty = True
            for item in read_epoch(self._source, self._tokenizer, self._view, {"epoch": epoch, "unit": None, "document": 0, "token": 0}):
                empty = False
                yield item
            if empty:
                raise DataError(nothing_to_read(self._source, self._view))


def read_epoch(source: Source, tokenizer: Tokenizer, view: View, place: dict[str, Any]) -> Iterator[tuple[dict[str, Any], Tokens]]:
    """(place, tokens with the end token) of each document of an epoch, beginning at a place."""
    skip = place["document"], place["token"]
    first = place["unit"]
    for unit in source.units(view, place["epoch"], first):
        if first is not None and unit.at != first:
            logger.warning("%s has changed since the place was saved: going on at the next text that is left", source.name)
            skip = 0, 0
        for number, document in enumerate(unit.documents):
            if number < skip[0]:
                continue
            tokens = _finish(document, tokenizer)
            used = min(skip[1], len(tokens)) if number == skip[0] else 0
            if len(tokens) > 1 and used < len(tokens):
                yield {"epoch": place["epoch"], "unit": unit.at, "document": number, "token": used}, tokens
        first, skip = None, (0, 0)


def nothing_to_read(source: Source, view: View) -> str:
    """Why a reader finds no document, and what to do."""
    if view.side == "validation":
        return (
            f"source {source.name}: no document falls on the validation side; "
            "raise validation_fraction, give other text as validation_source, or validate on nothing (validation_tokens 0). "
            "A short text file is one document, and all of it falls on one side. In commands: gdn train --data.validation-fraction, "
            "--data.validation-source or --validation-tokens 0; gdn eval --source"
        )
    if view.side == "all":
        return f"validation_source {source.name}: no document with text"
    if view.world > 1:
        return f"source {source.name}: no document for process {view.rank} of {view.world}; give more text or use fewer processes"
    return (
        f"source {source.name}: no document with text on the training side; lower validation_fraction "
        "(gdn train --data.validation-fraction) or give more text"
    )


def _finish(document: Document, tokenizer: Tokenizer) -> Tokens:
    tokens = tokenizer.encode(document) if isinstance(document, str) else document
    return np.append(tokens, tokenizer.end_id)
