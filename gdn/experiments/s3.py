"""The word problem of S3, all orders of three things: one layer needs two writes a token (DeltaProduct, arXiv 2502.10297).

A write with beta = 2 reflects the state along its key. Permuting three things is reflecting and turning a triangle, and a turn is two
reflections, so a layer with one write a token cannot follow and one with two can. There is no convolution, no decay and no output gate, so
that nothing but the state can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdn.data.synthetic.group_words import GroupWords
from gdn.experiments import plots
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.mixers.deltaproduct import DeltaProduct
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEADS, HEAD_DIM, TRAINED, LONGEST, SEEDS = 64, 8, 16, 12, 48, 3


def runs(toy: bool) -> list[Run]:
    width, heads, trained, longest = (16, 2, 5, 8) if toy else (WIDTH, HEADS, TRAINED, LONGEST)
    tests = tuple(
        Test(name=f"length {n}", task=GroupWords(group="S3", elements=n), measure="sequences", examples=2 if toy else 256)
        for n in (trained, longest)
    )
    training = Training(
        steps=2 if toy else 300,
        batch=2 if toy else 64,
        optim=AdamW(lr=5e-3, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup=50, final_fraction=0.0),
        check_every=25,
    )
    return [
        Run(
            series=f"{writes} write{'s' if writes > 1 else ''} a token",
            seed=seed,
            model=LM.Config(vocab=tests[0].task.vocab, width=width, layers=1, mlp=2 * width, pattern=(mixer(writes, heads),)),
            tasks=(tests[0].task,),
            training=training,
            tests=tests,
        )
        for seed in range(1 if toy else SEEDS)
        for writes in (1, 2)
    ]


def mixer(writes: int, heads: int) -> DeltaProduct.Config:
    """DeltaProduct with beta up to 2."""
    return DeltaProduct.Config(
        householders=writes, gate=False, allow_neg_eigval=True, heads=heads, head_dim=HEAD_DIM, short_conv=False, output_gate=False
    )


def figure(rows: Sequence[Row]) -> Figure:
    short, longest = rows[0]["scores"]
    drawn, (left, right) = plots.panels(2, title="The word problem of S3 with one layer: how are three things ordered now?")
    plots.over_steps(left, rows)
    plots.finish(left, x="training step", y="words without an error", title=f"while learning, {short}", legend=True)
    plots.over_places(right, rows, longest)
    plots.finish(right, x="elements read", title=f"after training, up to {longest}")
    trained = rows[0]["run"]["tasks"][0]["elements"]
    right.axvline(trained, color="grey", linewidth=1)
    right.annotate(" trained up to here", (trained, 0.95), fontsize=8, color="grey")
    return drawn


EXPERIMENT = Experiment(
    name="s3",
    claim="One layer follows permutations of three things if it writes twice a token with beta up to 2, and not if it writes once.",
    runs=runs,
    figure=figure,
    published={"1 write a token": "fails", "2 writes a token": "solved at 512"},
    source="DeltaProduct (arXiv 2502.10297), figures: trained on 128 elements, tested on 512; width 128.",
)
