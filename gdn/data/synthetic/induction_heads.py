"""Induction heads (arXiv 2312.00752, after 2209.11895): what followed the special token the first time?

    c a b S d a ... b S        ->        the target at the last place is d

The special token is the last of the vocabulary and stands twice: at a random place, and at the end.
"""

from __future__ import annotations

import torch

from gdn.data.synthetic.base import Sample, Split, Task, integers, unasked


class InductionHeads(Task):
    """See the module\'s docstring."""

    vocab: int = 16
    """Tokens with the special one."""
    length: int = 256
    """Tokens."""

    def check(self) -> None:
        self.at_least(vocab=3, length=3)

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        tokens, targets = integers(0, self.vocab - 1, (batch, self.length), generator), unasked(batch, self.length)
        place = integers(0, self.length - 2, (batch, 1), generator)
        targets[:, -1:] = tokens.gather(1, place + 1)
        tokens.scatter_(1, place, self.vocab - 1)
        tokens[:, -1] = self.vocab - 1
        return Sample(tokens, targets)
