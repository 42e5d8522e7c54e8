"""Multi-query associative recall against the number of pairs, with a state much smaller than attention's cache: MQAR for a laptop.

Each recurrent model has a state of `KEYS` x `VALUES` numbers a head, a model of two layers without MLP one head in each. A delta rule can hold
as many pairs without error as keys are wide; a sum of outer products (gated linear attention) holds noisy ones from the first on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdn.data.synthetic.mqar import MQAR
from gdn.experiments import plots
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.mixers.attention import Attention
from gdn.mixers.base import MixerConfig
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEAD = 32, 16
PAIRS = (4, 8, 16, 32)
SEEDS = 2


def models() -> dict[str, MixerConfig]:
    """One head of 16 x 16 each; attention has a head of the same width and a cache of all tokens."""
    return {
        "Gated DeltaNet": GatedDeltaNet.Config(heads=1, head_dim=HEAD, expand_v=1.0),
        "DeltaNet": DeltaNet.Config(heads=1, head_dim=HEAD),
        "attention": Attention.Config(heads=2, head_dim=HEAD),
    }


def runs(toy: bool) -> list[Run]:
    found = []
    for pairs in (4,) if toy else PAIRS:
        task = MQAR(vocab=128, length=4 * pairs, pairs=pairs, random_fill=False)
        training = Training(
            steps=2 if toy else 600,
            batch=2 if toy else 32,
            optim=AdamW(lr=5e-3, betas=(0.9, 0.999), weight_decay=0.0),
            schedule=Schedule(warmup=20, final_fraction=0.0),
            enough=0.995,
        )
        found += [
            Run(
                series=series,
                x=float(pairs),
                seed=seed,
                model=LM.Config(vocab=task.vocab, width=WIDTH, layers=2, mlp=0, pattern=(mixer,)),
                task=task,
                training=training,
                tests=(Test(name="accuracy", task=task, examples=2 if toy else 256),),
            )
            for seed in range(1 if toy else SEEDS)
            for series, mixer in models().items()
        ]
    return found


def figure(rows: Sequence[Row]) -> Figure:
    drawn, (axes,) = plots.panels(1, title="MQAR: two layers, one head with a state of 16 x 16 numbers in each")
    plots.over_x(axes, rows, "accuracy")
    axes.set_xscale("log", base=2)
    plots.finish(axes, x="pairs of a key and a value in the context", y="fraction of values recalled", legend=True)
    axes.axvline(HEAD, color="grey", linewidth=1)
    axes.annotate(" as many pairs as\n keys are wide", (HEAD, 0.03), fontsize=8, color="grey")
    return drawn


EXPERIMENT = Experiment(
    name="mqar",
    claim="With a small state, the delta rule recalls more pairs than a sum of outer products, and attention recalls all.",
    runs=runs,
    figure=figure,
    x_name="pairs",
)
