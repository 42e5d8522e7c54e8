"""Copying and compression: the data are read off the sequence again."""

from __future__ import annotations

import torch

from gdn.data.synthetic import Compression, MADSelectiveCopying, SelectiveCopying
from gdn.data.synthetic.base import IGNORE


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_mad_selective_copying() -> None:
    task = MADSelectiveCopying(vocab=10, length=24, copied=5)
    blank, sign = 8, 9
    tokens, targets, _ = task.sample(300, seeded())
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        first, rest = row[:18], row[18:]
        data = [token for token in first if token != blank]
        assert len(data) == 5
        assert all(token < 8 for token in data)
        assert first[-1] != blank
        assert rest == [sign] + [blank] * 5
        assert wanted == [IGNORE] * 19 + data
    # each blank stands before a uniform token: before the first with probability 1/5
    leading = (tokens[:, :18] != blank).int().argmax(dim=1).float().mean()
    assert abs(leading - 13 / 5) < 0.3


def test_selective_copying() -> None:
    task = SelectiveCopying(vocab=10, context=30, copied=4)
    tokens, targets, _ = task.sample(300, seeded())
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        data = [token for token in row[:30] if token]
        assert len(data) == 4
        assert all(1 <= token < 9 for token in data)
        assert row[30:] == [9] * 4
        assert wanted == [IGNORE] * 30 + data
    assert (tokens[:, :30] > 0).any(0).all()  # data may be anywhere


def test_compression_asks_for_everything_from_the_last_place() -> None:
    task = Compression(vocab=6, length=9)
    tokens, targets, _ = task.sample(100, seeded())
    assert task.from_last
    assert torch.equal(tokens, targets)
    assert (tokens[:, -1] == 5).all()
    assert tokens[:, :-1].max() == 4
