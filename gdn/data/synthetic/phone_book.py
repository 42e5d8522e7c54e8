"""Phone book (Jelassi et al., arXiv 2402.01032): a list of names and numbers, some look-ups as examples, then one to answer.

    first last : 5 5 0 1 ; first last : ... ;   ?  first last : 5 5 0 1 ;   ...        digits of look-ups are the targets

Names are pairs of a first and a last name, each pair once in a book. The look-ups ask for different entries; training asks for all of them,
the test for the last, so that the others are examples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import IGNORE, Sample, Split, Task, distinct, integers

COLON, END, ASK = 10, 11, 12
NAMES = 13
"""Tokens 0 to 9 are digits; names begin here."""


class PhoneBook(Task):
    """See the module\'s docstring."""

    entries: int = 20
    """Entries of a book."""
    digits: int = 7
    """Digits of a number."""
    names: int = 64
    """First names, and last names."""
    lookups: int = 3
    """Look-ups after the book."""

    def check(self) -> None:
        self.at_least(entries=1, digits=1, names=1, lookups=1)
        if self.entries > self.names**2:
            raise ConfigError(f"entries: expected at most names ** 2 = {self.names**2}, got {self.entries}")
        if self.lookups > self.entries:
            raise ConfigError(f"lookups: expected at most entries={self.entries}, got {self.lookups}")

    @property
    def vocab(self) -> int:
        return NAMES + 2 * self.names

    @property
    def length(self) -> int:
        return self.entries * (self.digits + 4) + self.lookups * (self.digits + 5) - 1

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        name = distinct(batch, self.entries, 0, self.names**2, generator)
        numbers = integers(0, 10, (batch, self.entries, self.digits), generator)
        book = self._lines(name, numbers)
        asked = distinct(batch, self.lookups, 0, self.entries, generator)
        chosen = numbers.gather(1, asked.unsqueeze(-1).expand(-1, -1, self.digits))
        answers = self._lines(name.gather(1, asked), chosen)
        questions = torch.cat((torch.full((batch, self.lookups, 1), ASK), answers), dim=2)
        wanted = torch.full_like(questions, IGNORE)
        first = 0 if split == "train" else self.lookups - 1
        wanted[:, first:, 4:-1] = chosen[:, first:]
        tokens = torch.cat((book.flatten(1), questions.flatten(1)), dim=1)
        targets = torch.cat((torch.full_like(book, IGNORE).flatten(1), wanted.flatten(1)), dim=1)
        return Sample(tokens[:, :-1], targets[:, 1:])

    def _lines(self, name: Tensor, numbers: Tensor) -> Tensor:
        """`first last : digits ;` for each entry: `[B, entries, digits + 4]`."""
        first, last = NAMES + name // self.names, NAMES + self.names + name % self.names
        colon, end = torch.full_like(first, COLON), torch.full_like(first, END)
        return torch.cat((torch.stack((first, last, colon), dim=-1), numbers, end.unsqueeze(-1)), dim=-1)
