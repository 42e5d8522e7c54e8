"""Compile the candidates of Triton's autotuners in many processes at once: what a benchmark that has FLA's rows does first.

Triton compiles a kernel's configurations one after another as it tries them. FLA's GLA layer has 326, of a fifth of a second to 16 seconds of
one core each, four minutes in all. Here those of a kernel are compiled together, each in a forked process, into Triton's cache on disk, where
the autotuner then finds them. From what it chooses, and how, stays as its authors wrote it.
"""

from __future__ import annotations

import argparse
import gc
import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `ahead`."""
    parser.add_argument(
        "--compilers", type=int, default=os.cpu_count() or 1,
        help="processes that compile what FLA's autotuners choose from (default %(default)s, the cores); 0: as they do it, one after another",
    )  # fmt: skip
    parser.add_argument(
        "--compile-limit", type=rows.positive, default=60, help="seconds for one of them, which is left out beyond (default %(default)s)"
    )


def ahead(measure: Callable[[], dict[str, Any]], args: argparse.Namespace, *, tunes: bool) -> dict[str, Any]:
    """What is measured, and if that `tunes` itself, with what it chooses from compiled first."""
    with compiled_ahead(args.compilers if tunes else 0, args.compile_limit, time.monotonic() + args.row_limit) as tuned:
        found = measure()
    facts = tuned.facts()
    if "note" in found and "note" in facts:
        facts["note"] = f"{found['note']}; {facts['note']}"
    return found | facts


class TooLong(Exception):
    """A job that did not end within its limit."""


class Died(Exception):
    """A job whose process was ended by a signal."""


@dataclass
class Tuned:
    """What was compiled ahead."""

    configurations: int = 0
    seconds: float = 0.0
    left_out: list[str] = field(default_factory=list)
    """Configurations that did not compile within the limit; the autotuner does not see them."""

    def facts(self) -> dict[str, Any]:
        """For the row of a benchmark."""
        if not self.configurations:
            return {}
        note = f"{len(self.left_out)} of {self.configurations} configurations took too long to compile: {', '.join(self.left_out)}"
        found = {"configurations": self.configurations, "compile_ahead_s": round(self.seconds, 1)}
        return found | ({"note": note} if self.left_out else {})


class Forks(Executor):
    """Each job in a forked process, at most so many at once; its result is made here once the process has ended, and so is its failure.

    Forked, so that a job may be any closure and finds imported what it needs. A job must not touch the device, whose context does not survive
    the fork.

    Args:
        processes: how many at once.
        limit: seconds for a job.
        until: when none may run any more, by `time.monotonic()`.
    """

    def __init__(self, processes: int, limit: float, until: float) -> None:
        self.processes, self.limit, self.until = processes, limit, until
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._running: dict[int, tuple[Future[Any], Callable[[], Any], float]] = {}

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self._waiting.append((future, lambda: fn(*args, **kwargs)))
        return future

    def finish(self) -> None:
        """Do all jobs; their futures are done afterwards."""
        while self._waiting or self._running:
            if time.monotonic() > self.until:
                raise rows.OutOfTime
            while self._waiting and len(self._running) < self.processes:
                future, job = self._waiting.popleft()
                self._running[forked(job)] = future, job, time.monotonic()
            if not self._settle():
                time.sleep(0.005)

    def _settle(self) -> int:
        """Take what has ended or run too long; how many."""
        settled = 0
        for pid, (future, job, begin) in list(self._running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() - begin < self.limit:
                continue
            del self._running[pid]
            settled += 1
            if not ended:
                end(pid)
                future.set_exception(TooLong(f"more than {self.limit:.0f} s"))
            elif os.WIFSIGNALED(status):
                future.set_exception(Died(f"signal {os.WTERMSIG(status)}"))
            else:
                settle(future, job)
        return settled

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End what still runs. Futures of jobs that are not done fail, so that nobody waits for them."""
        for pid in self._running:
            end(pid)
        for future, *_ in (*self._running.values(), *self._waiting):
            future.set_exception(Died("never done"))
        self._running.clear()
        self._waiting.clear()


def settle(future: Future[Any], job: Callable[[], Any]) -> None:
    try:
        future.set_result(job())
    except Exception as failure:
        future.set_exception(failure)


def forked(job: Callable[[], Any]) -> int:
    """The id of a process that does the job and leaves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads, which hold no lock of the compiler's
        pid = os.fork()
    if pid:
        return pid
    try:
        gc.disable()  # or it might free tensors, which asks the driver
        job()
    finally:
        os._exit(0)


def end(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


@contextmanager
def compiled_ahead(processes: int, limit: float, until: float = float("inf")) -> Iterator[Tuned]:
    """Within it an autotuner that meets something new has its configurations compiled ahead, and never sees those above `limit` seconds.

    Raises OutOfTime at the first one after `until`: a signal does not reach the thread of a backward pass. Without processes nothing is done.
    """
    tuned = Tuned()
    if not processes:
        yield tuned
        return
    from triton.runtime.autotuner import Autotuner

    prune = Autotuner.prune_configs

    def pruned(tuner: Any, kwargs: dict[str, Any]) -> list[Any]:
        begin, configs = time.monotonic(), prune(tuner, kwargs)
        late = too_slow(tuner, configs, kwargs, Forks(processes, limit, until))
        tuned.configurations += len(configs)
        tuned.seconds += time.monotonic() - begin
        tuned.left_out += [f"{tuner.base_fn.__name__} ({config})" for config in late]
        if len(late) == len(configs):
            raise TooLong(f"{tuner.base_fn.__name__}: none of {len(configs)} configurations compiles within {limit:.0f} s")
        return [config for config in configs if config not in late]

    Autotuner.prune_configs = pruned
    try:
        yield tuned
    finally:
        Autotuner.prune_configs = prune


def too_slow(tuner: Any, configs: Sequence[Any], kwargs: dict[str, Any], pool: Forks) -> list[Any]:
    """Compile the configurations of a call; those that took too long. One that fails is left to the autotuner, which knows what to do."""
    import triton

    with triton.AsyncCompileMode(pool, ignore_errors=True), pool:
        call = {**kwargs, "warmup": True}
        jobs = [(config, tuner.fn.run(*tuner.nargs.values(), **call, **config.all_kwargs())) for config in configs]
        pool.finish()
    return [config for config, job in jobs if hasattr(job, "future") and isinstance(job.future.exception(), TooLong)]
