"""MQAR on the grid that tells the families apart: keys of 64 channels, 32 to 128 pairs, asked soon or after a gap.

Two layers without MLP, width 128, two heads: each head of a delta-rule model has a state of 64 x 64 and can hold 64 pairs without error. A
sequence of length 4n asks at once; one of length 8n has as many random tokens between as it has pairs and questions, so memory that fades
by itself shows. As many pairs as half the channels, as many, and twice as many: more settings say nothing new.

The published data has 8192 tokens and 100 000 sequences, and the best of four learning rates counts. Here 2048 tokens, so that each is seen
as often in 2000 steps as there in 8000, 20 000 sequences, and one rate between their best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdn.data.synthetic.mqar import MQAR
from gdn.experiments import models, plots
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEADS, VOCAB = 128, 2, 2048
PAIRS = (32, 64, 128)
GAPS = {"length 4n": 4, "length 8n": 8}
TOKENS = 16_384
"""Of a batch."""
EXAMPLES = 20_000


def runs(toy: bool) -> list[Run]:
    settings = (4,) if toy else PAIRS
    return [_run(series, pairs, seed, toy) for seed in range(1 if toy else 3) for series, pairs in models.every(settings, toy=toy)]


def _run(series: str, pairs: int, seed: int, toy: bool) -> Run:
    width, vocab = (16, 64) if toy else (WIDTH, VOCAB)
    tasks = {name: MQAR(vocab=vocab, length=factor * pairs, pairs=pairs, power=1.0) for name, factor in GAPS.items()}
    training = Training(
        steps=2 if toy else 2000,
        batch=2 if toy else max(16, TOKENS // (6 * pairs)),
        optim=AdamW(lr=2e-3, betas=(0.9, 0.999), weight_decay=0.1),
        schedule=Schedule(warmup=100, final_fraction=0.0),
        precision="fp32" if toy else "bf16",
        examples=4 if toy else EXAMPLES,
        enough=0.995,
    )
    mixers = models.pattern(series, width, HEADS, 4 * pairs)
    return Run(
        series=series,
        x=float(pairs),
        seed=seed,
        model=LM.Config(vocab=vocab, width=width, layers=models.depth(mixers, 2), mlp=0, pattern=mixers),
        tasks=tuple(tasks.values()),
        training=training,
        tests=tuple(
            Test(name=name, task=task, examples=2 if toy else 512, batch=2 if toy else 128) for name, task in reversed(tasks.items())
        ),
    )


def figure(rows: Sequence[Row]) -> Figure:
    drawn, panels = plots.panels(2, title="MQAR: fraction of values recalled, keys of 64 channels")
    for axes, test in zip(panels, GAPS):
        plots.over_x(axes, rows, test)
        axes.set_xscale("log", base=2)
        plots.finish(axes, x="pairs n", title=test, legend=axes is panels[0])
        axes.axvline(WIDTH // HEADS, color="grey", linewidth=1)
    return drawn


EXPERIMENT = Experiment(
    name="mqar_grid",
    claim="Attention recalls everything, the delta rule about as many pairs as keys have channels, sums of outer products fewer.",
    runs=runs,
    figure=figure,
    x_name="pairs",
)
