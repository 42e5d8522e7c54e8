from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gdn.core.errors import CheckpointError
from gdn.train import metrics
from gdn.train.metrics import Metrics


def steps(path: Path) -> list[float]:
    return [row["step"] for row in metrics.read(path)]


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    log = Metrics(tmp_path, 0)
    rows = [{"step": 1, "loss/train": 1 / 3}, {"step": 2, "loss/train": 1e-300, "loss/val": 2.5}]
    for row in rows:
        log.write(row)
        assert list(metrics.read(log.path))[-1] == row  # before the file is closed
    log.close()
    assert list(metrics.read(log.path)) == rows


def test_resuming_drops_later_rows_so_that_no_step_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (2, 4, 6, 8)))
    log = Metrics(tmp_path, 5)
    log.write({"step": 6})
    log.close()
    assert steps(path) == [2, 4, 6]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / metrics.FILE
    path.write_text('{"step": 2}\n{"step": 4, "loss/tr')
    log = Metrics(tmp_path, 10)
    log.write({"step": 6})
    log.close()
    assert steps(path) == [2, 6]


def test_a_full_disk_says_so(tmp_path: Path) -> None:
    log = Metrics(tmp_path, 0)
    log.file.close()
    with Path("/dev/full").open("ab", buffering=0) as log.file, pytest.raises(CheckpointError, match=r"jsonl: No space left on device$"):
        log.write({"step": 1})


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Metrics(tmp_path, 0)
    for step in (1, 2):
        log.write({"step": step, "loss/train": 4.0 / step})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/train")] == [(1, 4.0), (2, 2.0)]


def test_utilisation_is_known_for_known_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert metrics.utilisation(1e12, torch.device("cpu")) is None
    machine = metrics.machine()
    for name, expected in {"NVIDIA H200": 0.5, "NVIDIA Unheard-of": None}.items():
        monkeypatch.setattr(metrics, "machine", lambda name=name: type(machine)(**{**vars(machine), "name": name}))
        assert metrics.utilisation(989e12, torch.device("cuda"), processes=2) == expected
