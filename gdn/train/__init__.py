"""Training: `Trainer(Trainer.Config(...)).run()`."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "AdamW": "optim",
    "Checkpoints": "checkpoint",
    "Schedule": "schedule",
    "Trainer": "trainer",
    "train_step": "step",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gdn.train.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
