"""MAD, selective copying (arXiv 2403.17844): tokens among blanks, a sign, then the tokens in order.

    . a . . b c  COPY  . . .        ->        the targets at the blanks after the sign are a b c

Each blank of the first part stands before a random one of the tokens, so the last token is never followed by one.
"""

from __future__ import annotations

import torch

from gdn.data.synthetic.base import Sample, Split, Task, integers, unasked


class MADSelectiveCopying(Task):
    """See the module\'s docstring."""

    vocab: int = 16
    """Tokens to copy, the blank and the sign."""
    length: int = 256
    """Tokens, at least 2 * copied + 1."""
    copied: int = 16
    """Tokens to copy."""

    def check(self) -> None:
        self.at_least(vocab=3, copied=1, length=2 * self.copied + 1)

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        blank, sign, n = self.vocab - 2, self.vocab - 1, self.copied
        data = integers(0, self.vocab - 2, (batch, n), generator)
        before = integers(0, n, (batch, self.length - 2 * n - 1), generator)
        blanks = torch.zeros(batch, n, dtype=torch.int64).scatter_add_(1, before, torch.ones_like(before))
        tokens, targets = torch.full((batch, self.length), blank), unasked(batch, self.length)
        tokens.scatter_(1, torch.arange(n) + blanks.cumsum(1), data)
        tokens[:, -n - 1] = sign
        targets[:, -n:] = data
        return Sample(tokens, targets)
