"""One run: train a model on a task, then test it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from gdn import __version__
from gdn.core.device import machine
from gdn.core.errors import NonFiniteError
from gdn.experiments.definition import Row, Run
from gdn.experiments.inputs import stream
from gdn.experiments.measure import Score, scoring, whole
from gdn.experiments.readout import build
from gdn.experiments.sets import Sets
from gdn.experiments.update import Update, cuda_graph, own_stream
from gdn.train import random_state

Watch = Callable[[int, float, float], Any]
"""Called at each look with the step, the loss and the score of the first test."""
LOOK = 256
"""Sequences of the first test that a look on the way takes, at most."""


def silent(step: int, loss: float, value: float) -> None:
    """Watches nothing."""


def learn(run: Run, device: torch.device, watch: Watch = silent, sets: Sets | None = None) -> Row:
    """Train and test; the row of results."""
    with own_stream(device):
        return whole(learning(run, device, watch, sets or Sets()))


def learning(run: Run, device: torch.device, watch: Watch, sets: Sets) -> Generator[bool, None, Row]:
    """`learn` in steps: pauses after each update, so that others can have their turn. True says that what comes next waits for the device.

    Everything that is drawn from the generators of the process is drawn before the first pause: no run depends on those beside it.
    """
    began, training = time.monotonic(), run.training
    random_state.seed(run.seed)
    model = build(run.model, run.tasks[0]).to(device)
    update = Update(model, training, cuda_graph if device.type == "cuda" else None)
    samples = [sets.test(test) for test in run.tests]
    yield False
    for task in run.tasks:
        while training.examples is not None and sets.being_drawn(task, training.examples, run.seed):
            yield False
    curve: list[tuple[int, float]] = []
    step = 0
    for step, inputs in enumerate(stream(run.tasks, training, run.seed, device, sets), start=1):
        update(step, inputs)
        yield False
        if step % training.check_every == 0 or step == training.steps:
            yield True
            loss = finite(update.losses[:step], step)
            value = (yield from pausing(scoring(model, run.tests[0], samples[0], training.precision, LOOK))).value
            curve.append((step, round(value, 4)))
            watch(step, loss, value)
            if training.enough is not None and len(curve) > 1 and min(value, curve[-2][1]) >= training.enough:
                break
    last = update.losses[max(0, step - 20) : step].double().mean()
    scores = {}
    for test, sample in zip(run.tests, samples):
        scores[test.name] = yield from pausing(scoring(model, test, sample, training.precision))
    here = machine()
    return {
        "series": run.series,
        "x": run.x,
        "seed": run.seed,
        "scores": {name: round(found.value, 5) for name, found in scores.items()},
        "profiles": {name: found.profile for name, found in scores.items()},
        "curve": curve,
        "loss": round(float(last), 5),
        "steps": step,
        "seconds": round(time.monotonic() - began, 1),
        "replayed": update.replayed,
        **({"not_captured": update.refused} if update.refused else {}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": here.name if device.type != "cpu" else f"cpu ({here.threads} threads)",
        "torch": here.torch,
        "gdn": __version__,
        "run": run.to_dict(),
    }


def pausing(steps: Generator[None, None, Score]) -> Generator[bool, None, Score]:
    """Pauses where `steps` does; the device has nothing to do then."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
        yield False


def finite(losses: torch.Tensor, step: int) -> float:
    """The last of the losses up to a step; raises `NonFiniteError` for the first that is no number. The host waits for the device here."""
    values = losses.tolist()
    for number, loss in enumerate(values, start=1):
        if not math.isfinite(loss):
            raise NonFiniteError(f"the loss of step {number} is {loss}")
    return values[step - 1]
