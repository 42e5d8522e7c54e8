"""One run: train a model on a task, then test it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gdn import __version__
from gdn.core.device import machine
from gdn.data import Batch
from gdn.data.synthetic.base import IGNORE, Sample, Task
from gdn.experiments.definition import Row, Run, Training
from gdn.experiments.measure import score
from gdn.experiments.readout import build
from gdn.train import random_state
from gdn.train.distributed import World
from gdn.train.step import train_step

Watch = Callable[[int, float, float], Any]
"""Called at each look with the step, the loss and the score of the first test."""


def learn(run: Run, device: torch.device, watch: Watch = lambda step, loss, value: None) -> Row:
    """Train and test; the row of results."""
    began, training = time.monotonic(), run.training
    random_state.seed(run.seed)
    model = build(run.model, run.tasks[0]).to(device)
    optimizer, world = training.optim.build(model), World(device=device)
    curve: list[tuple[int, float]] = []
    losses: list[float] = []
    step = 0
    for step, sample in enumerate(stream(run.tasks, training, run.seed), start=1):
        for group in optimizer.param_groups:
            group["lr"] = training.optim.lr * training.schedule.factor(step - 1, training.steps)
        result = train_step(model, optimizer, [batch_of(sample)], world=world, precision=training.precision, clip=training.clip)
        losses.append(result.loss)
        if step % training.check_every == 0 or step == training.steps:
            value = score(model, run.tests[0], precision=training.precision, examples=min(256, run.tests[0].examples)).value
            curve.append((step, round(value, 4)))
            watch(step, result.loss, value)
            if training.enough is not None and len(curve) > 1 and min(value, curve[-2][1]) >= training.enough:
                break
    scores = {test.name: score(model, test, precision=training.precision) for test in run.tests}
    here = machine()
    return {
        "series": run.series,
        "x": run.x,
        "seed": run.seed,
        "scores": {name: round(found.value, 5) for name, found in scores.items()},
        "profiles": {name: found.profile for name, found in scores.items()},
        "curve": curve,
        "loss": round(math.fsum(losses[-20:]) / len(losses[-20:]), 5),
        "steps": step,
        "seconds": round(time.monotonic() - began, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": here.name if device.type != "cpu" else f"cpu ({here.threads} threads)",
        "torch": here.torch,
        "gdn": __version__,
        "run": run.to_dict(),
    }


def stream(tasks: Sequence[Task], training: Training, seed: int) -> Iterator[Sample]:
    """A batch for each step, from the tasks in turn: always new, or from a fixed set in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    if training.examples is None:
        for step in range(training.steps):
            yield tasks[step % len(tasks)].sample(training.batch, generator)
        return
    sets = [fixed_set(task, training.examples, generator) for task in tasks]
    left: list[list[torch.Tensor]] = [[] for _ in tasks]
    for step in range(training.steps):
        turn = step % len(tasks)
        if not left[turn]:
            shuffled = torch.randperm(training.examples, generator=generator)
            left[turn] = [piece for piece in shuffled.split(training.batch) if len(piece) == training.batch]
        chosen = left[turn].pop()
        yield Sample(sets[turn].tokens[chosen], sets[turn].targets[chosen])


def fixed_set(task: Task, examples: int, generator: torch.Generator) -> Sample:
    """Some examples of a task, drawn once."""
    parts = [task.sample(min(256, examples - i), generator) for i in range(0, examples, 256)]
    return Sample(torch.cat([part.tokens for part in parts]), torch.cat([part.targets for part in parts]))


def batch_of(sample: Sample) -> Batch:
    """A sample as the trainer's step takes it."""
    asked = int((sample.targets != IGNORE).sum())
    return Batch(tokens=sample.tokens, targets=sample.targets, packing=None, num_targets=asked, num_bytes=0)
