"""Runs spread over processes that share the device, or the devices.

Each worker has a pipe: it says how many lanes it has once the device has answered, the parent sends it as many runs at a time and gets
rows, or why there is none. A worker that dies is replaced, so that neither a fault of the device nor a lack of memory ends the others. One
that cannot begin is not: the others have the work, and no run was given to it.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch

from gdn.core.errors import ExperimentError
from gdn.experiments.definition import Run
from gdn.experiments.lanes import Lanes, Outcome, outcome, room
from gdn.experiments.sets import Sets

HINT = """
  (Processes under MPS share a limited number of connections, and each takes CUDA_DEVICE_MAX_CONNECTIONS of them. Where there are
  not as many left, CUDA may say that it is out of memory or that the device is busy: lower that number, or the number of jobs.)"""
"""A cause that CUDA's message does not tell."""


@dataclass(frozen=True)
class Begun:
    """What a worker says first."""

    lanes: int
    """How many runs it can do at a time. 0: none, it could not use the device."""
    failure: str = ""
    """Why not."""


class Worker:
    """A process that does some runs at a time."""

    def __init__(self, device: torch.device, lanes: int, sharing: int, threads: int, folder: Path) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self.device = device
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, str(device), lanes, sharing, threads, str(folder)), daemon=True)
        self.process.start()
        theirs.close()  # so that the pipe ends with the process
        self.lanes = 0
        """How many runs it does at a time; none before it has begun."""
        self.runs: dict[int, Run] = {}
        """What it is doing."""
        self.alone = False

    @property
    def busy(self) -> bool:
        """Whether it will say something."""
        return bool(self.runs) or not self.lanes

    @property
    def free(self) -> int:
        """How many further runs there is room for."""
        return 0 if self.alone and self.runs else self.lanes - len(self.runs)

    def give(self, number: int, run: Run, *, alone: bool = False) -> None:
        """Begin a run; `alone` keeps others away until it ends."""
        self.runs[number], self.alone = run, alone
        with suppress(BrokenPipeError):  # it has died; `take` says so
            self.pipe.send((number, run.to_dict()))

    def take(self) -> Outcome | Begun | None:
        """What it says next, which is waited for: that it has begun, or the end of one of its runs. None when the process has ended."""
        try:
            found: Outcome | Begun = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return None
        if isinstance(found, Begun):
            self.lanes = found.lanes
        else:
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


def work(pipe: Connection, device: str, count: int, sharing: int, threads: int, folder: str) -> None:
    """What a worker does until its pipe is closed, in the middle of a run too. Ctrl-C is the parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    where = torch.device(device)
    try:
        torch.ones(1, device=where).add(1).cpu()  # makes the context, where a process that is one too many is refused
        lanes = Lanes(room(count, where, sharing), where, Sets(Path(folder)))
    except RuntimeError as error:
        pipe.send(Begun(0, str(error).strip().splitlines()[0]))
        return
    pipe.send(Begun(len(lanes.lanes)))
    while True:
        try:
            while not lanes.busy or pipe.poll():  # without a free lane there is nothing to read but the end
                number, described = pipe.recv()
                lanes.begin(number, Run.from_dict(described))
        except EOFError:
            return
        for number, end in lanes.advance():
            found = outcome(number, end)
            pipe.send(found)
            if found.row is None and not usable(where):
                return


def usable(device: torch.device) -> bool:
    """Whether a failed run left the device in order for this process."""
    try:
        torch.ones(1, device=device).add(1).cpu()
    except RuntimeError:
        return False
    return True


class Plan:
    """What is to be done, in order, and what is to be done once more, alone: the death of its process may have been another's fault."""

    def __init__(self, runs: Iterable[tuple[int, Run]]) -> None:
        self.runs = dict(runs)
        self.waiting, self.suspects, self.again = deque(self.runs), deque[int](), set[int]()

    @property
    def left(self) -> bool:
        """Whether anything has not begun."""
        return bool(self.waiting or self.suspects)

    def hand_out(self, workers: Sequence[Worker]) -> None:
        """Give runs to who has most room. A worker without any, such as one that replaces another, takes suspects first."""
        while (worker := max(workers, key=lambda each: each.free)).free:
            queue = self.suspects if self.suspects and not worker.runs else self.waiting
            if not queue:
                return
            number = queue.popleft()
            worker.give(number, self.runs[number], alone=queue is self.suspects)

    def suspect(self, number: int) -> bool:
        """Do a run once more. False if this was the second time."""
        if number in self.again:
            return False
        self.again.add(number)
        self.suspects.append(number)
        return True


def outcomes(
    runs: Iterable[tuple[int, Run]],
    device: torch.device,
    jobs: int,
    lanes: int,
    *,
    left: Callable[[], float | None] = lambda: None,
    tell: Callable[[str], object] = lambda text: None,
) -> Iterator[Outcome]:
    """The ends of runs as they come. When `left`, the seconds that are left, reaches 0, what is going on is dropped.

    A run whose process ended, or that lacked memory, is begun once more, alone. `tell` hears of processes that are missing.

    Raises:
        ExperimentError: no process could use the device.
    """
    plan = Plan(runs)
    with pool(device, jobs, lanes) as (workers, begin):
        while (seconds := left()) is None or seconds > 0:
            plan.hand_out(workers)
            if not plan.left and not any(worker.runs for worker in workers):
                return
            ready = wait([worker.pipe for worker in workers if worker.busy], timeout=seconds)
            for worker in [worker for worker in workers if worker.pipe in ready]:
                found = worker.take()
                if not worker.lanes:
                    workers.remove(worker)
                    tell(without(worker, found, workers))
                elif found is None:
                    workers[workers.index(worker)] = begin(worker.device)
                    yield from [Outcome(number, None, worker.end) for number in worker.runs if not plan.suspect(number)]
                elif isinstance(found, Outcome) and not (found.crowded and plan.suspect(found.number)):
                    yield found


def without(worker: Worker, found: Outcome | Begun | None, others: Sequence[Worker]) -> str:
    """Says that a worker could not begin, and why."""
    why = found.failure if isinstance(found, Begun) else worker.end
    if not others:
        raise ExperimentError(f"no process could use {worker.device}: {why}{HINT}")
    return f"{len(others)} processes instead of {len(others) + 1}: one could not use {worker.device}: {why}{HINT}"


@contextmanager
def pool(device: torch.device, jobs: int, lanes: int) -> Iterator[tuple[list[Worker], Callable[[torch.device], Worker]]]:
    """Workers, and how to begin another; all are stopped in the end. Several GPUs are used in turn."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    places = devices(device)
    sharing = -(-jobs // len(places))
    begun: list[Worker] = []
    with tempfile.TemporaryDirectory(prefix="gdn-experiment-") as folder:

        def begin(where: torch.device) -> Worker:
            begun.append(Worker(where, lanes, sharing, threads, Path(folder)))
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
