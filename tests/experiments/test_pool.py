"""Runs in several processes: all are done, failures are told with their run, the budget ends what has not begun."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gdn.core.errors import ConfigError, ExperimentError
from gdn.data.synthetic import MQAR, Parity
from gdn.experiments import conduct as module
from gdn.experiments import sets
from gdn.experiments.conduct import conduct_all, read
from gdn.experiments.definition import Experiment, Run, Test, Training
from gdn.experiments.pool import Outcome, Worker
from gdn.experiments.sets import Sets
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

CPU = torch.device("cpu")
TASK = Parity(length=6, shortest=6, running=True)


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


def test_a_worker_that_dies_is_told_and_replaced(tmp_path: Path) -> None:
    worker = Worker(CPU, 1, tmp_path)
    worker.give(7, run(training=Training(steps=10**6, batch=4)))
    assert worker.process.pid is not None
    os.kill(worker.process.pid, signal.SIGKILL)
    assert worker.take() == Outcome(7, None, "its process ended (SIGKILL)")
    assert not worker.alive
    worker.stop()


def test_first_seeds_come_first_and_the_budget_ends_what_has_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real, now = module.learn, [0.0]

    def counted(run: Run, *rest: Any) -> Any:
        done.append(run.title)
        now[0] += 10
        return real(run, *rest)

    monkeypatch.setattr(module, "learn", counted)
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    told = io.StringIO()
    chosen = [(experiment(name, run(name), run(name, 1)), tmp_path / name) for name in ("one", "two")]
    conduct_all(chosen, CPU, budget=25, console=Console(file=told, width=200))
    assert done == ["one, seed 0", "two, seed 0", "one, seed 1"]
    assert "1 runs were not begun: the budget of 25 s is spent" in told.getvalue()
    with pytest.raises(ConfigError, match="jobs: expected at least 1"):
        conduct_all(chosen, CPU, jobs=0)
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
