from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from gdn.core.errors import CheckpointError
from gdn.train import Trainer, lock
from gdn.train.distributed import World, processes

HOLD = """
import sys, time
from pathlib import Path
from gdn.train.distributed import processes
from gdn.train.lock import alone
with processes("cpu") as world, alone(Path(sys.argv[1]), world):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def world() -> World:
    with processes("cpu") as found:
        return found


def test_a_second_training_in_a_directory_is_refused_until_the_first_is_gone(tiny: Callable[..., Trainer.Config]) -> None:
    config = tiny(steps=2)
    folder = Path(config.directory)
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None and other.stdout.readline() == "held\n"
            with pytest.raises(CheckpointError, match=rf"another process \({other.pid}\) trains in .*: wait for it or stop it"):
                Trainer(config).run()
            assert not (folder / "checkpoints").exists()
        finally:
            other.send_signal(signal.SIGKILL)
    assert Trainer(config).run() == 0


def test_a_file_system_without_locks_is_trusted(tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError("no locks available")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with lock.alone(tmp_path, world), lock.alone(tmp_path, world):
        pass


def test_the_lock_is_held_and_let_go(tmp_path: Path, world: World) -> None:
    for _ in range(2):
        with lock.alone(tmp_path / "run", world):
            assert (tmp_path / "run" / lock.LOCK).read_text() == str(os.getpid())
            with pytest.raises(CheckpointError), lock.alone(tmp_path / "run", world):
                pass


def test_a_directory_that_cannot_be_made_is_left_to_who_writes_there(tmp_path: Path, world: World) -> None:
    (tmp_path / "file").write_text("")
    with lock.alone(tmp_path / "file" / "run", world):
        pass
