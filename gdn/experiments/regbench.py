"""RegBench: how many sequences, each of another random automaton, until a model has learned to learn automata in context?

Accuracy is the fraction of predicted symbols that the automaton allows, distance the total variation to its true distribution
(arXiv 2401.12973: Transformers ahead of RetNet, Mamba, GLA; DeltaNet's paper adds DeltaNet close to the Transformer, as a figure).
Their settings: width 256, 8 layers, 200 epochs in batches of 32 (6250 steps for 1000 sequences, 250 000 for their largest set), AdamW 5e-4.
Here width 128, 4 layers, and 2000 steps in batches of 16 at 1e-3 whatever the number of sequences; cosine with a tenth of warm-up and a
floor of a tenth, as there. DeltaNet without its convolution shows what that does for it. And with 5000 sequences the Transformer and
DeltaNet once more in the published size, at 5e-4 for 3000 steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdn.data.synthetic.regbench import RegBench
from gdn.experiments import models, plots
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.mixers.deltanet import DeltaNet
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEADS, LAYERS, STEPS, BATCH = 128, 2, 4, 2000, 16
EXAMPLES = (1000, 5000)
LARGE_WIDTH, LARGE_LAYERS, LARGE_STEPS, LARGE_RATE = 256, 8, 3000, 5e-4
LARGE = ("Transformer", "DeltaNet")
SIZE = f", {LARGE_LAYERS} layers of {LARGE_WIDTH}"


def runs(toy: bool) -> list[Run]:
    settings = (4,) if toy else EXAMPLES
    width, window = (16, 10) if toy else (WIDTH, RegBench().length // 4)
    found = []
    for seed in range(1 if toy else 3):
        for series, examples in models.every(settings, toy=toy):
            found.append(_run(series, models.pattern(series, width, HEADS, window), examples, seed, toy))
        for examples in settings:
            plain = DeltaNet.Config(heads=HEADS, head_dim=width // HEADS, short_conv=False)
            found.append(_run("DeltaNet, no convolution", (plain,), examples, seed, toy))
        for series in LARGE:
            found.append(_large(series, settings[-1], seed, window, toy))
    return found


def _large(series: str, examples: int, seed: int, window: int, toy: bool) -> Run:
    """A run in the published size."""
    width, layers, steps = (32, 3, 2) if toy else (LARGE_WIDTH, LARGE_LAYERS, LARGE_STEPS)
    run = _run(series, models.pattern(series, width, 2 * HEADS, window), examples, seed, toy)
    return run.with_(
        series=run.series + SIZE,
        model=run.model.with_(width=width, layers=layers, mlp=3 * width),
        training=run.training.with_(
            steps=steps, optim=run.training.optim.with_(lr=LARGE_RATE), schedule=run.training.schedule.with_(warmup=steps // 10)
        ),
    )


def _run(series: str, mixers: models.Pattern, examples: int, seed: int, toy: bool) -> Run:
    width, batch, task = (16, 2, RegBench(length=40)) if toy else (WIDTH, BATCH, RegBench())
    steps = 2 if toy else STEPS
    training = Training(
        steps=steps,
        batch=batch,
        optim=AdamW(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.1),
        schedule=Schedule(warmup=steps // 10, final_fraction=0.1),
        examples=examples,
        precision="fp32" if toy else "bf16",
        check_every=max(1, steps // 10),
    )
    test = Test(name="legal", task=task, measure="legal", examples=2 if toy else 500, batch=2 if toy else 50)
    return Run(
        series=series,
        x=float(examples),
        seed=seed,
        model=LM.Config(
            vocab=task.vocab,
            width=width,
            layers=2 if toy else LAYERS,
            mlp=3 * width,
            pattern=mixers,
        ),
        tasks=(task,),
        training=training,
        tests=(test, test.with_(name="distance", measure="distance")),
    )


def figure(rows: Sequence[Row]) -> Figure:
    drawn, (left, right) = plots.panels(2, title="RegBench: learning random automata in context")
    for axes, test, title in ((left, "legal", "symbols that can follow"), (right, "distance", "distance to the true distribution")):
        plots.over_x(axes, rows, test)
        plots.doubling(axes, EXAMPLES)
        plots.finish(axes, x="training sequences", title=title)
    plots.legend(drawn, (left, right))
    return drawn


EXPERIMENT = Experiment(
    name="regbench",
    claim="The delta rule learns automata in context from fewer sequences than other recurrences, nearly as few as attention needs.",
    runs=runs,
    figure=figure,
    later=lambda run: True,
    x_name="sequences",
    published={"Transformer": "ahead (figure)", "DeltaNet": "close to the Transformer (figure)", "Mamba2": "behind (figure, Mamba)"},
    source="RegBench (arXiv 2401.12973) and DeltaNet (arXiv 2406.06484), as figures only; width 256 and more, 8 or 12 layers, 200 epochs.",
)
