"""Group word problems of S3, S4, A5 and S5 with one layer and one to four writes a token (DeltaProduct, arXiv 2502.10297).

The authors' models: width 128, 8 heads of 32, no convolution, decay or output gate. They train on 100 000 words of 128 elements in batches
of 2048 for 100 epochs (4900 steps, AdamW 1e-3) and test on 512. Here words have 63 elements (64 tokens) and are tested on 255, and training
is 3000 steps of 256 words at 2e-3, stopped when 95 % of the long words are right. A word is right up to an element if every product up to
there is. Stopping when the short words are right would be too early: two writes a token had them all after 300 steps of S3 and not one long
word in a hundred. With two writes S3 is learned in words of 128 as well, 1200 steps of 128 words, stopped when 99 % of the words of 512 are
right.

A5 and S5 are learned in stages, 7000 steps of 512 words at 3e-3 in all: words of 6 generators, of 6 elements of any kind, of 12, of 24, and
for the second half of 63. With all elements from the first step, in words of 12, 24 and 63 in turn, nothing had begun to be learned after
6000: 60 or 120 elements have thousands of products of two, which an MLP learns by heart and then no more, while with few elements following
the state is the shorter way. Which few matters. In three dimensions, where A5 turns an icosahedron, every element is two reflections, and
cycles of five show no other way: where A5 permutes five things they are four. A model that had begun with the cycles of three, two
reflections there too, was stuck with two writes. The generators of S5 are swaps, one reflection each.

Hybrids have a layer of each of their mixers, two or three instead of one, and attention there sees a quarter of the long words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gdn.data.synthetic.group_words import GroupWords
from gdn.experiments import plots
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.experiments.models import Pattern
from gdn.mixers.attention import Attention
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.deltaproduct import DeltaProduct
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.gsa import GSA
from gdn.mixers.mamba2 import Mamba2
from gdn.mixers.swat import Swat
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEADS, TRAINED, LONGEST = 128, 8, 63, 255
SHORTER = (6, 12, 24)
"""Elements of words in the stages before the last."""
GENERATORS = {"A5": {"least": 5}, "S5": {"limit": 2}}
"""Which elements the words of the first stage have."""
WORDS = 100_000
EASY, HARD = ("S3", "S4"), ("A5", "S5")
LONG_WORDS = "S3, trained on 128"


def named(writes: int) -> str:
    """The series of DeltaProduct."""
    return f"{writes} write{'s' if writes > 1 else ''} a token"


def models(width: int, heads: int, window: int) -> dict[str, Pattern]:
    """The mixers of each model: DeltaProduct by writes, and what should not be able to follow."""
    head_dim = width // 4  # as published: eight heads of 32 at width 128
    gated = GatedDeltaNet.Config(heads=heads, head_dim=head_dim, expand_v=1.0)
    mamba2 = Mamba2.Config(head_dim=head_dim, state_dim=head_dim)
    attention = Attention.Config(heads=heads, head_dim=head_dim)
    product = DeltaProduct.Config(
        householders=1, gate=False, allow_neg_eigval=True, heads=heads, head_dim=head_dim, short_conv=False, output_gate=False
    )
    return {
        **{named(n): (product.with_(householders=n),) for n in (4, 3, 2, 1)},
        "2 writes, beta < 1": (product.with_(householders=2, allow_neg_eigval=False),),
        "Gated DeltaNet": (gated,),
        "Gated DeltaNet, beta < 2": (gated.with_(allow_neg_eigval=True),),
        "DeltaNet": (DeltaNet.Config(heads=heads, head_dim=head_dim),),
        "Mamba2": (mamba2,),
        "GSA": (GSA.Config(heads=heads, slots=head_dim),),
        "SWAT": (Swat.Config(heads=heads, head_dim=head_dim, window=window),),
        "Transformer": (attention,),
        "Gated DeltaNet-H1, 2 layers": (gated, attention.with_(window=window)),
        "Gated DeltaNet-H2, 3 layers": (mamba2, gated, attention.with_(window=window)),
    }


def stages(words: GroupWords) -> tuple[GroupWords, ...]:
    """What is learned before words of full length, and those, half of the time."""
    first = words.with_(elements=SHORTER[0], **GENERATORS[words.group])
    return (first, *(words.with_(elements=n) for n in SHORTER), words, words, words, words)


def runs(toy: bool) -> list[Run]:
    width, heads, trained, longest = (16, 2, 5, 8) if toy else (WIDTH, HEADS, TRAINED, LONGEST)
    training = Training(
        steps=2 if toy else 3000,
        batch=2 if toy else 256,
        optim=AdamW(lr=2e-3, betas=(0.9, 0.999), weight_decay=1e-6),
        examples=4 if toy else WORDS,
        schedule=Schedule(warmup=100, final_fraction=0.0),
        precision="fp32" if toy else "bf16",
        check_every=100,
        enough=0.95,
    )
    in_stages = training.with_(
        steps=8 if toy else 7000,  # one of each stage, or 875
        batch=2 * training.batch,
        order="stages",
        optim=training.optim.with_(lr=3e-3),
    )
    found = []
    for seed in range(1 if toy else 3):
        for group in (*EASY[: 1 if toy else None], *HARD):
            tests = tuple(
                Test(
                    name=f"length {n}",
                    task=GroupWords(group=group, elements=n),
                    measure="sequences",
                    examples=2 if toy else 512,
                    batch=2 if toy else 256,
                )
                for n in (longest, trained)
            )
            words = GroupWords(group=group, elements=trained)
            found += [
                Run(
                    series=series,
                    x=group,
                    seed=seed,
                    model=LM.Config(vocab=words.vocab, width=width, layers=len(mixers), mlp=4 * width * 2 // 3, pattern=mixers),
                    tasks=stages(words) if group in HARD else (words,),
                    training=in_stages if group in HARD else training,
                    tests=tests,
                )
                for series, mixers in models(width, heads, (longest + 1) // 4).items()
            ]
        found += [_in_long_words(run, toy) for run in found if run.seed == seed and run.x == "S3" and run.series == named(2)]
    return found


def _in_long_words(run: Run, toy: bool) -> Run:
    """The same group in words as long as the published ones, and as many tokens in a batch as else."""
    trained, longest = (6, 9) if toy else (128, 512)
    words = GroupWords(group=str(run.x), elements=trained)
    training = run.training.with_(enough=0.99, check_every=50, precision="fp32")
    return run.with_(
        x=LONG_WORDS,
        tasks=(words,),
        training=training if toy else training.with_(batch=128, steps=1200),
        tests=tuple(
            test.with_(name=f"length {n}", task=words.with_(elements=n)) for test, n in zip(run.tests, (longest, trained), strict=True)
        ),
    )


TITLE = "Word problems with one layer of DeltaProduct by writes a token, beta < 2, and of others\nEach line is a seed"
STYLES = {named(n): style for n, style in ((4, ("C3", 4.5)), (3, ("C1", 3.0)), (2, ("C0", 1.8)), (1, ("black", 1.2)))}
"""Colour and width of DeltaProduct's lines; fewer writes are drawn thinner and above more, so that equal lines can all be seen."""


def figure(rows: Sequence[Row]) -> Figure:
    groups = list(dict.fromkeys(row["x"] for row in rows))
    drawn, panels = plots.panels(len(groups), title=TITLE, height=3.4, across=2)
    for axes, group in zip(panels, groups):
        mine = [row for row in rows if row["x"] == group]
        longest, trained = next(iter(mine[0]["scores"])), mine[0]["run"]["tasks"][-1]["elements"]
        for row in mine:
            _line(axes, row, longest, trained)
        plots.finish(axes, x="elements read", y="words without an error so far", title=group)
        axes.axvline(trained, color="grey", linewidth=1)
        axes.annotate(" trained up to here", (trained, 0.02), fontsize=8, color="grey")
    plots.legend(drawn, panels)
    return drawn


def _line(axes: Axes, row: Row, test: str, trained: int) -> None:
    """A run: DeltaProduct by its writes, any other model in grey, by name if it follows words of the trained length."""
    series, profile = row["series"], row["profiles"][test]
    places, values = [at + 1 for at, _ in profile], [value for _, value in profile]
    if series in STYLES:
        tone, width = STYLES[series]
        axes.plot(places, values, color=tone, linewidth=width, label=series, zorder=10 - width)
        return
    axes.plot(places, values, color="grey", linewidth=0.8, alpha=0.7, label="other models", zorder=2)
    last = max((place for place, value in zip(places, values) if value > 0.3), default=0)
    if last > trained:
        axes.annotate(f"{series} (one seed)", (last + 4, 0.31), fontsize=8, color="dimgrey")


SOLVED = {"S3": 2, "S4": 2, "A5": 2, "S5": 4}
"""Writes a token with which one layer solves the group in the paper's figures."""
EXPERIMENT = Experiment(
    name="state_tracking",
    claim="One layer follows S3, S4 and A5 with two writes a token and S5 with four, far beyond the length it was trained on.",
    runs=runs,
    figure=figure,
    later=lambda run: run.x in HARD,
    x_name="group",
    published={f"{named(n)}, {group}": "solved" if n >= least else "fails" for group, least in SOLVED.items() for n in (1, 2, 3, 4)}
    | {f"{named(2)}, {LONG_WORDS}": "solved"},
    source="DeltaProduct (arXiv 2502.10297), figures.",
)
