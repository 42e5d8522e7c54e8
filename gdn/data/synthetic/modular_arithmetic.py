"""Arithmetic modulo a number (Deletang et al., arXiv 2207.02098; Grazzi et al., arXiv 2411.12537): the value of an expression, at its "=".

Without brackets digits and operators alternate and multiplication goes first: `3 + 4 * 2 =`. With brackets an expression of a given number
of symbols is a digit, `-d`, `(d)`, `(-d)`, or `(A op B)` of two expressions, split at a uniform place.
One expression in eight of each length is the test's alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from gdn.core.errors import ConfigError
from gdn.data.order import Keys
from gdn.data.synthetic.base import FEW, FEWEST, Sample, Split, Task, borders, numpy_generator, rows_of_sizes, unasked

OPERATORS = "+-*"


class ModularArithmetic(Task):
    """See the module\'s docstring."""

    divided = True

    length: int = 40
    """Most tokens of a sequence, with the "="."""
    shortest: int = 4
    """Fewest tokens."""
    modulus: int = 5
    """Digits are 0 to modulus - 1; at most 10."""
    brackets: bool = False
    """Expressions with brackets."""
    operators: str = OPERATORS
    """Operators to draw from. The published task with brackets has "+-"."""

    def check(self) -> None:
        self.at_least(shortest=2)
        if not 2 <= self.modulus <= 10:
            raise ConfigError(f"modulus: expected from 2 to 10, got {self.modulus}")
        least = self.shortest if self.brackets else self.shortest + self.shortest % 2
        if self.length < least:
            raise ConfigError(f"length: expected at least {least} (without brackets the number of tokens is even), got {self.length}")
        two_digits = 6 if self.brackets else 3
        if self.modulus < FEWEST and self.shortest < two_digits:
            raise ConfigError(
                f"shortest: expected at least {two_digits} for modulus={self.modulus}, since the splits share no expression and of single "
                f"digits there are fewer than {FEWEST}, got {self.shortest}"
            )
        if not self.operators or set(self.operators) - set(OPERATORS) or len(set(self.operators)) < len(self.operators):
            raise ConfigError(f'operators: expected some of "{OPERATORS}", each once, got "{self.operators}"')

    @property
    def symbols(self) -> str:
        """The symbol of each token; the first is padding."""
        return "." + "0123456789"[: self.modulus] + OPERATORS + "=" + "()" * self.brackets

    @property
    def vocab(self) -> int:
        return len(self.symbols)

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        rng = numpy_generator(generator)
        if self.brackets:
            sizes = rng.integers(self.shortest, self.length + 1, size=batch)
        else:
            sizes = 2 * rng.integers(-(-self.shortest // 2), self.length // 2 + 1, size=batch)
        answers = torch.zeros(batch, dtype=torch.int64)

        def draw(rows: Tensor) -> Tensor:
            drawn = [(self._expression if self.brackets else self._flat)(int(size) - 1, rng) for size in sizes[rows.numpy()]]
            answers[rows] = torch.tensor([1 + value % self.modulus for _, value in drawn])
            return self._tokens([text for text, _ in drawn])

        tokens = rows_of_sizes(draw, torch.from_numpy(sizes), split, self._borders())
        targets = unasked(batch, self.length)
        targets[torch.arange(batch), torch.from_numpy(sizes) - 1] = answers
        return Sample(tokens, targets)

    def _tokens(self, texts: list[str]) -> Tensor:
        """Expressions with their "=", filled up."""
        token = {symbol: i for i, symbol in enumerate(self.symbols)}
        return torch.tensor([[token[symbol] for symbol in (text + "=").ljust(self.length, ".")] for text in texts])

    @functools.cache  # noqa: B019  a frozen configuration
    def _borders(self) -> Keys:
        few = {}
        for size in range(self.shortest, self.length + 1):
            texts = list(itertools.islice(self._expressions(size - 1), FEW))
            if len(texts) == FEW:
                break
            if texts:
                few[size] = self._tokens(texts)
        return borders(self.length, few)

    def _expressions(self, length: int) -> Iterator[str]:
        """All expressions of this length."""
        digits = self.symbols[1 : 1 + self.modulus]
        if not self.brackets:
            if length % 2:
                yield from map("".join, itertools.product(digits, *(self.operators, digits) * (length // 2)))
        elif length < 5:
            text = "-{}" if length in (2, 4) else "{}"
            yield from map((f"({text})" if length > 2 else text).format, digits)
        else:
            for first in range(1, length - 3):
                for left in self._expressions(first):
                    for right in self._expressions(length - 3 - first):
                        yield from (f"({left}{operator}{right})" for operator in self.operators)

    def _flat(self, length: int, rng: np.random.Generator) -> tuple[str, int]:
        digits = length // 2 + 1
        terms = rng.integers(self.modulus, size=digits).tolist()
        text, total, product = str(terms[0]), 0, terms[0]
        for term in terms[1:]:
            operator = self.operators[rng.integers(len(self.operators))]
            text += f"{operator}{term}"
            if operator == "*":
                product = product * term % self.modulus
            else:
                total, product = total + product, term if operator == "+" else -term
        return text, (total + product) % self.modulus

    def _expression(self, length: int, rng: np.random.Generator) -> tuple[str, int]:
        if length < 5:
            digit = int(rng.integers(self.modulus))
            text = f"-{digit}" if length in (2, 4) else str(digit)
            return (f"({text})" if length > 2 else text), -digit if length in (2, 4) else digit
        first = int(rng.integers(1, length - 3))
        left, a = self._expression(first, rng)
        right, b = self._expression(length - 3 - first, rng)
        operator = self.operators[rng.integers(len(self.operators))]
        value = {"+": a + b, "-": a - b, "*": a * b}[operator]
        return f"({left}{operator}{right})", value % self.modulus
