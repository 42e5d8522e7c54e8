"""What a generated task is: a frozen configuration that draws batches.

    task = MQAR(vocab=256, length=64, pairs=8)
    tokens, targets, _ = task.sample(32, torch.Generator().manual_seed(0))

`tokens` and `targets` are int64 `[B, T]`. `targets[b, t]` is what a causal model has to say after reading `tokens[b, : t + 1]`, or -100
where it is not asked: nothing is shifted afterwards. Batches depend on the configuration, the split and the generator only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from gdn.core.config import Config
from gdn.core.errors import ArgumentError, ConfigError
from gdn.data.order import Keys, mix
from gdn.data.pack import IGNORE

__all__ = ["IGNORE", "Sample", "Split", "Task"]

Split = Literal["train", "test"]


class Sample(NamedTuple):
    """A batch of a task, on the CPU."""

    tokens: Tensor
    """int64 `[B, T]`"""
    targets: Tensor
    """int64 `[B, T]`, -100 where nothing is asked"""
    next_token: Tensor | None = None
    """float32 `[B, T, vocab]`: the true distribution of each target, for tasks that know it"""

    def part(self, begin: int, end: int) -> Sample:
        """Some of the sequences."""
        return Sample(self.tokens[begin:end], self.targets[begin:end], None if self.next_token is None else self.next_token[begin:end])


class Task(Config):
    """Base of every generated task. Its tag in dictionaries is the name of its file."""

    variants: ClassVar[str | None] = "gdn.data.synthetic"
    from_last: ClassVar[bool] = False
    """All targets are to be decoded from the hidden state of the last place (compression)."""
    divided: ClassVar[bool] = False
    """Contents could repeat (words of a group, bits, expressions, automata), so each belongs to one split."""

    @property
    def vocab(self) -> int:
        """Number of different tokens."""
        raise NotImplementedError

    @property
    def length(self) -> int:
        """A sequence has at most this many tokens."""
        raise NotImplementedError

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        """What `sample` returns, with checked arguments. Each task defines it."""
        raise NotImplementedError

    def sample(self, batch: int, generator: torch.Generator, split: Split = "train") -> Sample:
        """Draw `batch` sequences.

        The test split is asked for what the task tests, and shares no sequence with training, with the same seed neither. Where contents
        could repeat (`divided`), each belongs to one split. The other tasks have so many sequences that none comes twice at any usual size,
        and their test split has a stream of random numbers of its own.
        """
        if batch < 1:
            raise ArgumentError(f"batch: expected at least 1, got {batch}")
        if split not in get_args(Split):
            raise ArgumentError(f'split: expected "train" or "test", got {split!r}')
        return self.draw(batch, generator if self.divided or split == "train" else apart(generator), split)

    def at_least(self, **limits: int) -> None:
        """Raise `ConfigError` for a field below its limit."""
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")

    def fraction(self, *names: str) -> None:
        """Raise `ConfigError` for a field outside of [0, 1)."""
        for name in names:
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected from 0 to below 1, got {getattr(self, name)}")


def apart(generator: torch.Generator) -> torch.Generator:
    """Another stream of random numbers, which begins where the generator says."""
    return torch.Generator().manual_seed(int(integers(0, 2**62, (), generator)))


def distinct(batch: int, count: int, low: int, high: int, generator: torch.Generator) -> Tensor:
    """`[batch, count]` different numbers in each row, `low <= number < high`, in random order."""
    return torch.rand(batch, high - low, generator=generator).topk(count, dim=1).indices + low


def integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Uniform numbers, `low <= number < high`."""
    return torch.randint(low, high, shape, generator=generator)


def unasked(batch: int, length: int) -> Tensor:
    """Targets `[batch, length]` that ask for nothing yet."""
    return torch.full((batch, length), IGNORE)


def numpy_generator(generator: torch.Generator) -> np.random.Generator:
    """A NumPy generator, for tasks that are drawn row by row."""
    return np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))


def row_keys(rows: Tensor) -> Keys:
    """64 bits that stand for the content of each row of numbers, the same on every machine."""
    keys = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.numpy().astype(np.uint64).T:
        keys = mix(keys ^ mix(column))
    return keys


def on_split(keys: Keys, split: Split, held_out: float) -> np.ndarray:
    """Which contents belong to a split, of which the test split gets the fraction `held_out`."""
    return (keys < np.uint64(held_out * 2**64)) == (split == "test")


HELD_OUT = 1 / 8
"""Fraction of the rows of each size that only the test split has, of tasks that draw with `rows_of_sizes`."""
FEW = 128
"""Of fewer different rows of a size than this, exactly that fraction is held out, one at least; of more, whatever their keys say."""
FEWEST = 4
"""Different rows of a size that two splits need."""
MOST_DRAWS = 2000
"""Rows that are drawn for a place before it is given up; at least one in fifteen fits, of few."""


def padded_row_keys(rows: Tensor) -> Keys:
    """64 bits that stand for the content of each row, whatever number of zeros follows it; the same on every machine."""
    tokens = rows.numpy().astype(np.uint64)
    places = np.arange(rows.shape[1], dtype=np.uint64) << np.uint64(32)
    return mix(np.where(tokens > 0, mix(tokens ^ places), np.uint64(0)).sum(axis=1, dtype=np.uint64))


def borders(longest: int, few: dict[int, Tensor]) -> Keys:
    """For each size up to `longest` the key from which on rows belong to training; those below are the test's.

    Args:
        few: all rows of the sizes that have less than `FEW`, padded to one length.
    """
    found = np.full(longest + 1, HELD_OUT * 2**64, dtype=np.uint64)
    for size, rows in few.items():
        found[size] = np.sort(padded_row_keys(rows))[max(1, int(HELD_OUT * len(rows)))]
    return found


def rows_of_sizes(draw: Callable[[Tensor], Tensor], sizes: Tensor, split: Split, border: Keys) -> Tensor:
    """Draw a row of each size, and again each that belongs to the other split by its content. Its size stays, so that sizes keep their
    distribution.

    Args:
        draw: draws the rows whose numbers it is given, with the sizes of those numbers, padded with zeros.
    """
    wrong = torch.arange(len(sizes))
    rows = draw(wrong)
    for _ in range(MOST_DRAWS):
        is_wrong = (padded_row_keys(rows[wrong]) < border[sizes[wrong].numpy()]) != (split == "test")
        wrong = wrong[torch.from_numpy(is_wrong)]
        if not len(wrong):
            return rows
        rows[wrong] = draw(wrong)
    raise ConfigError(f"split: {MOST_DRAWS} rows of {int(sizes[wrong[0]])} tokens were drawn and none belongs to {split}")


def rows_of_split(draw: Callable[[int], Tensor], batch: int, split: Split, held_out: float) -> Tensor:
    """Draw rows until there are `batch` that belong to a split by their content."""
    share = held_out if split == "test" else 1 - held_out
    rows, missing = [], batch
    while missing > 0:
        drawn = draw(int(missing / share) + 8)
        kept = drawn[torch.from_numpy(on_split(row_keys(drawn), split, held_out))][:missing]
        rows.append(kept)
        missing -= len(kept)
    return torch.cat(rows)
