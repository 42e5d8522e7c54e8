"""Batches without end for training, and a fixed list of batches for validation.

data = Data(Data.Config(source="texts/*.txt", length=1024))
loader = data.train_loader()
batch = next(loader)
loader.load_state_dict(loader.state_dict())      # goes on at exactly the next batch
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from gdn.core.errors import ArgumentError, DataError
from gdn.data.config import DataConfig
from gdn.data.find import open_source
from gdn.data.pack import Batch, pack
from gdn.data.source import Side, Source, View
from gdn.data.stream import TokenStream, nothing_to_read, read_epoch
from gdn.data.tokenizer import Tokenizer, load_tokenizer
from gdn.data.tokens import write_tokens

SPREAD = 8
"""Validation rows are taken evenly from this many times as much text, so that a few long files do not decide the result."""


class Loader:
    """An endless iterator of training batches whose place can be saved and restored.

    `state_dict()` is the place after the last batch that was delivered, in plain JSON values, whatever was made ahead. A loader of the
    same configuration that loads it delivers exactly the batches that were left. `length`, `batch` (both only without `mix`), `packing`
    and `prefetch` may differ: the text goes on at the same place. If files were added or removed meanwhile, the text that is left goes on,
    new files among it.

    An error while reading leaves the place where it was: the next call tries again.
    """

    def __init__(
        self, config: DataConfig, *, tokenizer: Tokenizer | None = None, source: Source | None = None, rank: int = 0, world: int = 1
    ) -> None:
        if not 0 <= rank < world:
            raise ArgumentError(f"rank: expected at least 0 and below world = {world}, got {rank}")
        self.config = config
        self.tokenizer = tokenizer or load_tokenizer(config.tokenizer)
        view = View(side="train", seed=config.seed, shuffle=config.shuffle, rank=rank, world=world)
        self._stream = TokenStream(source or _open(config, self.tokenizer), self.tokenizer, view)
        self._identity = {
            "source": config.source,
            "text_field": config.text_field,
            "tokenizer": self.tokenizer.fingerprint,
            "seed": config.seed,
            "shuffle": config.shuffle,
            "held_out": config.held_out,
            "rank": rank,
            "world": world,
            "mix": config.mix,
        }
        if config.mix > 1:
            self._identity |= {"batch": config.batch, "length": config.length}
        self._block: tuple[np.ndarray, np.ndarray] | None = None
        self._place = self._making = dict(self._stream.place) | ({"block": 0, "dealt": 0} if config.mix > 1 else {})
        self._ahead: deque[Future[tuple[Batch, dict[str, Any]]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="gdn-data") if config.prefetch else None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        try:
            batch, self._place = self._make() if self._thread is None else self._next_ahead(self._thread)
        except BaseException:
            self._go_to(self._place)
            raise
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch, and what it is a place in."""
        return {**self._identity, "place": dict(self._place)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken; `DataError` if it belongs to other text, another order or another process."""
        for name, mine in self._identity.items():
            if name not in state or state[name] != mine:
                raise DataError(
                    f"the place in the data was saved with {name} = {state.get(name)!r}, this run has {mine!r}; "
                    "go on with the same value, or start a new run"
                )
        self._go_to(state["place"])

    def _go_to(self, place: dict[str, Any]) -> None:
        while self._ahead:
            future = self._ahead.pop()
            if not future.cancel():
                future.exception()  # wait: the thread must not touch the stream any more
        self._stream.restart({name: value for name, value in place.items() if name not in ("block", "dealt")})
        self._block = None
        self._making = self._place = dict(place)

    def _next_ahead(self, thread: ThreadPoolExecutor) -> tuple[Batch, dict[str, Any]]:
        while len(self._ahead) <= self.config.prefetch:
            self._ahead.append(thread.submit(self._make))
        return self._ahead.popleft().result()

    def _make(self) -> tuple[Batch, dict[str, Any]]:
        config = self.config
        if config.mix > 1:
            tokens, targets = self._deal()
        else:
            tokens, targets = self._stream.take(config.batch * config.length)
            self._making = self._stream.place
        batch = pack(tokens, targets, self.tokenizer, batch=config.batch, length=config.length, boundaries=config.packing)
        return batch, dict(self._making)

    def _deal(self) -> tuple[np.ndarray, np.ndarray]:
        """The next batch of a block of `mix` batches with its rows in random order. A place in a block is where the block begins, its
        number and how many of its batches are dealt, so that the same block can be read and mixed again."""
        config, place = self.config, self._making
        if self._block is None:
            rows = np.random.default_rng((config.seed, place["block"])).permutation(config.mix * config.batch)
            tokens, targets = self._stream.take(len(rows) * config.length)
            self._block = tokens.reshape(len(rows), -1)[rows], targets.reshape(len(rows), -1)[rows]
        first = place["dealt"] * config.batch
        tokens, targets = (x[first : first + config.batch].reshape(-1) for x in self._block)
        self._making = {**place, "dealt": place["dealt"] + 1}
        if self._making["dealt"] == config.mix:
            self._block = None
            self._making = {**self._stream.place, "block": place["block"] + 1, "dealt": 0}
        return tokens, targets


class Data:
    """The text of a run: its tokenizer, its training batches and its validation batches."""

    Config = DataConfig

    def __init__(self, config: DataConfig, *, tokenizer: Tokenizer | None = None) -> None:
        self.config = config
        self.tokenizer = tokenizer or load_tokenizer(config.tokenizer)

    @cached_property
    def source(self) -> Source:
        """What `config.source` names, listed once."""
        return _open(self.config, self.tokenizer)

    def train_loader(self, *, rank: int = 0, world: int = 1) -> Loader:
        """Training batches of one process of `world`."""
        return Loader(self.config, tokenizer=self.tokenizer, source=self.source, rank=rank, world=world)

    def validation(self, max_tokens: int) -> list[Batch]:
        """The same batches at every call. See `validation_batches`."""
        source = None if self.config.validation_source else self.source
        return validation_batches(self.config, self.tokenizer, max_tokens, source=source)

    def documents(self, side: Side = "train") -> Iterator[str]:
        """The texts of one side, in the order of training; for a tokenizer to learn from, or for `prepare`."""
        view = View(side=side, seed=self.config.seed, shuffle=self.config.shuffle)
        for document in self.source.documents(view):
            if not isinstance(document, str):
                raise DataError(f"source {self.source.name}: holds tokens, expected text")
            yield document


def validation_batches(config: DataConfig, tokenizer: Tokenizer, max_tokens: int, *, source: Source | None = None) -> list[Batch]:
    """Batches of text that is never trained on: the same at every call, whatever the seed.

    Takes at most `max_tokens` targets in whole rows, evenly from up to `SPREAD` times as much text. The last batch is padded with
    targets of -100.

    Args:
        config: its `validation_source`, or the validation side of its `source`.
        source: the opened source, if there is one already.
    """
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens: expected at least 1, got {max_tokens}")
    if source is None:
        source = _open(config, tokenizer, config.validation_source)
    view = View(side="all" if config.validation_source else "validation")
    tokens, targets = _first_places(source, tokenizer, view, SPREAD * max_tokens)
    if not len(tokens):
        raise DataError(nothing_to_read(source, view))
    rows = _even(-(-len(tokens) // config.length), max(1, max_tokens // config.length))
    return [_batch_of(tokens, targets, rows[i : i + config.batch], config, tokenizer) for i in range(0, len(rows), config.batch)]


def prepare(source: str | Iterable[str], tokenizer: Tokenizer, out: str | Path, *, text_field: str = "text") -> Path:
    """Tokenise every document of a source (a name, or texts) into a token file `out` (NAME.bin), to be read as `tokens:NAME.bin`.

    The file appears whole or not at all. See `gdn.data.tokens` for the format.
    """
    if isinstance(source, str):
        return write_tokens(open_source(source, tokenizer=tokenizer, text_field=text_field).documents(), tokenizer, out)
    return write_tokens(source, tokenizer, out)


def _open(config: DataConfig, tokenizer: Tokenizer, name: str | None = None) -> Source:
    fraction = 0.0 if name else config.held_out
    return open_source(name or config.source, tokenizer=tokenizer, text_field=config.text_field, fraction=fraction)


def _first_places(source: Source, tokenizer: Tokenizer, view: View, count: int) -> tuple[np.ndarray, np.ndarray]:
    """At most the first `count` inputs and targets of an epoch."""
    documents, total = [], 0
    for _, document in read_epoch(source, tokenizer, view, {"epoch": 0, "unit": None, "document": 0, "token": 0}):
        documents.append(document)
        total += len(document)
        if total >= count:
            break
    targets = np.concatenate([np.array([tokenizer.end_id]), *documents])[: count + 1]
    return targets[:-1], targets[1:]


def _even(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` numbers, evenly spaced; all of them if there are no more."""
    return [i * count // wanted for i in range(wanted)] if wanted < count else list(range(count))


def _batch_of(tokens: np.ndarray, targets: np.ndarray, rows: list[int], config: DataConfig, tokenizer: Tokenizer) -> Batch:
    places = np.concatenate([np.arange(row * config.length, (row + 1) * config.length) for row in rows])
    places = places[places < len(tokens)]  # only the last row can be short
    return pack(tokens[places], targets[places], tokenizer, batch=config.batch, length=config.length, boundaries=config.packing)
