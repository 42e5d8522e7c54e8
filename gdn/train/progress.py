"""How far a run is, and how fast it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gdn.train.metrics import Row
from gdn.train.step import Step


@dataclass
class Progress:
    """How far a run is. Part of every checkpoint."""

    step: int = 0
    """Updates done."""
    tokens: int = 0
    """Target tokens seen, by all processes."""
    seconds: float = 0.0
    """Wall time of the loop, over all its parts."""
    window_nats: float = 0.0
    """Sum of the loss since the last row of metrics, over tokens and in all."""
    window_tokens: int = 0
    window_bytes: int = 0
    losses: list[float] = field(default_factory=list)
    """The last few losses, for the message of an error."""

    def add(self, step: Step) -> None:
        """Count one update."""
        self.step += 1
        self.tokens += step.tokens
        self.window_nats += step.loss * step.tokens
        self.window_tokens += step.tokens
        self.window_bytes += step.num_bytes
        self.losses = [*self.losses[-4:], step.loss]

    def take_window(self) -> Row:
        """The mean loss since the last call."""
        row = {
            "loss/train": self.window_nats / self.window_tokens,
            "bits_per_byte/train": self.window_nats / math.log(2) / max(1, self.window_bytes),
        }
        self.window_nats, self.window_tokens, self.window_bytes = 0.0, 0, 0
        return row


@dataclass
class Speed:
    """Tokens and time of the updates since the last row, without validation and checkpoints."""

    tokens: int = 0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.tokens += tokens
        self.seconds += seconds

    def take(self) -> float:
        """Tokens per second since the last call."""
        rate = self.tokens / max(self.seconds, 1e-9)
        self.tokens, self.seconds = 0, 0.0
        return rate
