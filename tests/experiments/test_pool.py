"""Runs in several processes: all are done, failures are told with their run, the budget ends what has not begun."""

from __future__ import annotations

import fcntl
import io
import itertools
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import fresh
import pytest
import torch
from rich.console import Console

from gdn.core.errors import ConfigError, ExperimentError
from gdn.data.synthetic import MQAR, Parity
from gdn.experiments import conduct as module
from gdn.experiments import pool, sets
from gdn.experiments.conduct import conduct_all, read
from gdn.experiments.definition import Experiment, Run, Test, Training
from gdn.experiments.lanes import Outcome, outcome
from gdn.experiments.sets import Sets
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

CPU = torch.device("cpu")
TASK = Parity(length=6, shortest=6, running=True)


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers begin as new processes would, less the time that imports take, and have one thread for their tiny models."""
    monkeypatch.setattr(torch.multiprocessing, "get_context", lambda method: {"spawn": fresh.context()}[method])
    monkeypatch.setattr(os, "cpu_count", lambda: 1)


def run(series: str = "model", seed: int = 0, **changes: Any) -> Run:
    model = LM.Config(vocab=3, width=8, layers=1, mlp=8, pattern=(GatedDeltaNet.Config(heads=1, head_dim=4),))
    tests = (Test(name="short", task=TASK, examples=8),)
    training = Training(steps=3, batch=4, examples=8, check_every=2)
    return Run(series=series, seed=seed, model=model, tasks=(TASK,), training=training, tests=tests).with_(**changes)


def experiment(name: str, *runs: Run) -> Experiment:
    def figure(rows: Any) -> Any:
        return pytest.importorskip("matplotlib.figure").Figure()

    return Experiment(name=name, claim="It works.", runs=lambda toy: runs, figure=figure)


def broken(seed: int) -> Run:
    """A run that cannot be done: its test asks for a distribution that the task does not know."""
    return run("broken", seed, tests=(Test(name="short", task=TASK, measure="legal", examples=8),))


def test_processes_do_what_one_does_and_a_failure_loses_nothing_else(tmp_path: Path) -> None:
    alone = conduct_all([(experiment("one", run(), run(seed=1)), tmp_path / "alone")], CPU, console=quiet())
    told = io.StringIO()
    chosen = [(experiment("one", run(), run(seed=1)), tmp_path / "one"), (experiment("two", broken(0), run("good", 0)), tmp_path / "two")]
    with pytest.raises(ExperimentError, match=r"1 of 4 runs failed:\n  two, broken, seed 0: "):
        conduct_all(chosen, CPU, jobs=2, console=Console(file=told, width=200))
    shared = {row["seed"]: row for row in read(tmp_path / "one/results.jsonl")}
    assert [(shared[seed]["loss"], shared[seed]["scores"]) for seed in (0, 1)] == [(row["loss"], row["scores"]) for row in alone[0]]
    assert [row["series"] for row in read(tmp_path / "two/results.jsonl")] == ["good"]
    assert "4 of 4: " in told.getvalue()
    assert "two, broken, seed 0: " in told.getvalue()


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_a_process_that_dies_is_told_replaced_and_costs_no_other_run(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[int, bool]] = []

    class Mortal(pool.Worker):
        def give(self, number: int, run: Run, *, alone: bool = False) -> None:
            super().give(number, run, alone=alone)
            given.append((number, alone))
            if run.series == "deadly" and len(self.runs) == (1 if alone else 2):
                assert self.process.pid is not None
                os.kill(self.process.pid, signal.SIGKILL)

    monkeypatch.setattr(pool, "Worker", Mortal)
    runs = [run("beside", training=Training(steps=40, batch=4)), run("deadly"), run("good")]
    ends = {end.number: end for end in pool.outcomes(enumerate(runs), CPU, jobs=1, lanes=2)}
    assert ends.pop(1) == Outcome(1, None, "its process ended (SIGKILL)")
    assert {number: end.row is not None for number, end in ends.items()} == {0: True, 2: True}
    assert given == [(0, False), (1, False), (0, True), (1, True), (2, False)]


def test_a_process_that_cannot_begin_costs_no_run_and_no_order(monkeypatch: pytest.MonkeyPatch) -> None:
    given, told, begun = list[int](), list[str](), list[pool.Worker]()

    class Refused(pool.Worker):
        def __init__(self, device: torch.device, *rest: Any) -> None:
            super().__init__(torch.device("meta") if len(begun) < 2 else device, *rest)  # no number can be read back from "meta"
            begun.append(self)

        def give(self, number: int, run: Run, *, alone: bool = False) -> None:
            for refused in begun[:2]:
                refused.process.join()  # what they say is there before the end of any run
            super().give(number, run, alone=alone)
            given.append(number)

    monkeypatch.setattr(pool, "Worker", Refused)
    ends = [end.number for end in pool.outcomes(enumerate([run(seed=seed) for seed in range(3)]), CPU, jobs=3, lanes=1, tell=told.append)]
    assert ends == given == [0, 1, 2]
    assert len(begun) == 3
    assert [line.split(":")[0] for line in told] == ["2 processes instead of 3", "1 processes instead of 2"]


def test_that_no_process_can_begin_is_an_error() -> None:
    with pytest.raises(ExperimentError, match=r"no process could use meta: (?s:.)*CUDA_DEVICE_MAX_CONNECTIONS"):
        list(pool.outcomes(enumerate([run()]), torch.device("meta"), jobs=1, lanes=1))


def test_a_lack_of_memory_is_tried_once_more_alone() -> None:
    class Worker:
        free, runs, given = 2, dict[int, Run](), list[tuple[int, bool]]()

        def give(self, number: int, run: Run, *, alone: bool = False) -> None:
            self.runs[number] = run
            self.free = 0 if alone else self.free - 1
            self.given.append((number, alone))

    plan, worker, chosen = pool.Plan(enumerate([run()] * 3)), Worker(), cast("list[pool.Worker]", [])
    chosen.append(cast("pool.Worker", worker))
    plan.hand_out(chosen)
    lacking = outcome(0, torch.OutOfMemoryError("CUDA out of memory"))
    assert lacking.crowded
    assert not outcome(0, ValueError("something else")).crowded
    assert plan.suspect(0)
    worker.runs, worker.free = {1: run()}, 1
    plan.hand_out(chosen)  # not while another is there
    worker.runs, worker.free = {}, 2
    plan.hand_out(chosen)
    assert worker.given == [(0, False), (1, False), (2, False), (0, True)]
    assert not plan.suspect(0)


def test_first_seeds_come_first_then_what_can_wait(tmp_path: Path) -> None:
    chosen = [(experiment(name, run(name), run(name, 1)), tmp_path / name) for name in ("one", "two", "last")]
    chosen[2] = (replace(chosen[2][0], later=lambda run: True), chosen[2][1])
    told = io.StringIO()
    conduct_all(chosen, CPU, console=Console(file=told, width=200))
    order = [line.split(": ")[1] for line in told.getvalue().splitlines() if " of 6: " in line]
    assert order == [f"{name}, {name}, seed {seed}" for names in (("one", "two"), ("last",)) for seed in (0, 1) for name in names]


LONG = run("long", training=Training(steps=400, batch=4, check_every=400))
"""Long enough to be going on when time is over, and no longer, so that a budget that is ignored fails rather than hangs."""


def test_the_budget_drops_what_is_not_finished_and_keeps_what_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = itertools.count(0, 0.125)
    monkeypatch.setattr(module.time, "monotonic", lambda: next(now))
    told = io.StringIO()
    chosen = [(experiment("one", run("short"), LONG, run("not begun", 1)), tmp_path)]
    conduct_all(chosen, CPU, budget=9, console=Console(file=told, width=200))
    assert [row["series"] for row in read(tmp_path / "results.jsonl")] == ["short"]
    assert "2 runs are not finished: the budget of 9 s is spent" in told.getvalue()


def test_processes_are_stopped_when_the_time_is_over() -> None:
    seconds: list[float | None] = [None]
    ends = pool.outcomes(enumerate([run("short"), LONG, LONG]), CPU, jobs=1, lanes=2, left=lambda: seconds[0])
    assert next(ends).row is not None
    seconds[0] = 0.0
    assert list(ends) == []


def test_a_process_ends_with_the_one_that_began_it(tmp_path: Path) -> None:
    worker = pool.Worker(CPU, 1, 1, 1, tmp_path)
    try:
        assert isinstance(worker.take(), pool.Begun)
        worker.give(0, LONG)
        worker.pipe.close()  # as when the parent is killed
        worker.process.join(20)
        assert worker.process.exitcode == 0
    finally:
        worker.stop()


def test_mistakes_are_named(tmp_path: Path) -> None:
    chosen = [(experiment("one", run()), tmp_path)]
    with pytest.raises(ConfigError, match="jobs: expected at least 1"):
        conduct_all(chosen, CPU, jobs=0)
    with pytest.raises(ConfigError, match="lanes: expected at least 1"):
        conduct_all(chosen, CPU, lanes=0)
    with pytest.raises(ConfigError, match="budget: expected a number of seconds above 0"):
        conduct_all(chosen, CPU, budget=0)


def test_sets_are_drawn_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task, test = MQAR(vocab=16, length=16, pairs=3), Test(name="", task=TASK, examples=8)
    fresh = Sets().training(task, 10, seed=3), Sets().test(test)
    kept = Sets(tmp_path)
    first = kept.training(task, 10, seed=3), kept.test(test)
    monkeypatch.setattr(sets, "draw", lambda *args: pytest.fail("drawn again"))
    again = Sets(tmp_path).training(task, 10, seed=3), Sets(tmp_path).test(test)
    for drawn in (first, again):
        assert all(torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets) for a, b in zip(drawn, fresh))
    with pytest.raises(pytest.fail.Exception, match="drawn again"):
        kept.training(task, 10, seed=4)


def test_a_set_that_another_draws_can_be_waited_for(tmp_path: Path) -> None:
    task, kept = MQAR(vocab=16, length=16, pairs=3), Sets(tmp_path)
    assert not Sets().being_drawn(task, 10, seed=3)
    assert not kept.being_drawn(task, 10, seed=3)
    (lock,) = tmp_path.glob("*.lock")
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert kept.being_drawn(task, 10, seed=3)
    kept.training(task, 10, seed=3)
    assert not kept.being_drawn(task, 10, seed=3)
