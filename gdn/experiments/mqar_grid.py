"""MQAR on the grid that tells the families apart: keys of 64 channels, up to 256 pairs, asked at once or after a gap.

Two layers without MLP, width 128, two heads: each head of a delta-rule model has a state of 64 x 64 and can hold 64 pairs without error. A
sequence of length 4n asks at once; one of length 8n has as many random tokens between as it has pairs and questions, so memory that fades
by itself shows. A quarter and half as many pairs as keys have channels, as many, and two and four times as many.

As in the published sweep a model learns all sizes together, from 4 pairs on: with 64 pairs alone no model, attention included, had begun
to recall after 2000 steps. That sweep has 8192 tokens, 180 000 sequences, 22 500 steps and the best of four learning rates. Here 2048
tokens, so that each is seen more often, 20 000 sequences of each size, 4000 steps, and two rates; the picture shows each model's better
one. As there, delta rules have no output gate. Other than there, questions come anywhere after the pairs, every place alike (`power=1`):
with the published 0.01 most of them come soon after, and nearly in the order of the pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING

from gdn.data.synthetic.mqar import MQAR
from gdn.experiments import models, plots
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.mixers.base import MixerConfig
from gdn.mixers.deltaproduct import DeltaProduct
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.gla import GLA
from gdn.mixers.mamba2 import Mamba2
from gdn.mixers.retnet import RetNet
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEADS, VOCAB = 128, 2, 2048
LEARNED = {4: 64, 8: 64, 16: 128, 32: 256, 64: 512, 128: 1024, 256: 2048}
"""Lengths of the sequences of each number of pairs that are learned from."""
PAIRS = (64, 16, 32, 128, 256)
"""That are tested, the number of channels first: it decides when a model has learned enough."""
GAPS = {"length 4n": 4, "length 8n": 8}
TITLES = {"length 4n": "length 4n: asked at once", "length 8n": "length 8n: asked at any time after"}
EXAMPLES = 20_000
RATES = (3.2e-3, 1e-3)


def small(width: int) -> dict[str, MixerConfig]:
    """Sums of outer products: with states as published, half the size of a delta rule's, and with heads as a delta rule has them, with a
    decay that depends on the input or does not."""
    return {
        "Mamba2, states of 16": Mamba2.Config(head_dim=min(64, width), state_dim=16, decay_range=models.SLOW_DECAY),
        "GLA": GLA.Config(heads=HEADS, expand_k=1.0, short_conv=True),
        "RetNet": RetNet.Config(heads=HEADS, expand_v=1.0),
    }


def runs(toy: bool) -> list[Run]:
    seeds = range(1 if toy else 3)
    found = [_run(series, rate, seed, toy) for seed in seeds for series, rate in models.every(RATES, toy=toy)]
    rates = RATES[: 1 if toy else None]
    return found + [_run(series, rate, seed, toy) for seed in seeds for rate in rates for series in small(WIDTH)]


def _run(series: str, rate: float, seed: int, toy: bool) -> Run:
    width, vocab, learned, pairs = (16, 64, {2: 16, 16: 64}, (16,)) if toy else (WIDTH, VOCAB, LEARNED, PAIRS)
    task = MQAR(vocab=vocab, power=1.0)
    training = Training(
        steps=2 if toy else 4000,
        batch=2 if toy else 64,
        optim=AdamW(lr=rate, betas=(0.9, 0.999), weight_decay=0.1),
        schedule=Schedule(warmup=100, final_fraction=0.0),
        precision="fp32" if toy else "bf16",
        examples=4 if toy else EXAMPLES,
        check_every=500,
        enough=0.999,
    )
    few = small(width)
    pattern = (few[series],) if series in few else models.pattern(series, width, HEADS, max(learned.values()) // 4)
    mixers = tuple(_ungated(mixer) for mixer in pattern)
    return Run(
        series=series,
        x=rate,
        seed=seed,
        model=LM.Config(vocab=vocab, width=width, layers=models.depth(mixers, 2), mlp=0, pattern=mixers),
        tasks=tuple(task.with_(length=length, pairs=n) for n, length in learned.items()),
        training=training,
        tests=tuple(
            Test(
                name=name(n, gap),
                task=task.with_(length=factor * n, pairs=n),
                examples=2 if toy else 512,
                batch=2 if toy else 128,
            )
            for n in pairs
            for gap, factor in reversed(GAPS.items())
        ),
    )


def name(pairs: int, gap: str) -> str:
    """Of a test."""
    return f"{pairs} pairs, {gap}"


def _ungated(mixer: MixerConfig) -> MixerConfig:
    """Delta rules have no output gate in the published sweep."""
    return mixer.with_(output_gate=False) if isinstance(mixer, GatedDeltaNet.Config | DeltaProduct.Config) else mixer


def better(rows: Sequence[Row]) -> list[Row]:
    """The rows of each model's better learning rate, by the mean of its scores, without the rate."""
    found = []
    for series in dict.fromkeys(row["series"] for row in rows):
        by_rate: dict[float, list[Row]] = {}
        for row in rows:
            if row["series"] == series:
                by_rate.setdefault(row["x"], []).append(row)
        found += max(by_rate.values(), key=lambda group: mean(value for row in group for value in row["scores"].values()))
    return [row | {"x": ""} for row in found]


def figure(rows: Sequence[Row]) -> Figure:
    drawn, panels = plots.panels(2, title="MQAR: recall against the number of pairs, keys of 64 channels")
    shown = better(rows)
    for axes, gap in zip(panels, GAPS):
        plots.over_tests(axes, shown, {name(n, gap): float(n) for n in sorted(PAIRS)})
        plots.doubling(axes, sorted(PAIRS))
        plots.finish(axes, x="pairs n", y="fraction of values recalled", title=TITLES[gap])
        axes.axvline(WIDTH // HEADS, color="grey", linewidth=1)
        axes.annotate("as many pairs as \nkeys have channels ", (WIDTH // HEADS, 0.74), ha="right", fontsize=8, color="grey")
    plots.legend(drawn, panels)
    return drawn


EXPERIMENT = Experiment(
    name="mqar_grid",
    claim="Attention recalls everything, the delta rule about as many pairs as keys have channels, sums of outer products fewer.",
    runs=runs,
    figure=figure,
    x_name="learning rate",
    published={"Transformer": "solved (figure)", "DeltaNet": "solved (figure)"},
    source="Zoology (arXiv 2312.04927) and DeltaNet (arXiv 2406.06484), as figures only: up to 64 pairs of 512 tokens, width 64 and more.",
)
