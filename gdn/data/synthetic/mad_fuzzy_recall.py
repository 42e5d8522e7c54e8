"""MAD, fuzzy in-context recall (arXiv 2403.17844): keys and values are motifs of one to three tokens.

A motif is a sequence of different tokens, keys from one half of the vocabulary and values from the other; the last token of the vocabulary
pads on the left. The key asked for at the end has been shown at a random place. Training predicts every next token; the test shows keys of
the largest size only and asks for the values of keys that came before.
"""

from __future__ import annotations

import numpy as np
import torch

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import IGNORE, Sample, Split, Task, numpy_generator

Motif = tuple[int, ...]


class FuzzyRecall(Task):
    """See the module\'s docstring."""

    vocab: int = 16
    """Tokens of keys and of values, and one for padding."""
    length: int = 128
    """Tokens."""
    motif: int = 3
    """Most tokens of a key or of a value."""

    def check(self) -> None:
        self.at_least(motif=1, vocab=2 * self.motif + 1)
        if self.length < 6 * self.motif:
            raise ConfigError(f"length: expected at least 6 * motif = {6 * self.motif}, got {self.length}")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        rng = numpy_generator(generator)
        rows = [self._row(rng, split) for _ in range(batch)]
        tokens, asked = (torch.tensor(part) for part in zip(*rows))
        return Sample(tokens[:, :-1], tokens[:, 1:] if split == "train" else asked[:, 1:])

    def _row(self, rng: np.random.Generator, split: Split) -> tuple[list[int], list[int]]:
        half, real = (self.vocab - 1) // 2, self.vocab - 1
        smallest = 1 if split == "train" else self.motif
        probe = self._motif(rng, 0, half, smallest)
        value_of: dict[Motif, Motif] = {probe: self._motif(rng, half, real, 1)}
        shown: set[Motif] = set()
        tokens: list[int] = []
        asked: list[int] = []

        def show(key: Motif) -> None:
            value = value_of.setdefault(key, self._motif(rng, half, real, 1))
            tokens.extend(key + value)
            asked.extend([IGNORE] * len(key) + [token if key in shown else IGNORE for token in value])
            shown.add(key)

        # Before each pair and the last one there must be room for the largest pair.
        room = self.length + 1 - 2 * self.motif - len(probe + value_of[probe])
        probe_at = int(rng.integers(room - 2 * self.motif))
        while len(tokens) <= room:
            show(probe if len(tokens) >= probe_at and probe not in shown else self._motif(rng, 0, half, smallest))
        show(probe)
        missing = self.length + 1 - len(tokens)
        return [real] * missing + tokens, [IGNORE] * missing + asked

    def _motif(self, rng: np.random.Generator, low: int, high: int, smallest: int) -> Motif:
        size = int(rng.integers(smallest, self.motif + 1))
        return tuple((low + rng.choice(high - low, size=size, replace=False)).tolist())
