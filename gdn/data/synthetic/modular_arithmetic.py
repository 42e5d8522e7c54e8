"""Arithmetic modulo a number (Deletang et al., arXiv 2207.02098; Grazzi et al., arXiv 2411.12537): the value of an expression, at its "=".

Without brackets digits and operators alternate and multiplication goes first: `3 + 4 * 2 =`. With brackets an expression of a given number
of symbols is a digit, `-d`, `(d)`, `(-d)`, or `(A op B)` of two expressions, split at a uniform place.
"""

from __future__ import annotations

import numpy as np
import torch

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import Sample, Split, Task, numpy_generator, unasked

OPERATORS = "+-*"


class ModularArithmetic(Task):
    """See the module\'s docstring."""

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
        token = {symbol: i for i, symbol in enumerate(self.symbols)}
        tokens, targets = torch.zeros(batch, self.length, dtype=torch.int64), unasked(batch, self.length)
        for row in range(batch):
            text, value = self._with_brackets(rng) if self.brackets else self._flat(rng)
            tokens[row, : len(text) + 1] = torch.tensor([token[symbol] for symbol in text + "="])
            targets[row, len(text)] = token[str(value)]
        return Sample(tokens, targets)

    def _flat(self, rng: np.random.Generator) -> tuple[str, int]:
        digits = int(rng.integers(-(-self.shortest // 2), self.length // 2 + 1))
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

    def _with_brackets(self, rng: np.random.Generator) -> tuple[str, int]:
        text, value = self._expression(int(rng.integers(self.shortest - 1, self.length)), rng)
        return text, value % self.modulus

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
