"""Multi-query associative recall (zoology, arXiv 2312.04927): pairs of keys and values, later the keys again, in any order.

    k1 v1 k2 v2 ... kn vn   . k2 . . k1 . ...        the target at each key of the second part is its value

The second part consists of slots of one key and one other token. Slot j = 0, 1, ... is used with a weight of (j + 1) ** (power - 1), so a
small power asks soon after the pairs and 1 asks anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import Sample, Split, Task, distinct, integers, unasked


class MQAR(Task):
    """See the module\'s docstring."""

    vocab: int = 8192
    """Keys are from the lower half of the vocabulary without 0, values from the upper half."""
    length: int = 64
    """Tokens; even, at least 4 * pairs."""
    pairs: int = 4
    """Pairs of a key and a value."""
    power: float = 0.01
    """How late keys are asked for, above 0; 1 is anywhere."""
    random_fill: bool = True
    """Fill the rest with random tokens of the whole vocabulary, as in the published data, so that a key or value may turn up again by
    chance; otherwise with 0."""

    def check(self) -> None:
        self.at_least(pairs=1, vocab=2 * self.pairs + 2)
        if self.length % 2 or self.length < 4 * self.pairs:
            raise ConfigError(f"length: expected an even number of at least 4 * pairs = {4 * self.pairs}, got {self.length}")
        if self.power <= 0:
            raise ConfigError(f"power: expected above 0, got {self.power}")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        half = self.vocab // 2
        keys = distinct(batch, self.pairs, 1, half, generator)
        values = distinct(batch, self.pairs, half, self.vocab, generator)
        fill = self.vocab if self.random_fill else 0
        return ask(interleave(keys, values), keys.unsqueeze(-1), values, self.length, self.power, fill, generator)


def interleave(*columns: Tensor) -> Tensor:
    """The numbers of each place of the columns `[B, n]` one after another: `[B, n * len(columns)]`."""
    return torch.stack(columns, dim=-1).flatten(1)


def ask(context: Tensor, queries: Tensor, answers: Tensor, length: int, power: float, fill: int, generator: torch.Generator) -> Sample:
    """Put the queries `[B, n, w]` into slots of w + 1 tokens after the context; the answer is due at the last token of each.

    Zeros become random tokens below `fill`, if there is one.
    """
    batch, count, width = queries.shape
    start = context.shape[1]
    slots = weighted_slots(batch, count, (length - start) // (width + 1), power, generator)
    tokens, targets = torch.zeros(batch, length, dtype=torch.int64), unasked(batch, length)
    tokens[:, :start] = context
    for i in range(width):
        tokens.scatter_(1, start + slots * (width + 1) + i, queries[:, :, i])
    targets.scatter_(1, start + slots * (width + 1) + width - 1, answers)
    if fill:
        tokens = torch.where(tokens == 0, integers(0, fill, (batch, length), generator), tokens)
    return Sample(tokens, targets)


def weighted_slots(batch: int, count: int, slots: int, power: float, generator: torch.Generator) -> Tensor:
    """`[batch, count]` different slots, drawn one after another with weights (slot + 1) ** (power - 1).

    The largest of log weight + Gumbel noise are such a draw (Vieira 2014).
    """
    weight = (power - 1) * torch.arange(1, slots + 1, dtype=torch.float64).log()
    uniform = torch.rand(batch, slots, generator=generator, dtype=torch.float64)
    return (weight - (-uniform.log()).log()).topk(count, dim=1).indices
