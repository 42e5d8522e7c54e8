"""Selective copying as in the Mamba paper (arXiv 2312.00752): data tokens at random places among noise, then markers to answer at.

    . b . . a . c  M M M        ->        the targets at the markers are b a c

Noise is token 0, the marker the last token of the vocabulary, data lie between.
"""

from __future__ import annotations

import torch

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import Sample, Split, Task, distinct, integers, unasked


class SelectiveCopying(Task):
    """See the module\'s docstring."""

    vocab: int = 16
    """Noise, data and the marker."""
    context: int = 4096
    """Tokens before the markers."""
    copied: int = 16
    """Data tokens, and markers."""

    def check(self) -> None:
        self.at_least(vocab=3, copied=1)
        if self.context < self.copied:
            raise ConfigError(f"context: expected at least copied={self.copied}, got {self.context}")

    @property
    def length(self) -> int:
        return self.context + self.copied

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        places = distinct(batch, self.copied, 0, self.context, generator).sort(dim=1).values
        data = integers(1, self.vocab - 1, places.shape, generator)
        tokens, targets = torch.zeros(batch, self.length, dtype=torch.int64), unasked(batch, self.length)
        tokens.scatter_(1, places, data)
        tokens[:, self.context :] = self.vocab - 1
        targets[:, self.context :] = data
        return Sample(tokens, targets)
