"""Sequences drawn once: training sets and tests, shared by the runs that use the same, and by processes through a folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from pathlib import Path

import torch

from gdn.data.synthetic.base import Sample, Split, Task
from gdn.experiments.definition import Test

TEST_SEED = 20_000
AT_A_TIME = 256
"""Sequences of a training set that are drawn together."""


class Sets:
    """Draws sequences, or finds them where they have been drawn before.

    Args:
        folder: where drawn sequences are kept for other processes and later runs. None: they are drawn again each time.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def training(self, task: Task, examples: int, seed: int) -> Sample:
        """A fixed training set."""
        return self._get(task, examples, AT_A_TIME, seed, "train")

    def test(self, test: Test) -> Sample:
        """The sequences of a test; they depend on the test only."""
        return self._get(test.task, test.examples, test.batch, TEST_SEED, "test")

    def being_drawn(self, task: Task, examples: int, seed: int) -> bool:
        """Whether another process is drawing this training set now, so that asking for it means waiting."""
        if self.folder is None:
            return False
        file = self._file(self.folder, task, examples, AT_A_TIME, seed, "train")
        with open(file.with_suffix(".lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return not file.exists()
        return False

    @staticmethod
    def _file(folder: Path, task: Task, examples: int, at_a_time: int, seed: int, split: Split) -> Path:
        described = json.dumps([task.to_dict(), type(task).__name__, examples, at_a_time, seed, split], sort_keys=True)
        return folder / f"{hashlib.blake2b(described.encode(), digest_size=12).hexdigest()}.pt"

    def _get(self, task: Task, examples: int, at_a_time: int, seed: int, split: Split) -> Sample:
        if self.folder is None:
            return draw(task, examples, at_a_time, seed, split)
        file = self._file(self.folder, task, examples, at_a_time, seed, split)
        with open(file.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # whoever comes second waits and reads; the lock ends with its holder
            if not file.exists():
                drawn = draw(task, examples, at_a_time, seed, split)
                torch.save(tuple(drawn), file.with_suffix(".new"))
                os.replace(file.with_suffix(".new"), file)
                return drawn
        return Sample(*torch.load(file, weights_only=True))


def draw(task: Task, examples: int, at_a_time: int, seed: int, split: Split) -> Sample:
    """Some sequences of a task, a few at a time."""
    generator = torch.Generator().manual_seed(seed)
    parts = [task.sample(min(at_a_time, examples - i), generator, split) for i in range(0, examples, at_a_time)]
    known = [part.next_token for part in parts if part.next_token is not None]
    tokens, targets = torch.cat([part.tokens for part in parts]), torch.cat([part.targets for part in parts])
    return Sample(tokens, targets, torch.cat(known) if known else None)
