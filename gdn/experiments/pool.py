"""Runs spread over processes that share the device, or the devices.

Each worker has a pipe: the parent sends it a run and gets the row, or why there is none. A worker that dies takes its run with it and is
replaced, so that neither a fault of the device nor a lack of memory ends the others.
"""

from __future__ import annotations

import os
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from gdn.experiments.definition import Row, Run
from gdn.experiments.learn import learn
from gdn.experiments.sets import Sets


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    number: int
    """Its place among the runs."""
    row: Row | None
    """The result."""
    failure: str = ""
    """Why there is none."""


class Worker:
    """A process that does one run at a time."""

    def __init__(self, device: torch.device, threads: int, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.device = device
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, str(device), threads, str(folder)), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.number: int | None = None

    def give(self, number: int, run: Run) -> None:
        """Begin a run."""
        self.number = number
        with suppress(BrokenPipeError):  # it has died; `take` says so
            self.pipe.send(run.to_dict())

    def take(self) -> Outcome:
        """The end of its run. Waits for it."""
        number, self.number = self.number, None
        assert number is not None
        try:
            row, failure = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            code = self.process.exitcode or 0
            row, failure = None, f"its process ended ({signal.Signals(-code).name if code < 0 else f'status {code}'})"
        return Outcome(number, row, failure)

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def stop(self) -> None:
        self.process.terminate()
        self.pipe.close()


def work(pipe: Connection, device: str, threads: int, folder: str) -> None:
    """What a worker does until its pipe is closed. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    sets = Sets(Path(folder))
    where = torch.device(device)
    while True:
        try:
            run = Run.from_dict(pipe.recv())
        except EOFError:
            return
        try:
            pipe.send((learn(run, where, sets=sets), ""))
        except Exception as error:
            pipe.send((None, "".join(traceback.format_exception_only(error)).strip()))
            if not usable(where):
                return
        if where.type == "cuda":
            torch.cuda.empty_cache()


def usable(device: torch.device) -> bool:
    """Whether a failed run left the device in order for this process."""
    try:
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError:
        return False
    return True


def outcomes(
    runs: Iterable[tuple[int, Run]], device: torch.device, jobs: int, *, more: Callable[[], bool] = lambda: True
) -> Iterator[Outcome]:
    """The ends of runs as they come. No further run is begun once `more` says no."""
    with pool(device, jobs) as (idle, begin):
        waiting, busy = iter(runs), []
        while True:
            while idle and more() and (following := next(waiting, None)):
                worker = idle.pop()
                if not worker.alive:
                    worker.stop()
                    worker = begin(worker.device)
                worker.give(*following)
                busy.append(worker)
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in ready]:
                busy.remove(worker)
                outcome = worker.take()
                idle.append(worker)
                yield outcome


@contextmanager
def pool(device: torch.device, jobs: int) -> Iterator[tuple[list[Worker], Callable[[torch.device], Worker]]]:
    """Workers, and how to begin another; all are stopped in the end. Several GPUs are used in turn."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    places = devices(device)
    begun: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="gdn-experiment-") as folder:

        def begin(where: torch.device) -> Worker:
            begun.append(Worker(where, threads, Path(folder)))
            return begun[-1]

        try:
            yield [begin(places[i % len(places)]) for i in range(jobs)], begin
        finally:
            for worker in begun:
                worker.stop()
            for worker in begun:
                worker.process.join()


def devices(device: torch.device) -> list[torch.device]:
    """ "cuda" stands for all GPUs, everything else for itself."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
