"""Runs a configuration and sends itself a signal in the middle: `python interrupted.py CONFIG.json SIGNAL STEP WHERE`.

WHERE is "step" (as the step ends) or "checkpoint" (when that step's checkpoint is written but not yet in its place).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from gdn.train import Trainer, checkpoint, trainer


def main() -> int:
    torch.set_num_threads(1)
    config = Trainer.Config.from_dict(json.loads(Path(sys.argv[1]).read_text()))
    number, at, where = signal.Signals[sys.argv[2]], int(sys.argv[3]), sys.argv[4]
    module, name = (trainer, "train_step") if where == "step" else (checkpoint, "write_synced")
    original, steps = getattr(module, name), 0

    def interrupted(*args: Any, **options: Any) -> Any:
        nonlocal steps
        if where == "step":
            result = original(*args, **options)
            steps += 1
            if steps == at:
                os.kill(os.getpid(), number)
            return result
        if args[0].name == checkpoint.MANIFEST and f"{at:08d}" in str(args[0]):
            os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(module, name, interrupted)
    return Trainer(config).run()


if __name__ == "__main__":
    sys.exit(main())
