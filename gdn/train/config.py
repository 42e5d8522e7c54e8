"""The configuration of a run, and what of it may change when the run is resumed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from gdn.core.config import Config
from gdn.core.errors import ConfigError
from gdn.data import DataConfig
from gdn.models.lm import LM
from gdn.train.checkpoint import Checkpoints
from gdn.train.optim import AdamW
from gdn.train.schedule import Schedule
from gdn.train.step import Precision

MAY_CHANGE = (
    *("steps", "time_limit_s", "directory", "resume", "device", "compile", "recompute"),
    *("log_every", "validate_every", "validation_tokens", "sample_tokens", "prompt", "checkpoints", "data.prefetch"),
)
"""What a resumed run may give anew; all else must be as in the checkpoint. device, compile and recompute change the rounding."""


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
    """Compile the model with torch.compile, equal blocks once (`LM.compile_blocks`)."""
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


def first_difference(saved: dict[str, Any], given: dict[str, Any]) -> str | None:
    """`optim.lr was 0.1 and is now 0.2`: the first field in which two configurations (`to_dict`) differ and that may not change."""
    before, now = dict(_leaves(saved)), dict(_leaves(given))
    for name in sorted(before.keys() | now.keys()):
        parts = name.split(".")
        if any(".".join(parts[:n]) in MAY_CHANGE for n in (1, 2)):
            continue
        if name not in before or name not in now or before[name] != now[name]:
            return f"{name} was {before.get(name, 'absent')} and is now {now.get(name, 'absent')}"
    return None


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every scalar of nested dictionaries and lists by its dotted path."""
    if isinstance(value, dict | list) and value:
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{path}.{name}" if path else str(name))
    else:
        yield path, value
