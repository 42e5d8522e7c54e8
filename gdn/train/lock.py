"""One training in a directory at a time: two would write over each other's checkpoints and logs."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gdn.core.errors import CheckpointError
from gdn.train.distributed import World

LOCK = ".lock"


@contextmanager
def alone(folder: Path, world: World) -> Iterator[None]:
    """Hold the directory of a run for the block; the system lets go of it with the process, however that ends. Every process calls this.

    A file system without locks is trusted.

    Raises:
        CheckpointError: another process trains there.
    """
    file = _opened(folder) if world.is_first else None
    try:
        other = world.broadcast(None if file is None else _holder(file))
        if other is not None:
            raise CheckpointError(f"another process{other} trains in {folder}: wait for it or stop it, or choose another directory")
        yield
    finally:
        if file is not None:
            os.close(file)


def _opened(folder: Path) -> int | None:
    """The lock file; None where the directory cannot be written, which whoever writes there first explains."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError:
        return None


def _holder(file: int) -> str | None:
    """Lock the file: None, or how to find the process that holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        found = os.pread(file, 20, 0).decode(errors="replace").strip()
        return f" ({found})" if found.isdigit() else ""
    except OSError:  # no locks on this file system
        return None
    try:
        os.ftruncate(file, 0)
        os.pwrite(file, str(os.getpid()).encode(), 0)
    except OSError:  # a full disk: the lock holds all the same
        pass
    return None
