"""Compile the Triton rows of operators in several processes at once. Triton keeps what it compiles on disk, so this process finds it there.

On a fresh machine the doctor would otherwise wait for one kernel after another: seconds each, a minute in all, on one of many cores.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, wait
from multiprocessing import get_context

import torch

from gdn.core.dispatch import ops, use
from gdn.testing import compare

PROCESSES = 8
"""At most; each holds a context of the GPU, half a gigabyte."""


def start(names: Sequence[str], device: torch.device, dtype: torch.dtype) -> Ahead | None:
    """Begin with the rows that would have to be compiled; None where there are none, or no cores for it."""
    rows = [(name, impl) for name in names for impl in compiled_rows(name, device, dtype)]
    processes = min(PROCESSES, len(rows), (os.cpu_count() or 1) // 2)
    if processes < 2:
        return None
    return Ahead(rows, device, dtype, ProcessPoolExecutor(processes, mp_context=get_context("spawn")))


def compiled_rows(name: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """Rows of an operator that Triton compiles and that run here."""
    op = ops()[name]
    able = {v.name for v in op.explain(device.type, dtype, index=device.index or 0) if v.reason is None}
    return [row.name for row in op.impls if "triton" in row.needs.packages and row.name in able]


class Ahead:
    """Rows that are being compiled."""

    def __init__(self, rows: Sequence[tuple[str, str]], device: torch.device, dtype: torch.dtype, pool: Executor) -> None:
        self._pool = pool
        self._jobs = [pool.submit(call, name, impl, str(device), dtype) for name, impl in rows]

    def join(self, until: float) -> int:
        """Wait, at most until `time.monotonic()` is that late; how many rows are ready. The others' processes are ended.

        A row that fails is a finding of whoever examines it, not of this.
        """
        done, late = wait(self._jobs, timeout=max(0.0, until - time.monotonic()))
        processes = dict(getattr(self._pool, "_processes", None) or {})  # forgotten by shutdown
        self._pool.shutdown(wait=False, cancel_futures=True)
        if late:
            for process in processes.values():
                process.terminate()
        return sum(job.exception() is None for job in done)


def call(name: str, impl: str, device: str, dtype: torch.dtype) -> None:
    """Run a row once, forward and backward and without gradients, so that every kernel the doctor needs is on disk."""
    from gdn.testing.doctor import EXAMPLES, without_gradients

    make = EXAMPLES[name]
    compare.run(ops()[name], impl, make(torch.device(device), dtype, torch.float32))
    with use(**{name: impl}):
        without_gradients(ops()[name], make(torch.device(device), dtype, torch.float32))()
