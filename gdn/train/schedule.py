"""The learning rate: linear warm-up, then a cosine. A pure function of the step, so there is no state to save or to lose."""

from __future__ import annotations

import math

from gdn.core.config import Config
from gdn.core.errors import ConfigError


class Schedule(Config):
    """Linear warm-up from zero to the peak, then half a cosine down to a fraction of it at the last step."""

    warmup: int = 100
    """Steps of warm-up."""
    final_fraction: float = 0.1
    """Learning rate at the end, as a fraction of the peak."""

    def check(self) -> None:
        if self.warmup < 0:
            raise ConfigError(f"warmup: expected 0 or more, got {self.warmup}")
        if not 0 <= self.final_fraction <= 1:
            raise ConfigError(f"final_fraction: expected from 0 to 1, got {self.final_fraction}")

    def factor(self, step: int, steps: int, at: float | None = None) -> float:
        """The learning rate of update `step` (0 is the first) of `steps`, as a fraction of the peak.

            min(1, (step + 1) / warmup) * [final + (1 - final) (1 + cos(pi t)) / 2]        t = (at - warmup) / (steps - warmup) in [0, 1]

        `at` is where the run stands on the cosine, by default `step`; a run limited by time stands at `position`.
        """
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        t = ((step if at is None else at) - self.warmup) / max(1, steps - self.warmup)
        t = min(1.0, max(0.0, t))
        return warm * (self.final_fraction + (1 - self.final_fraction) * (1 + math.cos(math.pi * t)) / 2)


def position(step: int, steps: int, elapsed: float, limit: float | None) -> float:
    """Where a run stands on the cosine, in steps: the further of its steps and, with a time limit, of its time.

    A run that the clock will stop so ends with the learning rate of the end, however fast the machine is. Warm-up always counts steps.
    Without a limit this is the step itself.
    """
    return step if limit is None else max(step, steps * min(1.0, elapsed / limit))
