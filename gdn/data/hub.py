"""Hugging Face datasets, streamed: nothing is downloaded but what is read."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

from gdn.core.errors import DataError, nearest, require
from gdn.data.source import Source, Unit, View, on_side, row_text, shuffled

BLOCK = 512
"""Rows of a unit, shuffled together."""


class HubSource(Source):
    """Rows of `REPOSITORY[/CONFIG][@SPLIT]`, or of the files in a local folder `PATH[@SPLIT]`.

    The stream is read in its own order; only blocks of rows are shuffled. Its place is the dataset's own `state_dict` at the beginning of a
    block, so a resumed run reads at most a block twice. Readers share out the shards when there are enough of them, else the rows.
    """

    def __init__(self, name: str, field: str, fraction: float) -> None:
        self.name, self.field, self.fraction = name, field, fraction
        self._dataset = _load(name)

    def units(self, view: View, epoch: int, start: Any = None) -> Iterator[Unit]:
        by_shard = self._dataset.num_shards >= view.world
        # A shard is a new object even if it is the only one, so that the place in it belongs to this reader alone.
        dataset = self._dataset.shard(view.world, view.rank) if by_shard else self._dataset.shard(1, 0)
        if start is not None:
            dataset.load_state_dict(start["dataset"])
        rows, at = iter(dataset), start
        for number in itertools.count(0 if start is None else start["block"]):
            block = list(itertools.islice(rows, BLOCK))
            if not block:
                return
            mine = block if by_shard else block[view.rank :: view.world]
            documents = on_side([self._text(row) for row in mine], view.side, self.fraction)
            after = {"block": number + 1, "dataset": dataset.state_dict()}
            yield Unit(at, shuffled(documents, view.seed + number, epoch) if view.shuffle else documents)
            at = after

    def _text(self, row: dict[str, Any]) -> str:
        if self.field not in row:
            raise DataError(f'{self.name}: rows have no field "{self.field}" (option text_field).{nearest(self.field, row)}')
        return row_text(row[self.field], self.name, self.field)


def _load(name: str) -> Any:
    datasets = require("datasets", "data", f"streaming {name}")
    place, _, split = name.removeprefix("hf:").partition("@")
    config = None
    if not os.path.isdir(place) and not place.startswith(("/", ".")):
        owner, repository, config = [*place.split("/", 2), None, None][:3]
        place = f"{owner}/{repository}" if repository else place
    try:
        return datasets.load_dataset(place, config, split=split or "train", streaming=True)
    except Exception as error:  # the package raises its own, the network's and plain exceptions
        raise DataError(f"{name}: cannot be opened: {type(error).__name__}: {error}") from error
