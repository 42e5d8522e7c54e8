"""Named shapes of the head's loss, for tests, the doctor and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of one call of `linear_cross_entropy`."""

    name: str
    tokens: tuple[int, ...]
    """Shape of targets."""
    D: int
    vocab: int
    ignored: float = 0.0
    """Share of tokens that do not count."""
    size: float = 1.0
    """Standard deviation of the logits."""

    def build(self, *, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> dict[str, Any]:
        """Arguments of `linear_cross_entropy`, the same numbers for every dtype and device up to rounding."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*self.tokens, self.D, generator=generator, dtype=torch.float64)
        weight = torch.randn(self.vocab, self.D, generator=generator, dtype=torch.float64) * self.size / self.D**0.5
        targets = torch.randint(self.vocab, self.tokens, generator=generator)
        targets[torch.rand(self.tokens, generator=generator) < self.ignored] = -100
        return {"x": x.to(device, dtype), "weight": weight.to(device, dtype), "targets": targets.to(device)}


PROBLEMS = (
    Problem(name="rows", tokens=(2, 21), D=16, vocab=50),
    Problem(name="some ignored", tokens=(33,), D=8, vocab=7, ignored=0.4),
    Problem(name="all ignored", tokens=(5,), D=8, vocab=7, ignored=1.1),
    Problem(name="sharp", tokens=(20,), D=8, vocab=30, size=60),
    Problem(name="one word", tokens=(4,), D=8, vocab=1),
    Problem(name="one token", tokens=(), D=8, vocab=12),
    Problem(name="no token", tokens=(2, 0), D=8, vocab=12),
)

BENCHMARKS = (
    Problem(name="bytes", tokens=(4096,), D=256, vocab=256),
    Problem(name="8k words", tokens=(2048,), D=256, vocab=8192),
    Problem(name="32k words", tokens=(1024,), D=512, vocab=32000),
)
