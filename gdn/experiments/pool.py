"""Runs spread over processes that share the device, or the devices.

Each worker has a pipe: the parent sends it runs, as many at a time as it has lanes, and gets rows, or why there is none. A worker that dies
is replaced, so that neither a fault of the device nor a lack of memory ends the others.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from gdn.experiments.definition import Run
from gdn.experiments.lanes import Lanes, Outcome, outcome
from gdn.experiments.learn import rows
from gdn.experiments.sets import Sets


class Worker:
    """A process that does some runs at a time."""

    def __init__(self, device: torch.device, lanes: int, threads: int, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.device, self.lanes = device, lanes
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, str(device), lanes, threads, str(folder)), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.runs: dict[int, Run] = {}
        """What it is doing."""
        self.alone = False

    @property
    def free(self) -> int:
        """How many further runs there is room for."""
        return 0 if self.alone and self.runs else self.lanes - len(self.runs)

    def give(self, number: int, run: Run, *, alone: bool = False) -> None:
        """Begin a run; `alone` keeps others away until it ends."""
        self.runs[number], self.alone = run, alone
        with suppress(BrokenPipeError):  # it has died; `take` says so
            self.pipe.send((number, run.to_dict()))

    def take(self) -> Outcome | None:
        """The end of one of its runs, which is waited for. None when the process has ended."""
        try:
            found: Outcome = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return None
        del self.runs[found.number]
        return found

    @property
    def end(self) -> str:
        """How the process ended."""
        code = self.process.exitcode or 0
        return f"its process ended ({signal.Signals(-code).name if code < 0 else f'status {code}'})"

    def stop(self) -> None:
        self.process.terminate()
        self.pipe.close()


def work(pipe: Connection, device: str, count: int, threads: int, folder: str) -> None:
    """What a worker does until its pipe is closed. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    where = torch.device(device)
    lanes = Lanes(count, where, Sets(Path(folder)))
    with rows(where):
        while True:
            try:
                while not lanes.busy or (lanes.free and pipe.poll()):
                    number, described = pipe.recv()
                    lanes.begin(number, Run.from_dict(described))
            except EOFError:
                return
            for number, end in lanes.advance():
                pipe.send(outcome(number, end))
                if isinstance(end, Exception) and not usable(where):
                    return


def usable(device: torch.device) -> bool:
    """Whether a failed run left the device in order for this process."""
    try:
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError:
        return False
    return True


def outcomes(
    runs: Iterable[tuple[int, Run]], device: torch.device, jobs: int, lanes: int, *, left: Callable[[], float | None] = lambda: None
) -> Iterator[Outcome]:
    """The ends of runs as they come. When `left`, the seconds that are left, reaches 0, what is going on is dropped.

    A run whose process ended is begun once more, alone: it may have been another's fault.
    """
    waiting, again = deque(runs), set[int]()
    with pool(device, jobs, lanes) as (workers, begin):
        while (seconds := left()) is None or seconds > 0:
            while waiting and (worker := max(workers, key=lambda each: each.free)).free:
                alone = waiting[0][0] in again
                if alone and worker.runs:
                    break
                worker.give(*waiting.popleft(), alone=alone)
            busy = [worker for worker in workers if worker.runs]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy], timeout=seconds)
            for worker in [worker for worker in busy if worker.pipe in ready]:
                found = worker.take()
                if found is not None:
                    yield found
                    continue
                workers[workers.index(worker)] = begin(worker.device)
                for number, run in worker.runs.items():
                    if number in again:
                        yield Outcome(number, None, worker.end)
                    else:
                        again.add(number)
                        waiting.append((number, run))


@contextmanager
def pool(device: torch.device, jobs: int, lanes: int) -> Iterator[tuple[list[Worker], Callable[[torch.device], Worker]]]:
    """Workers, and how to begin another; all are stopped in the end. Several GPUs are used in turn."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    places = devices(device)
    begun: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="gdn-experiment-") as folder:

        def begin(where: torch.device) -> Worker:
            begun.append(Worker(where, lanes, threads, Path(folder)))
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
