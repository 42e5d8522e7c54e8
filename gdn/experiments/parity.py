"""Parity of a bit stream: a layer solves it if its transition can reflect (eigenvalue 1 - beta below 0), and not otherwise.

The state of a head is multiplied at each token by alpha (I - beta k k'). With beta in (0, 1) all eigenvalues are positive and nothing can
flip for ever; with beta up to 2 a one flips a sign and a zero keeps it, which is parity at any length (Grazzi et al., arXiv 2411.12537).
There is no convolution: a key that depends on the bits before is a little different each time, and so is what it reflects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdn.data.synthetic.parity import Parity
from gdn.experiments import plots
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.mixers.base import MixerConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.gla import GLA
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 3
TRAINED = 32
LONGEST = 256


def models() -> dict[str, MixerConfig]:
    """One layer of each, with a long memory from the start: decay rates below 0.01 and time steps about 0.05."""
    delta = GatedDeltaNet.Config(heads=2, head_dim=16, expand_v=1.0, short_conv=False, decay_range=(1e-4, 1e-2), dt_range=(0.04, 0.06))
    return {
        "GDN, beta in (0, 2)": delta.with_(allow_neg_eigval=True),
        "GDN, beta in (0, 1)": delta,
        "gated linear attention": GLA.Config(heads=2, expand_k=1.0, expand_v=1.0),
    }


def runs(toy: bool) -> list[Run]:
    trained, longest = (8, 16) if toy else (TRAINED, LONGEST)
    training = Training(
        steps=2 if toy else 400,
        batch=2 if toy else 32,
        optim=AdamW(lr=3e-3, betas=(0.9, 0.999), weight_decay=0.0),
        schedule=Schedule(warmup=20, final_fraction=0.0),
        check_every=25,
    )
    tests = tuple(
        Test(name=f"length {n}", task=Parity(length=n, shortest=n, running=True), examples=2 if toy else 256) for n in (trained, longest)
    )
    return [
        Run(
            series=series,
            seed=seed,
            model=LM.Config(vocab=3, width=16 if toy else 32, layers=1, mlp=16 if toy else 64, pattern=(mixer,)),
            tasks=(Parity(length=trained, shortest=trained, running=True),),
            training=training,
            tests=tests,
        )
        for seed in range(1 if toy else SEEDS)
        for series, mixer in models().items()
    ]


def figure(rows: Sequence[Row]) -> Figure:
    longest = list(rows[0]["scores"])[-1]
    drawn, (left, right) = plots.panels(2, title="Parity with one layer: is the number of ones so far odd?")
    plots.over_steps(left, rows)
    plots.finish(left, x="training step", y="accuracy", title="while learning", chance=0.5, legend=True)
    plots.over_places(right, rows, longest)
    plots.finish(right, x="bits read", title=f"after training, up to {longest}", chance=0.5)
    trained = rows[0]["run"]["tasks"][0]["length"]
    right.axvline(trained, color="grey", linewidth=1)
    right.annotate(" trained up to here", (trained, 0.05), fontsize=8, color="grey")
    return drawn


EXPERIMENT = Experiment(
    name="parity",
    claim="One layer learns parity if beta may reach 2, and stays at guessing if beta stays below 1 or nothing is corrected.",
    runs=runs,
    figure=figure,
    published={"GDN, beta in (0, 2)": "1.000 (DeltaNet)", "GDN, beta in (0, 1)": "0.017 (DeltaNet)"},
    source="Grazzi et al., 2 layers, trained on 3 to 40 bits, tested on 40 to 256; accuracy scaled so that guessing is 0.",
)
