"""What a model says, and how good that is."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from gdn.data.synthetic.base import IGNORE, Sample
from gdn.experiments.definition import Test
from gdn.experiments.readout import Model
from gdn.experiments.sets import Sets
from gdn.train.step import Precision, autocast

T = TypeVar("T")
POINTS = 64
"""A profile has at most this many places."""


@dataclass(frozen=True)
class Score:
    """The result of a test."""

    value: float
    profile: list[tuple[int, float]]
    """By place: the measure of the targets there (sequences: with all targets up to there hit). For hits only."""


def score(model: Model, test: Test, sample: Sample | None = None, *, precision: Precision = "fp32", examples: int | None = None) -> Score:
    """Put a model to a test, or to its first `examples`. `sample` are the test's sequences, if at hand. Puts the model in evaluation mode
    and back."""
    return whole(scoring(model, test, Sets().test(test) if sample is None else sample, precision, examples))


@torch.no_grad()
def scoring(model: Model, test: Test, sample: Sample, precision: Precision, examples: int | None = None) -> Generator[None, None, Score]:
    """`score` in steps: pauses after each batch."""
    tally, count = Tally(), min(examples or test.examples, test.examples)
    for begin in range(0, count, test.batch):
        part = sample.part(begin, min(begin + test.batch, count))
        asked = part.targets != IGNORE
        training = model.training
        model.eval()
        with autocast(model.device, precision):
            logits = model.logits(part.tokens.to(model.device), asked.to(model.device)).float()
        model.train(training)
        tally.add(part, asked, logits)
        yield
    return Score(MEASURES[test.measure](tally), tally.profile(whole=test.measure == "sequences"))


def whole(steps: Generator[Any, None, T]) -> T:
    """What something done in steps returns in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@dataclass
class Tally:
    """What is remembered of a test."""

    hits: list[Tensor] = field(default_factory=list)
    asked: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    legal: list[Tensor] = field(default_factory=list)
    distance: list[Tensor] = field(default_factory=list)

    def add(self, sample: Sample, asked: Tensor, logits: Tensor) -> None:
        """A batch, with `[n, vocab]` logits for the places that are asked."""
        said = logits.argmax(dim=-1).cpu()
        hits = torch.zeros_like(asked)
        hits[asked] = said == sample.targets[asked]
        self.hits.append(hits)
        self.asked.append(asked)
        self.targets.append(sample.targets)
        if sample.next_token is not None:
            truth = sample.next_token[asked]
            self.legal.append(truth.gather(1, said[:, None])[:, 0] > 0)
            self.distance.append((logits.softmax(-1).cpu() - truth).abs().sum(-1) / 2)

    def profile(self, *, whole: bool) -> list[tuple[int, float]]:
        """The fraction hit at each place that is asked; `whole`: the fraction of sequences without a miss so far."""
        hits, asked = torch.cat(self.hits), torch.cat(self.asked)
        good = (hits | ~asked).int().cummin(dim=1).values.bool() if whole else hits
        counted = torch.ones_like(asked) if whole else asked
        counts = counted.sum(0)
        share = (good & counted).sum(0) / counts.clamp(min=1)
        places = (asked.any(0) & (counts > 0)).nonzero().flatten().tolist()
        if len(places) > POINTS:
            places = [places[round(i * (len(places) - 1) / (POINTS - 1))] for i in range(POINTS)]
        return [(place, round(float(share[place]), 4)) for place in places]


def _tokens(tally: Tally) -> float:
    return float(torch.cat(tally.hits)[torch.cat(tally.asked)].float().mean())


def _sequences(tally: Tally) -> float:
    return float((torch.cat(tally.hits) | ~torch.cat(tally.asked)).all(dim=1).float().mean())


def _classes(tally: Tally) -> float:
    asked, hits, targets = torch.cat(tally.asked), torch.cat(tally.hits), torch.cat(tally.targets)
    counts = torch.bincount(targets[asked])
    right = torch.bincount(targets[asked], weights=hits[asked].double(), minlength=len(counts))
    return float((right[counts > 0] / counts[counts > 0]).mean())


MEASURES: dict[str, Callable[[Tally], float]] = {
    "tokens": _tokens,
    "sequences": _sequences,
    "classes": _classes,
    "legal": lambda tally: float(torch.cat(tally.legal).float().mean()),
    "distance": lambda tally: float(torch.cat(tally.distance).mean()),
}
