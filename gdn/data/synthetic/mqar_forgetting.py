"""MQAR in which some keys get a second value (zoology's forgetting MQAR): the last value counts.

    k1 v1 ... kn vn   k3 v3' k1 v1' ...   . k2 . . k1 . ...

A second value always differs from the first. (In the published generator the comparison looks at another column, so a few may be equal.)
"""

from __future__ import annotations

import torch

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import Sample, Split, Task, distinct, integers
from gdn.data.synthetic.mqar import ask, interleave


class ForgettingMQAR(Task):
    """See the module\'s docstring."""

    vocab: int = 8192
    """Keys are from the lower half of the vocabulary without 0, values from the upper half."""
    length: int = 64
    """Tokens; even, at least 4 * pairs + 2 * updates."""
    pairs: int = 8
    """Pairs of a key and a value."""
    updates: int = 4
    """Keys that get a second value."""
    power: float = 0.01
    """How late keys are asked for, above 0; 1 is anywhere."""
    random_fill: bool = True
    """Fill the rest with random tokens of the whole vocabulary; otherwise with 0."""

    def check(self) -> None:
        self.at_least(pairs=1, updates=0, vocab=2 * self.pairs + 4)
        if self.updates > self.pairs:
            raise ConfigError(f"updates: expected at most pairs={self.pairs}, got {self.updates}")
        least = 4 * self.pairs + 2 * self.updates
        if self.length % 2 or self.length < least:
            raise ConfigError(f"length: expected an even number of at least 4 * pairs + 2 * updates = {least}, got {self.length}")
        if self.power <= 0:
            raise ConfigError(f"power: expected above 0, got {self.power}")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        half, values_in_all = self.vocab // 2, self.vocab - self.vocab // 2
        keys = distinct(batch, self.pairs, 1, half, generator)
        values = distinct(batch, self.pairs, half, self.vocab, generator)
        changed = distinct(batch, self.updates, 0, self.pairs, generator)
        # A step of 1 to one less than the number of values never comes back to the same value.
        step = integers(1, values_in_all, (batch, self.updates), generator)
        new = half + (values.gather(1, changed) - half + step) % values_in_all
        context = torch.cat((interleave(keys, values), interleave(keys.gather(1, changed), new)), dim=1)
        last = values.scatter(1, changed, new)
        fill = self.vocab if self.random_fill else 0
        return ask(context, keys.unsqueeze(-1), last, self.length, self.power, fill, generator)
