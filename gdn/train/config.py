"""The configuration of a run, and what of it may change when the run is resumed."""

from __future__ import annotations

from typing import Any, Literal

from gdn.core.config import Config
from gdn.core.errors import ConfigError
from gdn.data import DataConfig
from gdn.models.lm import LM
from gdn.train.checkpoint import Checkpoints
from gdn.train.optim import AdamW
from gdn.train.schedule import Schedule
from gdn.train.step import Precision

MAY_CHANGE = ("steps", "time_limit_s", "directory", "resume", "device", "compile", "recompute", "checkpoints", "prompt")
MAY_CHANGE += ("log_every", "validate_every", "validation_tokens", "sample_tokens")
"""Fields that a resumed run may give anew. All others must be those of the checkpoint."""


class TrainerConfig(Config):
    """A whole training run."""

    model: LM.Config
    """The model."""
    data: DataConfig
    """Text, tokenizer, length of a row and rows in a micro-batch."""
    optim: AdamW = AdamW()
    """The optimizer."""
    schedule: Schedule = Schedule()
    """The learning rate over the run."""
    checkpoints: Checkpoints = Checkpoints()
    """When to save, and how many to keep."""
    steps: int = 1000
    """Updates in the whole run; the schedule ends there."""
    time_limit_s: float | None = None
    """Seconds of training after which the run ends, saved and exported, even before `steps`. The cosine follows whichever is further."""
    accumulate: int = 1
    """Micro-batches in one update; it is the same update as with one batch of their size."""
    clip: float | None = 1.0
    """Largest norm of the gradient; longer ones are scaled down. None: no limit."""
    precision: Precision = "fp32"
    """"bf16" computes matrix products in bfloat16; parameters, gates, states and sums stay float32."""
    recompute: Literal["none", "block"] = "none"
    """"block" keeps only each block's input for the backward pass and computes the rest again: less memory, a third more arithmetic."""
    compile: bool = False
    """Compile the model with torch.compile."""
    seed: int = 0
    """Seed of the initial parameters. The order of the data has its own, `data.seed`."""
    device: str = "auto"
    """"cpu", "cuda" or "auto": the GPU when there is one."""
    directory: str = "runs/latest"
    """Where everything goes: metrics.jsonl, checkpoints, loss.png, the exported model."""
    resume: bool = True
    """Continue from the last whole checkpoint in the directory. False refuses a directory that has one."""
    log_every: int = 10
    """Steps between rows of metrics."""
    validate_every: int = 250
    """Steps between validations; there is one more at the end. 0: only that one."""
    validation_tokens: int = 65_536
    """Tokens of held-out text in a validation; 0: no validation."""
    sample_tokens: int = 256
    """Tokens that the model writes at the end; 0: none."""
    prompt: str = ""
    """What it continues. Empty: it starts a document."""

    def check(self) -> None:
        for name in ("steps", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
        for name in ("validate_every", "validation_tokens", "sample_tokens"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name}: expected 0 or more, got {getattr(self, name)}")
        for name in ("time_limit_s", "clip"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ConfigError(f"{name}: expected above 0 or none, got {getattr(self, name)}")


def first_difference(saved: Any, given: Any, path: str = "") -> str | None:
    """The first field in which two configurations differ, `name: saved a, given b`; those that `MAY_CHANGE` are left out."""
    if isinstance(saved, dict) and isinstance(given, dict):
        for name in sorted(saved.keys() | given.keys()):
            if path or name not in MAY_CHANGE:
                inner = first_difference(saved.get(name), given.get(name), f"{path}.{name}" if path else name)
                if inner:
                    return inner
        return None
    if isinstance(saved, list) and isinstance(given, list) and len(saved) == len(given):
        differences = (first_difference(a, b, f"{path}.{i}") for i, (a, b) in enumerate(zip(saved, given)))
        return next((d for d in differences if d), None)
    return None if saved == given else f"{path} was {saved!r} and is now {given!r}"
