"""Mixed rows: the same text as unmixed, in another order, and a resumed loader deals exactly the batches that were left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gdn.core.errors import DataError
from gdn.data import DataConfig, Loader


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}. " * (20 + 7 * i))
    return DataConfig(source=f"{tmp_path}/*.txt", length=16, batch=3, mix=4, validation_fraction=0.0)


def rows(loader: Loader, batches: int) -> list[tuple[int, ...]]:
    return [tuple(row.tolist()) for _ in range(batches) for row in next(loader).tokens]


def test_a_block_holds_the_rows_of_the_unmixed_text(config: DataConfig) -> None:
    mixed, plain = Loader(config), Loader(config.with_(mix=1))
    for _ in range(3):
        dealt, expected = rows(mixed, 4), rows(plain, 4)
        assert dealt != expected
        assert sorted(dealt) == sorted(expected)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("batches", [0, 1, 3, 4, 5, 9])
def test_resumption_is_exact(config: DataConfig, batches: int, prefetch: int) -> None:
    loader = Loader(config.with_(prefetch=prefetch))
    for _ in range(batches):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    left = [next(loader) for _ in range(6)]
    again = Loader(config.with_(prefetch=prefetch))
    next(again)
    again.load_state_dict(state)
    for expected in left:
        batch = next(again)
        assert torch.equal(batch.tokens, expected.tokens)
        assert torch.equal(batch.targets, expected.targets)
        assert batch.num_bytes == expected.num_bytes


def test_another_mix_is_refused(config: DataConfig) -> None:
    state = Loader(config).state_dict()
    for mix in (1, 2):
        with pytest.raises(DataError, match="mix"):
            Loader(config.with_(mix=mix)).load_state_dict(state)
