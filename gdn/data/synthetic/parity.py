"""Parity: is the number of ones so far even or odd? (Grazzi et al., arXiv 2411.12537)

Bits 0 and 1 are the tokens 1 and 2; the answers even and odd are 1 and 2 as well; 0 fills up short sequences.
One sequence in eight of each length is the test's alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from gdn.core.errors import ConfigError
from gdn.data.order import Keys
from gdn.data.synthetic.base import FEW, FEWEST, IGNORE, Sample, Split, Task, borders, integers, rows_of_sizes


class Parity(Task):
    """See the module\'s docstring."""

    divided = True

    length: int = 40
    """Most bits of a sequence."""
    shortest: int = 3
    """Fewest bits, at least 2; the number is uniform between."""
    running: bool = False
    """Ask after every bit; otherwise, as published, after the last."""

    @property
    def vocab(self) -> int:
        return 3

    def check(self) -> None:
        self.at_least(shortest=1)
        if 2**self.shortest < FEWEST:
            raise ConfigError(
                f"shortest: expected at least 2, since the splits share no sequence and have to divide {FEWEST}, got {self.shortest}"
            )
        if self.length < self.shortest:
            raise ConfigError(f"length: expected at least shortest={self.shortest}, got {self.length}")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        lengths = integers(self.shortest, self.length + 1, (batch, 1), generator)
        place = torch.arange(self.length)

        def draw(rows: Tensor) -> Tensor:
            bits = integers(0, 2, (len(rows), self.length), generator)
            return (bits + 1).where(place < lengths[rows], 0)

        tokens = rows_of_sizes(draw, lengths.flatten(), split, _borders(self.length))
        asked = place < lengths if self.running else place == lengths - 1
        return Sample(tokens, ((tokens == 2).cumsum(1) % 2 + 1).where(asked, IGNORE))


@functools.cache
def _borders(longest: int) -> Keys:
    sizes = range(2, min(longest + 1, FEW.bit_length()))
    return borders(longest, {n: 1 + (torch.arange(2**n).unsqueeze(1) >> torch.arange(n)) % 2 for n in sizes if 2**n < FEW})
