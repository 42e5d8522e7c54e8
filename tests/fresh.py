"""Processes that have imported torch and transformers and nothing of gdn, as a new one would, forked from a server that paid for it once.

Each start of Python with these costs five seconds, and the suite asks a dozen questions that need a process of their own.
"""

from __future__ import annotations

import atexit
import os
import runpy
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver, get_context
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

HEAVY = ["numpy", "torch", "torch._dynamo", "torch.distributed.checkpoint", "transformers", "transformers.masking_utils"]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit status (minus the signal that ended it) and what it wrote."""

    status: int
    output: str


@cache
def context() -> ForkServerContext:
    """What makes such processes. They have one thread, no network, and a Hugging Face folder of their own."""
    made = get_context("forkserver")
    made.set_forkserver_preload(HEAVY)
    home = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("HF_HOME", home), ("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1")):
            patch.setenv(name, value)
        forkserver.ensure_running()
    return made


def start(output: Path, function: Callable[..., int | None], *arguments: Any, strict: bool = True) -> BaseProcess:
    """Call a function of a module in a process of its own; what it returns is the exit status. `strict` makes warnings errors."""
    process = context().Process(target=_begin, args=(str(output), strict, function, arguments))
    process.start()
    return process


def run(function: Callable[..., int | None], *arguments: Any, timeout: float = 120) -> Ended:
    """Call a function and wait for its end."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        process = start(output, function, *arguments)
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise AssertionError(f"it runs for more than {timeout} s: {output.read_text()[-2000:]}")
        return Ended(int(process.exitcode or 0), output.read_text())


def module(name: str, *arguments: str) -> None:
    """To be run or started: `python -m NAME ARGUMENTS`."""
    sys.argv = [name, *arguments]
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _begin(output: str, strict: bool, function: Callable[..., int | None], arguments: tuple[Any, ...]) -> None:
    sys.stdout = sys.stderr = open(output, "w", buffering=1)  # noqa: SIM115
    for descriptor in (1, 2):
        os.dup2(sys.stdout.fileno(), descriptor)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server ignores it
    if strict:
        warnings.simplefilter("error")
    sys.exit(function(*arguments))
