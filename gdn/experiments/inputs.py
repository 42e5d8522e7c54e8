"""Batches as a model learns from them, on its device: a new one for each step, or pieces of a fixed set."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.data.synthetic.base import IGNORE, Sample, Task
from gdn.experiments.definition import Training
from gdn.experiments.sets import Sets

CPU = torch.device("cpu")
WHOLE = 64
"""On a GPU sequences are filled up at the end to a multiple of this: operators see whole chunks, and later tokens change nothing before."""


class Inputs(NamedTuple):
    """A batch."""

    tokens: Tensor
    """int64 `[B, T]`"""
    targets: Tensor
    """int64 `[B, T]`, or `[B, n]` at the places"""
    places: Tensor | None = None
    """int64 `[B, n]`: where targets are, if every sequence has as many and they are few"""

    @classmethod
    def of(cls, sample: Sample, device: torch.device = CPU, *, fill: int = 1) -> Inputs:
        """A sample, on a device, filled up to a multiple of `fill` tokens."""
        tokens, targets = sample.tokens, sample.targets
        asked = targets != IGNORE
        counts, places = asked.sum(1), None
        if 0 < 2 * int(counts[0]) <= targets.shape[1] and bool((counts == counts[0]).all()):
            places = asked.nonzero()[:, 1].view(len(tokens), -1)
            targets = targets.gather(1, places)
        short = -tokens.shape[1] % fill
        if short:
            tokens = F.pad(tokens, (0, short))
            targets = targets if places is not None else F.pad(targets, (0, short), value=IGNORE)
        return cls(tokens.to(device), targets.to(device), None if places is None else places.to(device))

    def each(self, change: Callable[[Tensor], Tensor]) -> Inputs:
        """The same of every tensor."""
        return Inputs(change(self.tokens), change(self.targets), None if self.places is None else change(self.places))

    def chosen(self, rows: Tensor) -> Inputs:
        """Some of the sequences."""
        return self.each(lambda x: x.index_select(0, rows))

    @property
    def shape(self) -> tuple[torch.Size | None, ...]:
        """Batches of one shape can share a captured update."""
        return tuple(None if x is None else x.shape for x in self)


def stream(tasks: Sequence[Task], training: Training, seed: int, device: torch.device = CPU, sets: Sets | None = None) -> Iterator[Inputs]:
    """A batch for each step, from its task: always new, or from a fixed set in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    fills = [WHOLE if device.type == "cuda" and not task.from_last else 1 for task in tasks]
    if training.examples is None:
        for step in range(training.steps):
            number = task_at(step, len(tasks), training)
            yield Inputs.of(tasks[number].sample(training.batch, generator), device, fill=fills[number])
        return
    sets = sets or Sets()
    fixed = [Inputs.of(sets.training(task, training.examples, seed), device, fill=fill) for task, fill in zip(tasks, fills)]
    rows = torch.stack(list(_orders(len(tasks), training, generator))).to(device)  # at once: a copy on the way would wait for the device
    for step in range(training.steps):
        yield fixed[task_at(step, len(tasks), training)].chosen(rows[step])


def task_at(step: int, tasks: int, training: Training) -> int:
    """The number of the task of a step, both from 0."""
    return step % tasks if training.order == "turns" else step * tasks // training.steps


def _orders(tasks: int, training: Training, generator: torch.Generator) -> Iterator[Tensor]:
    """For each step which sequences of the training set of its task it takes."""
    assert training.examples is not None
    left: list[list[Tensor]] = [[] for _ in range(tasks)]
    for step in range(training.steps):
        mine = left[task_at(step, tasks, training)]
        if not mine:
            order = torch.randperm(training.examples, generator=generator)
            mine += [piece for piece in order.split(training.batch) if len(piece) == training.batch]
        yield mine.pop()
