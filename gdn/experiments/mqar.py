"""Multi-query associative recall against the number of pairs, with a state much smaller than attention's cache: MQAR for a laptop.

Every recurrent model has two layers without MLP and one head with a state of 16 x 16 numbers in each. A delta rule can hold as many pairs
without error as keys are wide; a sum of outer products (gated linear attention) holds noisy ones from the first on.
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
from gdn.mixers.gla import GLA
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEAD = 64, 16
PAIRS = (4, 8, 16, 32)
SEEDS = 3


def models() -> dict[str, MixerConfig]:
    """One head of 16 x 16 each; attention has two heads of the same width and a cache of all tokens.

    Two things of Gated DeltaNet are set for so small a model, without which it had not begun to learn after 700 steps: decay starts slow
    (rates below 1; with the default of up to 16 a single head forgets within a few pairs), and there is no output gate, as in zoology.
    """
    return {
        "GDN": GatedDeltaNet.Config(heads=1, head_dim=HEAD, expand_v=1.0, decay_range=(0.01, 1.0), output_gate=False),
        "DeltaNet": DeltaNet.Config(heads=1, head_dim=HEAD),
        "gated linear attention": GLA.Config(heads=1, expand_k=HEAD / WIDTH, expand_v=HEAD / WIDTH, short_conv=True),
        "attention": Attention.Config(heads=2, head_dim=HEAD),
    }


def runs(toy: bool) -> list[Run]:
    tasks = [MQAR(vocab=128, length=4 * pairs, pairs=pairs, random_fill=False) for pairs in PAIRS]
    training = Training(
        steps=2 if toy else 3000,
        batch=2 if toy else 32,
        optim=AdamW(lr=5e-3, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup=20, final_fraction=0.0),
    )
    return [
        Run(
            series=series,
            seed=seed,
            model=LM.Config(vocab=128, width=WIDTH, layers=2, mlp=0, pattern=(mixer,)),
            tasks=tuple(tasks),
            training=training,
            tests=tuple(Test(name=f"{task.pairs} pairs", task=task, examples=2 if toy else 256) for task in tasks),
        )
        for seed in range(1 if toy else SEEDS)
        for series, mixer in models().items()
    ]


def figure(rows: Sequence[Row]) -> Figure:
    drawn, (axes,) = plots.panels(1, title="MQAR: two layers, one head with a state of 16 x 16 numbers in each")
    plots.over_tests(axes, rows, {f"{pairs} pairs": float(pairs) for pairs in PAIRS})
    plots.doubling(axes, PAIRS)
    plots.finish(axes, x="pairs of a key and a value in the context", y="fraction of values recalled", legend=True)
    axes.axvline(HEAD, color="grey", linewidth=1)
    axes.annotate(" as many pairs as\n keys are wide", (HEAD, 0.0), fontsize=8, color="grey")
    return drawn


EXPERIMENT = Experiment(
    name="mqar",
    claim="With the same small state and 3000 steps, the delta rule recalls more pairs than a sum of outer products.",
    runs=runs,
    figure=figure,
    published={"attention": "solved (figure)", "DeltaNet": "solved (figure)"},
    source="Zoology (arXiv 2312.04927) and DeltaNet (arXiv 2406.06484), as figures only: up to 64 pairs of 512 tokens, width 64 and more.",
)
