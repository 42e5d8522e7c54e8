"""What an experiment is: runs that are compared, what was published about them, and a picture."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from gdn.core.config import Config
from gdn.core.errors import ConfigError
from gdn.data.synthetic.base import Task
from gdn.models.lm import LM
from gdn.train.optim import AdamW
from gdn.train.schedule import Schedule
from gdn.train.step import Precision

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
"""A finished run, a line of results.jsonl. See `learn`."""
Order = Literal["turns", "stages"]
Measure = Literal["tokens", "sequences", "classes", "legal", "distance"]


class Training(Config):
    """How a run learns its task."""

    steps: int
    """Updates; the schedule ends there."""
    batch: int
    """Sequences of an update."""
    optim: AdamW = AdamW(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.0)
    """The optimizer."""
    schedule: Schedule = Schedule(warmup=50, final_fraction=0.0)
    """The learning rate over the run."""
    order: Order = "turns"
    """turns: a batch of each task in turn. stages: one task after another, each for an equal share of the steps."""
    examples: int | None = None
    """Size of a fixed training set, gone through in a new order each time. None: every batch is new."""
    clip: float | None = 1.0
    """Largest norm of the gradient."""
    precision: Precision = "fp32"
    """"bf16" computes matrix products in bfloat16."""
    check_every: int = 100
    """Steps between looks at the first test."""
    enough: float | None = None
    """Stop when the first test has this score at two looks in a row."""

    def check(self) -> None:
        for name in ("steps", "batch", "check_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.examples is not None and self.examples < self.batch:
            raise ConfigError(f"examples: expected at least batch={self.batch}, got {self.examples}")


class Test(Config):
    """One number that a trained model is judged by, on sequences that are the same for all models."""

    __test__ = False  # not for pytest
    name: str
    """Its column in tables."""
    task: Task
    """What is asked; the test split is drawn from."""
    measure: Measure = "tokens"
    """tokens: the fraction of targets that the likeliest token hits. sequences: the fraction of sequences with all targets hit.
    classes: the mean over classes of the fraction hit. legal: the fraction of likeliest tokens that can follow.
    distance: the mean total variation between the model's distribution and the true one."""
    examples: int = 512
    """Sequences."""
    batch: int = 64
    """Sequences at a time."""

    def check(self) -> None:
        for name in ("examples", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")


class Run(Config):
    """One training of one model."""

    series: str
    """The model's name, a line of the plot."""
    x: float | str = ""
    """What is varied, if anything."""
    seed: int = 0
    """Of parameters and data."""
    model: LM.Config
    """The model; its vocabulary is that of the task."""
    tasks: tuple[Task, ...]
    """What is learned, in the order of the training."""
    training: Training
    """How."""
    tests: tuple[Test, ...]
    """What is measured at the end, the first one on the way too."""

    def check(self) -> None:
        if not self.tests or not self.tasks:
            raise ConfigError(f"{'tests' if self.tasks else 'tasks'}: expected at least one")
        for task in (*self.tasks, *(test.task for test in self.tests)):
            if task.vocab != self.model.vocab:
                raise ConfigError(f"model.vocab: expected {task.vocab} as in {type(task).__name__}, got {self.model.vocab}")

    @property
    def key(self) -> str:
        """Stands for everything of the configuration, not for the version of the code; a run with a known key is not repeated."""
        return hashlib.blake2b(json.dumps(self.to_dict(), sort_keys=True).encode(), digest_size=8).hexdigest()

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.series}{f', {self.x:g}' if isinstance(self.x, float) else f', {self.x}' if self.x else ''}, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A claim and the runs that test it."""

    name: str
    claim: str
    """One sentence."""
    runs: Callable[[bool], Sequence[Run]]
    """All runs. True: toy sizes, a few steps of each model on a CPU, to see that everything works."""
    figure: Callable[[Sequence[Row]], Figure]
    """The picture."""
    later: Callable[[Run], bool] = lambda run: False
    """Runs that wait until all others have been done: those that say least for their time."""
    x_name: str = ""
    """What is varied."""
    published: Mapping[str, str] = field(default_factory=dict)
    """Published figures by series, or by series and x as in "DeltaNet, recall"."""
    source: str = ""
    """Where they are from."""
