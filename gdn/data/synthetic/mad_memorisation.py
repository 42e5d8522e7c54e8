"""MAD, memorisation (arXiv 2403.17844): a fixed map from keys to values that has to be learned by heart.

    k1 ? k2 ? ...        the target at each ? is the value of the key before it

The map is the same in every sequence of both splits: what is tested is storage in the parameters, not in the state.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import Sample, Split, Task, integers, unasked
from gdn.data.synthetic.mqar import interleave


class Memorisation(Task):
    """See the module\'s docstring."""

    vocab: int = 256
    """Keys are the lower half, values the upper half; the last token is the question mark."""
    length: int = 32
    """Tokens, even."""
    map_seed: int = 12345
    """Seed of the map."""

    def check(self) -> None:
        self.at_least(vocab=3, length=2, map_seed=0)
        if self.length % 2:
            raise ConfigError(f"length: expected an even number, got {self.length}")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        value_of = values(self.vocab, self.map_seed)
        keys = integers(0, len(value_of), (batch, self.length // 2), generator)
        targets = unasked(batch, self.length)
        targets[:, 1::2] = value_of[keys]
        return Sample(interleave(keys, torch.full_like(keys, self.vocab - 1)), targets)


@functools.cache
def values(vocab: int, seed: int) -> Tensor:
    """The value of each key: different ones."""
    keys = (vocab - 1) // 2
    return torch.from_numpy(np.random.default_rng(seed).permutation(np.arange(keys, vocab - 1))[:keys])
