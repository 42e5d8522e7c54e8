"""Group word problems (DeltaProduct, arXiv 2502.10297): the product of all elements read so far.

    BOS x1 x2 ... xn        ->        BOS x1  x1*x2  ...  x1*...*xn

Groups are Z<n> (addition modulo n), S<n> (permutations of n things) and A<n> (even ones); element 0 is the identity, and a product applies
its left factor first. The tokens are the elements and seven special ones, of which the first is BOS and the second fills gaps.

Variants: `limit=2` restricts what is read to permutations that move at most two things ("S5 only swaps"), `least=5` to those that move
at least five (of A5 the turns by a fifth or two of an icosahedron); `repeat=4` writes each element
four times and asks at the last ("S5 4 tokens"), `filler` writes it once and then three fillers.
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import Sample, Split, Task, integers, rows_of_split, unasked

SPECIAL = 7
LARGEST = {"Z": 1000, "S": 6, "A": 6}


@dataclass(frozen=True, eq=False)
class Group:
    """A finite group by its multiplication table."""

    table: Tensor
    """int64 `[n, n]`: `table[a, b]` is a * b; element 0 is the identity."""
    moved: Tensor
    """int64 `[n]`: how many things each element moves (permutations), 0 or 1 for the identity and the others of Z."""


@functools.cache
def group(name: str) -> Group:
    """A group by name: Z7, S3, A5."""
    kind, size = name[0], int(name[1:])
    if kind == "Z":
        numbers = torch.arange(size)
        return Group((numbers[:, None] + numbers) % size, (numbers > 0).long())
    elements = [p for p in itertools.permutations(range(size)) if kind == "S" or _is_even(p)]
    number = {p: i for i, p in enumerate(elements)}
    table = torch.tensor([[number[tuple(b[i] for i in a)] for b in elements] for a in elements])
    return Group(table, torch.tensor([sum(i != x for i, x in enumerate(p)) for p in elements]))


def _is_even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


class GroupWords(Task):
    """See the module\'s docstring."""

    divided = True

    group: str = "S3"
    """Z<n>, S<n> or A<n>."""
    elements: int = 128
    """Elements of a word."""
    limit: int | None = None
    """Read only elements that move at most this many things. None: all of them."""
    least: int = 0
    """Read only elements that move at least this many things."""
    repeat: int = 1
    """Tokens for each element; the product is asked for at the last of them."""
    filler: bool = False
    """The further tokens of an element are fillers and not the element again."""
    held_out: float = 1 / 16
    """Fraction of all words that only the test split has."""

    def check(self) -> None:
        self.at_least(elements=1, repeat=1)
        name = re.fullmatch(r"([ZSA])(\d+)", self.group)
        if not name or not 2 <= int(name[2]) <= LARGEST[name[1]]:
            raise ConfigError(f"group: expected Z2 to Z{LARGEST['Z']}, S2 to S{LARGEST['S']} or A2 to A{LARGEST['A']}, got {self.group}")
        if len(self.readable) < 2:
            moved = f"from {self.least} to {'all' if self.limit is None else self.limit}"
            raise ConfigError(f"limit, least: expected to leave two elements or more, got those of {self.group} that move {moved}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out: expected above 0 and below 1, got {self.held_out}")
        if min(self.held_out, 1 - self.held_out) * float(len(self.readable)) ** min(self.elements, 64) < 16:
            raise ConfigError(f"elements: expected enough for 16 different words in each split, got {self.elements}")

    @property
    def size(self) -> int:
        """Elements of the group."""
        return len(group(self.group).table)

    @property
    def readable(self) -> Tensor:
        """The elements that words are made of."""
        moved = group(self.group).moved
        return ((moved >= self.least) & (moved <= (self.size if self.limit is None else self.limit))).nonzero().flatten()

    @property
    def vocab(self) -> int:
        return self.size + SPECIAL

    @property
    def length(self) -> int:
        return 1 + self.elements * self.repeat

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        readable = self.readable
        words = rows_of_split(
            lambda count: readable[integers(0, len(readable), (count, self.elements), generator)], batch, split, self.held_out
        )
        bos = torch.full((batch, 1), self.size)
        repeated = words.repeat_interleave(self.repeat, dim=1)
        asked = unasked(batch, self.elements * self.repeat)
        asked[:, self.repeat - 1 :: self.repeat] = products(words, group(self.group).table)
        if self.filler:
            first = torch.arange(repeated.shape[1]) % self.repeat == 0
            repeated = repeated.where(first, self.size + 1)
        return Sample(torch.cat((bos, repeated), 1), torch.cat((bos, asked), 1))


def products(words: Tensor, table: Tensor) -> Tensor:
    """The product of the first t elements of each word, for every t."""
    state, states = torch.zeros_like(words[:, 0]), []
    for element in words.T:
        state = table[state, element]
        states.append(state)
    return torch.stack(states, dim=1)
