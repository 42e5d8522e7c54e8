"""RegBench, in-context learning of regular languages (Akyurek et al., arXiv 2401.12973): every sequence has an automaton of its own.

A sequence is 10 to 19 random words of one random automaton with `|` between them. An automaton has 4 to 12 states (before equivalent ones
are merged), an alphabet of 4 to 18 of the 18 symbols, and 1 to 3 transitions out of each state, to different other states and with
different symbols. A word begins in state 0 and takes 1 to 49 uniform transitions. Every next symbol is asked for, `|` and padding are not;
the true distribution of the next symbol comes along. Training and test have different automata.
"""

from __future__ import annotations

import numpy as np
import torch

from gdn.core.errors import ConfigError
from gdn.data.order import key as content_key
from gdn.data.synthetic.base import IGNORE, Sample, Split, Task, numpy_generator, on_split, unasked

Automaton = tuple[dict[int, int], ...]
"""The transitions of each state: symbol to next state. States are numbered in the order of a breadth-first walk by ascending symbols."""


class RegBench(Task):
    """See the module\'s docstring."""

    divided = True

    vocab: int = 20
    """Symbols, the separator and padding."""
    length: int = 1024
    """Tokens after which a sequence is cut; shorter ones are padded."""
    states: tuple[int, int] = (4, 12)
    """Fewest and most states."""
    alphabet: tuple[int, int] = (4, 18)
    """Fewest and most symbols of an automaton."""
    out: int = 3
    """Most transitions out of a state."""
    words: tuple[int, int] = (10, 19)
    """Fewest and most words."""
    word_length: tuple[int, int] = (1, 49)
    """Fewest and most symbols of a word."""
    held_out: float = 1 / 8
    """Fraction of all automata that only the test split has."""

    def check(self) -> None:
        self.at_least(length=1, out=1)
        for name, least in (("states", 2), ("alphabet", 1), ("words", 1), ("word_length", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ConfigError(f"{name}: expected {least} <= fewest <= most, got {low} and {high}")
        if self.alphabet[1] > self.vocab - 2:
            raise ConfigError(f"alphabet: expected at most vocab - 2 = {self.vocab - 2} symbols, got {self.alphabet[1]}")
        if not 0 < self.held_out < 1:
            raise ConfigError(f"held_out: expected above 0 and below 1, got {self.held_out}")

    @property
    def separator(self) -> int:
        """The token between words."""
        return self.vocab - 2

    @property
    def padding(self) -> int:
        """The token after the last word."""
        return self.vocab - 1

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        rng = numpy_generator(generator)
        tokens, targets = torch.full((batch, self.length), self.padding), unasked(batch, self.length)
        truth = torch.zeros(batch, self.length, self.vocab)
        for row in range(batch):
            automaton = self.automaton(rng, split)
            symbols, states = (torch.tensor(part) for part in self._text(automaton, rng))
            count = min(len(symbols) - 1, self.length)
            tokens[row, :count] = symbols[:count]
            symbols, states = symbols[1 : count + 1], states[1 : count + 1]
            targets[row, :count] = symbols.where(states >= 0, IGNORE)
            truth[row, :count] = self._next_symbols(automaton)[states]
        return Sample(tokens, targets, truth)

    def automaton(self, rng: np.random.Generator, split: Split) -> Automaton:
        """A random automaton of a split, minimal and without states that cannot be reached."""
        while True:
            found = minimal(self._any_automaton(rng))
            if on_split(np.array([content_key(repr(found).encode())], dtype=np.uint64), split, self.held_out)[0]:
                return found

    def _any_automaton(self, rng: np.random.Generator) -> list[dict[int, int]]:
        states = int(rng.integers(self.states[0], self.states[1] + 1))
        size = int(rng.integers(self.alphabet[0], self.alphabet[1] + 1))
        symbols = rng.choice(self.vocab - 2, size=size, replace=False)
        transitions = []
        for state in range(states):
            count = min(int(rng.integers(1, self.out + 1)), size, states - 1)
            others = [other for other in range(states) if other != state]
            chosen = rng.choice(symbols, size=count, replace=False).tolist()
            transitions.append(dict(zip(chosen, rng.choice(others, size=count, replace=False).tolist())))
        return transitions

    def _text(self, automaton: Automaton, rng: np.random.Generator) -> tuple[list[int], list[int]]:
        """Words with separators, and for each token the state that it was drawn in, -1 for a separator."""
        choices = [list(out.items()) for out in automaton]
        symbols: list[int] = []
        states: list[int] = []
        for length in rng.integers(self.word_length[0], self.word_length[1] + 1, size=rng.integers(self.words[0], self.words[1] + 1)):
            symbols.append(self.separator)
            states.append(-1)
            state = 0
            for uniform in rng.random(length).tolist():
                states.append(state)
                symbol, state = choices[state][int(uniform * len(choices[state]))]
                symbols.append(symbol)
        return symbols[1:], states[1:]

    def _next_symbols(self, automaton: Automaton) -> torch.Tensor:
        """The distribution of the next symbol in each state, `[states + 1, vocab]`; the last row, of separators, is zero."""
        table = torch.zeros(len(automaton) + 1, self.vocab)
        for state, out in enumerate(automaton):
            table[state, list(out)] = 1 / len(out)
        return table


def minimal(transitions: list[dict[int, int]]) -> Automaton:
    """The smallest automaton with the same words from state 0; every state accepts. Equal languages give equal automata."""
    block = [0] * len(transitions)
    while True:
        looks = [tuple(sorted((symbol, block[state]) for symbol, state in out.items())) for out in transitions]
        known = {look: i for i, look in enumerate(dict.fromkeys(looks))}
        refined = [known[look] for look in looks]
        if len(known) == len(set(block)):
            break
        block = refined
    number, queue, result = {block[0]: 0}, [0], []
    for state in queue:
        out = {}
        for symbol in sorted(transitions[state]):
            target = transitions[state][symbol]
            if block[target] not in number:
                number[block[target]] = len(number)
                queue.append(target)
            out[symbol] = number[block[target]]
        result.append(out)
    return tuple(result)
