"""Runs a configuration in a process that sends itself a signal in the middle."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from gdn.train import Trainer, checkpoint, report, trainer


def train(config: dict[str, Any], number: str, at: int, where: str) -> int:
    """`where` is "step" (as step `at` ends) or "checkpoint" (when its checkpoint is written but not yet in its place)."""
    torch.set_num_threads(1)
    report.has_package = lambda name: False  # a picture takes as long as the steps
    module, name = (trainer, "train_step") if where == "step" else (checkpoint, "write_synced")
    original, steps = getattr(module, name), 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal steps
        if where == "step":
            result = original(*args, **options)
            steps += 1
            if steps == at:
                os.kill(os.getpid(), signal.Signals[number])
            return result
        if args[0].name == checkpoint.MANIFEST and f"{at:08d}" in str(args[0]):
            os.kill(os.getpid(), signal.Signals[number])
        return original(*args, **options)

    setattr(module, name, interrupted)
    return Trainer(Trainer.Config.from_dict(config)).run()
