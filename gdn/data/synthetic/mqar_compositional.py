"""MQAR with keys of two tokens (zoology's compositional MQAR): neither token alone tells the value.

    a x v1   b x v2   a y v3   b y v4   . . . a y . b x .        the target is due at the second token of each query

The keys of a sequence are all cells of a grid of `grid` first and `grid` second tokens, in random order.
"""

from __future__ import annotations

import torch

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import Sample, Split, Task, distinct
from gdn.data.synthetic.mqar import ask, interleave


class CompositionalMQAR(Task):
    """See the module\'s docstring."""

    vocab: int = 8192
    """First tokens are from the lowest third of the vocabulary without 0, second ones from the middle, values from the highest."""
    length: int = 64
    """Tokens, at least 6 * grid ** 2."""
    grid: int = 2
    """First tokens, and second tokens: there are grid ** 2 keys."""
    power: float = 0.01
    """How late keys are asked for, above 0; 1 is anywhere."""
    random_fill: bool = True
    """Fill the rest with random tokens of the whole vocabulary; otherwise with 0."""

    def check(self) -> None:
        self.at_least(grid=1, vocab=3 * (self.grid**2 + 1), length=6 * self.grid**2)
        if self.power <= 0:
            raise ConfigError(f"power: expected above 0, got {self.power}")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        third, cells = self.vocab // 3, self.grid**2
        order = distinct(batch, cells, 0, cells, generator)
        first = distinct(batch, self.grid, 1, third, generator).gather(1, order // self.grid)
        second = distinct(batch, self.grid, third, 2 * third, generator).gather(1, order % self.grid)
        values = distinct(batch, cells, 2 * third, self.vocab, generator)
        queries = torch.stack((first, second), dim=-1)
        fill = self.vocab if self.random_fill else 0
        return ask(interleave(first, second, values), queries, values, self.length, self.power, fill, generator)
