"""Batches as a model learns from them, on its device: a new one for each step, or pieces of a fixed set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    def of(cls, sample: Sample, device: torch.device = CPU, *, fill: bool = False) -> Inputs:
        """A sample, on a device; `fill` to a multiple of `WHOLE`."""
        tokens, targets = sample.tokens, sample.targets
        asked = targets != IGNORE
        counts, places = asked.sum(1), None
        if 0 < 2 * int(counts[0]) <= targets.shape[1] and bool((counts == counts[0]).all()):
            places = asked.nonzero()[:, 1].view(len(tokens), -1)
            targets = targets.gather(1, places)
        short = -tokens.shape[1] % WHOLE if fill else 0
        if short:
            tokens = F.pad(tokens, (0, short))
            targets = targets if places is not None else F.pad(targets, (0, short), value=IGNORE)
        return cls(tokens.to(device), targets.to(device), None if places is None else places.to(device))

    def chosen(self, rows: Tensor) -> Inputs:
        """Some of the sequences."""
        return Inputs(*(None if x is None else x.index_select(0, rows) for x in self))  # type: ignore[arg-type]

    @property
    def shape(self) -> tuple[torch.Size | None, ...]:
        """Batches of one shape can share a captured update."""
        return tuple(None if x is None else x.shape for x in self)


def stream(tasks: Sequence[Task], training: Training, seed: int, device: torch.device = CPU, sets: Sets | None = None) -> Iterator[Inputs]:
    """A batch for each step, from the tasks in turn: always new, or from a fixed set in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    fills = [device.type == "cuda" and not task.from_last for task in tasks]
    if training.examples is None:
        for step in range(training.steps):
            turn = step % len(tasks)
            yield Inputs.of(tasks[turn].sample(training.batch, generator), device, fill=fills[turn])
        return
    sets = sets or Sets()
    fixed = [Inputs.of(sets.training(task, training.examples, seed), device, fill=fill) for task, fill in zip(tasks, fills)]
    left: list[list[Tensor]] = [[] for _ in tasks]
    for step in range(training.steps):
        turn = step % len(tasks)
        if not left[turn]:
            order = torch.randperm(training.examples, generator=generator).to(device)
            left[turn] = [piece for piece in order.split(training.batch) if len(piece) == training.batch]
        yield fixed[turn].chosen(left[turn].pop())
