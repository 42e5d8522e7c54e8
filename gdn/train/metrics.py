"""The numbers of a run: one JSON object a line in `metrics.jsonl`, and TensorBoard when it is installed.

A row stands for one step: `step`, `loss/train` (nats per token, mean since the last row), `bits_per_byte/train`, `lr`, `grad_norm`,
`tokens_seen`, `tokens_per_second` (training alone), `seconds`, `memory/peak_gib`, after a validation `loss/val` and `bits_per_byte/val`,
and on GPUs of known peak `mfu`.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gdn.core.device import has_package, machine
from gdn.core.errors import CheckpointError
from gdn.train.checkpoint import untouched, write_synced

FILE = "metrics.jsonl"

Row = dict[str, float]

PEAK_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bfloat16 operations per second from the makers' data sheets, by a part of the device's name."""


class Metrics:
    """Writes rows, each at once, so that a killed run keeps what it printed."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continue a run that stands at `step`: rows of later steps are dropped, so that none stands twice."""
        self.path = folder / FILE
        folder.mkdir(parents=True, exist_ok=True)
        truncate(self.path, step)
        # Without a buffer nothing is left to fail again when the file is closed on a full disk.
        self.file = self.path.open("ab", buffering=0)
        self.board = _tensorboard(folder, step)

    def write(self, row: Row) -> None:
        """Append a row. Raises `CheckpointError` if the disk is full."""
        line = (json.dumps(row) + "\n").encode()
        try:
            if self.file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self.board is not None:
                for name, value in row.items():
                    if name != "step":
                        self.board.add_scalar(name, value, int(row["step"]))
        except OSError as error:
            raise CheckpointError(f"cannot write {self.path}: {error.strerror}{untouched(self.path.parent)}") from error

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def read(path: Path) -> Iterator[Row]:
    """The rows of a metrics file. A last line that a killed process left unfinished is passed over."""
    if not path.exists():
        return
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return


def truncate(path: Path, step: int) -> None:
    """Drop the rows after a step, and an unfinished last line. The file is replaced whole."""
    if not path.exists():
        return
    write_synced(path, "".join(json.dumps(row) + "\n" for row in read(path) if row["step"] <= step))


def utilisation(flops_per_second: float, device: torch.device, processes: int = 1) -> float | None:
    """Model FLOPs utilisation: the part of the devices' bfloat16 peak that the model's own arithmetic takes. None on unknown devices."""
    if device.type != "cuda":
        return None
    name = machine().name
    peak = next((peak for part, peak in PEAK_BF16.items() if part in name), None)
    return None if peak is None else flops_per_second / (peak * processes)


def _tensorboard(folder: Path, step: int) -> Any:
    if not has_package("tensorboard"):
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
