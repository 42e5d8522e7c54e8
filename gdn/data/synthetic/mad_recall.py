"""MAD, in-context recall (arXiv 2403.17844): keys and values alternate, a key has the same value all through its sequence.

Keys are the lower half of the vocabulary, values the upper half; noise tokens, if any, have the highest numbers. The last pair repeats a
key that came before. Training predicts every next token; the test asks for the values whose key has come before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import IGNORE, Sample, Split, Task, integers
from gdn.data.synthetic.mqar import interleave


class InContextRecall(Task):
    """See the module\'s docstring."""

    vocab: int = 16
    """Keys, values and noise tokens."""
    length: int = 128
    """Tokens of a sequence, even. The last one is only a target, so a batch has length - 1."""
    noise_vocab: int = 0
    """How many of the tokens are noise."""
    noise: float = 0.0
    """Fraction of the pairs that are two noise tokens."""

    def check(self) -> None:
        self.at_least(noise_vocab=0, length=4, vocab=self.noise_vocab + 2)
        self.fraction("noise")
        if self.length % 2:
            raise ConfigError(f"length: expected an even number, got {self.length}")
        if self.noise and not self.noise_vocab:
            raise ConfigError("noise_vocab: expected at least 1 where there is noise, got 0")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        real, pairs = self.vocab - self.noise_vocab, self.length // 2 - 1
        half = real // 2
        value_of = integers(half, real, (batch, half), generator)
        keys = integers(0, half, (batch, pairs), generator)
        # One pair is never noise, so that there is something to recall.
        is_noise = torch.rand(batch, pairs, generator=generator) < self.noise
        is_noise.scatter_(1, integers(0, pairs, (batch, 1), generator), False)
        shown = torch.zeros(batch, half).scatter_reduce_(1, keys, (~is_noise).float(), "amax") > 0
        probe = torch.multinomial(shown.float(), 1, generator=generator)
        keys, is_noise = torch.cat((keys, probe), 1), torch.cat((is_noise, torch.zeros(batch, 1, dtype=torch.bool)), 1)
        first, second = keys, value_of.gather(1, keys)
        if self.noise:
            first = first.where(~is_noise, integers(real, self.vocab, first.shape, generator))
            second = second.where(~is_noise, integers(real, self.vocab, first.shape, generator))
        tokens = interleave(first, second)
        if split == "train":
            return Sample(tokens[:, :-1], tokens[:, 1:])
        known = seen_before(keys.masked_fill(is_noise, -1)) & ~is_noise
        asked = interleave(torch.full_like(second, IGNORE), second.where(known, IGNORE))
        return Sample(tokens[:, :-1], asked[:, 1:])


def seen_before(rows: Tensor) -> Tensor:
    """Which places of `[B, n]` hold a number that stands further left in the same row too."""
    equal = rows.unsqueeze(2) == rows.unsqueeze(1)
    return equal.tril(-1).any(dim=2)
