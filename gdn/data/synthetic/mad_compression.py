"""MAD, compression (arXiv 2403.17844): read random tokens, then a last one that says: now decode the whole sequence from here.

The targets are the tokens themselves, and a decoder may look at nothing but the hidden state of the last place (`from_last`).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from gdn.data.synthetic.base import Sample, Split, Task, integers


class Compression(Task):
    """See the module\'s docstring."""

    from_last: ClassVar[bool] = True
    vocab: int = 16
    """Tokens; the last of them ends the sequence."""
    length: int = 32
    """Tokens with the last."""

    def check(self) -> None:
        self.at_least(vocab=2, length=2)

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        tokens = integers(0, self.vocab - 1, (batch, self.length), generator)
        tokens[:, -1] = self.vocab - 1
        return Sample(tokens, tokens.clone())
