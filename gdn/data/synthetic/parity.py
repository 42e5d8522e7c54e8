"""Parity: is the number of ones so far even or odd? (Grazzi et al., arXiv 2411.12537)

Bits 0 and 1 are the tokens 1 and 2; the answers even and odd are 1 and 2 as well; 0 fills up short sequences.
"""

from __future__ import annotations

import torch

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import IGNORE, Sample, Split, Task, integers


class Parity(Task):
    """See the module\'s docstring."""

    length: int = 40
    """Most bits of a sequence."""
    shortest: int = 3
    """Fewest bits; the number is uniform between."""
    running: bool = False
    """Ask after every bit; otherwise, as published, after the last."""

    @property
    def vocab(self) -> int:
        return 3

    def check(self) -> None:
        self.at_least(shortest=1)
        if self.length < self.shortest:
            raise ConfigError(f"length: expected at least shortest={self.shortest}, got {self.length}")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        bits = integers(0, 2, (batch, self.length), generator)
        lengths = integers(self.shortest, self.length + 1, (batch, 1), generator)
        place = torch.arange(self.length)
        asked = place < lengths if self.running else place == lengths - 1
        return Sample((bits + 1).where(place < lengths, 0), (bits.cumsum(1) % 2 + 1).where(asked, IGNORE))
