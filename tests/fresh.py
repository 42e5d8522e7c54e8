"""Processes that have imported torch and transformers and nothing of gdn, as a new one would, forked from a server that paid for it once.

Each start of Python with these costs five seconds, and the suite asks a dozen questions that need a process of their own.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

HEAVY = ["numpy", "torch", "torch._dynamo", "torch.distributed.checkpoint", "transformers", "transformers.masking_utils"]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (minus the signal that ended it) and what it wrote."""

    status: int
    output: str


def context() -> ForkServerContext:
    """What makes such processes. The first one waits for the server's imports."""
    made = get_context("forkserver")
    made.set_forkserver_preload(HEAVY)
    return made


def run(function: Callable[..., int | None], *arguments: Any, timeout: float = 120, **environment: str) -> Ended:
    """Call a function of a module in a process of its own, with warnings as errors; what it returns is the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        process = context().Process(target=_begin, args=(str(output), environment, function, arguments))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"it runs for more than {timeout} s: {output.read_text()[-2000:]}")
        return Ended(int(process.exitcode or 0), output.read_text())


def _begin(output: str, environment: dict[str, str], function: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(environment)
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    warnings.simplefilter("error")
    sys.exit(function(*arguments))
