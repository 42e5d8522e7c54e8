"""Runs side by side in one process: none depends on those beside it."""

from __future__ import annotations

import gc
import weakref
from typing import Any, cast

import pytest
import torch

from gdn.data.synthetic import MQAR, Parity
from gdn.experiments import lanes as module
from gdn.experiments import learn as learn_module
from gdn.experiments.definition import Row, Run, Test, Training
from gdn.experiments.lanes import AHEAD, Lane, default, in_turns, room
from gdn.experiments.learn import learn, learning, silent
from gdn.experiments.sets import Sets
from gdn.mixers.attention import Attention
from gdn.mixers.base import MixerConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

CPU = torch.device("cpu")
PARITY, RECALL = Parity(length=6, shortest=6, running=True), MQAR(vocab=16, length=16, pairs=3)
DELTA, ATTENTION = GatedDeltaNet.Config(heads=1, head_dim=4), Attention.Config(heads=1, head_dim=4)


def run(mixer: MixerConfig = DELTA, task: Any = PARITY, seed: int = 0, steps: int = 6, examples: int | None = None) -> Run:
    model = LM.Config(vocab=task.vocab, width=8, layers=1, mlp=8, pattern=(mixer,))
    training = Training(steps=steps, batch=4, examples=examples, check_every=2)
    return Run(
        series="", seed=seed, model=model, tasks=(task,), training=training, tests=(Test(name="score", task=task, examples=8, batch=4),)
    )


RUNS = [
    run(),
    run(ATTENTION, RECALL, seed=1, steps=9, examples=8),
    run(DELTA, RECALL, seed=2, examples=12),
    run(ATTENTION, seed=0, steps=3),
]


def beside(count: int) -> dict[int, Row]:
    ends = in_turns(((number, run, silent) for number, run in enumerate(RUNS)), CPU, count, Sets())
    return {end.number: end.row for end in ends if end is not None and end.row is not None}


def result(row: Row) -> Any:
    return row["loss"], row["curve"], row["scores"], row["profiles"], row["steps"]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_run_is_the_same_whatever_runs_beside_it(count: int) -> None:
    rows = beside(count)
    assert sorted(rows) == [0, 1, 2, 3]
    for number, run in enumerate(RUNS):
        torch.rand(number + 1)  # a run seeds for itself
        assert result(rows[number]) == result(learn(run, CPU))


def test_lanes_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[int] = []
    real = Lane.advance

    def counted(lane: Lane) -> Row | None:
        assert lane.number is not None
        turns.append(lane.number)
        return real(lane)

    monkeypatch.setattr(Lane, "advance", counted)
    beside(2)
    assert turns[:6] == [0, 1, 0, 1, 0, 1]
    assert turns.index(2) > max(i for i, number in enumerate(turns) if number == 0) or turns.index(3) > turns.index(2)


def test_a_lane_waits_for_its_device_and_not_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    lanes, event = module.Lanes(2, CPU, Sets()), Event()
    for number in (0, 1):
        lanes.begin(number, RUNS[number])
    lanes.lanes[0].reached = cast("torch.cuda.Event", event)
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    for _ in range(3):
        assert not list(lanes.advance())
    assert [lane.turns for lane in lanes.lanes] == [0, 3]
    event.done = True
    assert not list(lanes.advance())
    assert [lane.turns for lane in lanes.lanes] == [1, 4]
    lanes.close()
    assert not lanes.busy


def test_nothing_has_to_be_read_between_looks() -> None:
    """The pauses that ask for the device to be done are those before looks."""
    steps = learning(run(steps=4), CPU, silent, Sets())
    assert [next(steps) for _ in range(4)] == [False, False, False, True]  # drawn, two updates, a look


def test_defaults() -> None:
    assert default(CPU) == 1
    assert default(torch.device("cuda")) == module.ON_GPU
    assert AHEAD > 0


def test_a_run_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does one that fails, whose traceback would hold the model, or one that is dropped. Memory is released when all is free."""
    built: list[weakref.ref[Any]] = []
    alive_at_release: list[bool] = []
    real = learn_module.build

    def build(*args: Any) -> Any:
        model = real(*args)
        built.append(weakref.ref(model))
        return model

    monkeypatch.setattr(learn_module, "build", build)
    monkeypatch.setattr(module, "release", lambda device: alive_at_release.append(built[-1]() is not None))
    failing = run().with_(tests=(Test(name="score", task=PARITY, measure="legal", examples=8),))
    for each in (run(examples=8), failing):
        lane = module.Lanes(1, CPU, Sets())
        lane.begin(0, each)
        ends: list[Any] = []
        gc.disable()
        try:
            while lane.busy:
                ends += lane.advance()
        finally:
            gc.enable()
        assert isinstance(ends[0][1], Exception) is (each is failing)
    dropped = module.Lanes(1, CPU, Sets())
    dropped.begin(0, run())
    assert not list(dropped.advance())
    dropped.close()
    assert alive_at_release == [False, False, False]


def test_lanes_fit_into_the_memory_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(module.hardware, "memory_bytes", lambda index: 80 << 30)
    assert [room(16, cuda, sharing) for sharing in (1, 4, 16, 200)] == [16, 9, 2, 1]
    assert room(3, cuda, 1) == 3
    assert room(16, CPU, 200) == 16
