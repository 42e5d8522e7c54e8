"""Several runs side by side in one process: each has a lane, a stream of its own on a GPU, and they are advanced in turns.

Processes that share a GPU take turns on it. Streams of one process can run at the same time. The host only puts replays into the queues of
the streams; it never waits for one lane while another has room.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass

import torch

from gdn.core import device as hardware
from gdn.experiments.definition import Row, Run
from gdn.experiments.learn import Watch, learning, silent
from gdn.experiments.sets import Sets

AHEAD = 50
"""Turns that a lane may be ahead of its device."""
ON_GPU = 16
"""Lanes of a process on a GPU if nothing else is said. Sixteen together make 600 to 750 updates a second on an H200, about what one makes
alone: an update of the experiments' sizes fills the GPU. What they gain is that it works while others draw data, compile and are tested."""
OF_A_LANE = 2 << 30
"""Bytes of a GPU that a lane has to have: the largest updates of the experiments take 1 GiB, and training sets are there with them."""
OF_A_PROCESS = 1 << 30
"""Bytes that a process takes before it does anything."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    number: int
    """Its place among the runs."""
    row: Row | None
    """The result."""
    failure: str = ""
    """Why there is none."""
    crowded: bool = False
    """Whether that was a lack of memory, so that it might be done with nothing beside it."""


class Lane:
    """One run after another, advanced a step at a time."""

    def __init__(self, device: torch.device, sets: Sets) -> None:
        self.device, self.sets = device, sets
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.number: int | None = None
        self.steps: Generator[bool, None, Row] | None = None
        self.turns = 0
        self.reached: torch.cuda.Event | None = None
        """What the device has to reach before the next turn."""

    @property
    def free(self) -> bool:
        return self.steps is None

    @property
    def blocked(self) -> bool:
        """Whether the device has too much to do for this lane as it is."""
        return self.reached is not None and not self.reached.query()

    def begin(self, number: int, run: Run, watch: Watch = silent) -> None:
        """Take a run; nothing is done yet."""
        self.number, self.steps, self.turns, self.reached = number, learning(run, self.device, watch, self.sets), 0, None

    def advance(self) -> Row | None:
        """One step; the row after the last."""
        assert self.steps is not None
        try:
            with self._here():
                reads = next(self.steps)
                self.turns += 1
                self.reached = None
                if self.stream is not None and (reads or self.turns % AHEAD == 0):
                    self.reached = torch.cuda.Event()
                    self.reached.record(self.stream)
        except StopIteration as end:
            self.end()
            return end.value
        return None

    def end(self) -> None:
        """Forget the run, and give back the memory that it held."""
        if self.steps is not None:
            self.steps.close()
        self.number = self.steps = self.reached = None
        release(self.device)

    def _here(self) -> AbstractContextManager[object]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)


class Lanes:
    """Lanes that are advanced in turns."""

    def __init__(self, count: int, device: torch.device, sets: Sets) -> None:
        self.lanes = [Lane(device, sets) for _ in range(count)]

    @property
    def free(self) -> int:
        """How many further runs there is room for."""
        return sum(lane.free for lane in self.lanes)

    @property
    def busy(self) -> bool:
        return self.free < len(self.lanes)

    def begin(self, number: int, run: Run, watch: Watch = silent) -> None:
        """Begin a run in a free lane."""
        next(lane for lane in self.lanes if lane.free).begin(number, run, watch)

    def advance(self) -> Iterator[tuple[int, Row | Exception]]:
        """A turn for each lane; the runs that end in it, with their row or what was raised."""
        ready = [lane for lane in self.lanes if not lane.free and not lane.blocked]
        if not ready:
            time.sleep(1e-4)
        for lane in ready:
            number = lane.number
            assert number is not None
            try:
                row = lane.advance()
            except Exception as error:
                traceback.clear_frames(error.__traceback__)  # they hold the model
                lane.end()
                yield number, error
            else:
                if row is not None:
                    yield number, row

    def close(self) -> None:
        """Drop what is going on."""
        for lane in self.lanes:
            lane.end()


def outcome(number: int, end: Row | Exception) -> Outcome:
    """How a run ended, in words."""
    if isinstance(end, Exception):
        text = "".join(traceback.format_exception_only(end)).strip()
        return Outcome(number, None, text, crowded=isinstance(end, torch.OutOfMemoryError))
    return Outcome(number, end)


def default(device: torch.device) -> int:
    """Lanes of a process if nothing else is said."""
    return ON_GPU if device.type == "cuda" else 1


def room(count: int, device: torch.device, sharing: int) -> int:
    """How many of `count` lanes a process can have when `sharing` processes have an equal part of a GPU's memory. At least one."""
    if device.type != "cuda":
        return count
    mine = hardware.memory_bytes(device.index or 0) // sharing - OF_A_PROCESS
    return max(1, min(count, mine // OF_A_LANE))


def release(device: torch.device) -> None:
    """Give back memory that is kept for reuse. What was captured has memory of its own that no other run could use, and what is kept for
    one stream is not used on another."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def in_turns(runs: Iterable[tuple[int, Run, Watch]], device: torch.device, count: int, sets: Sets) -> Generator[Outcome | None, None, None]:
    """The ends of runs that are done in this process, and None after each turn. What fails is raised."""
    lanes, waiting = Lanes(room(count, device, 1), device, sets), iter(runs)
    with closing(lanes):
        while True:
            while lanes.free and (following := next(waiting, None)):
                lanes.begin(*following)
            if not lanes.busy:
                return
            for number, end in lanes.advance():
                if isinstance(end, Exception):
                    raise end
                yield Outcome(number, end)
            yield None
