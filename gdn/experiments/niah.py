"""S-NIAH-1, 2 and 3 at small scale: train on needles in haystacks of 512 tokens, test at up to eight times that.

The published figures are from language models of 1.3 B parameters that never saw such a prompt before (Gated DeltaNet, arXiv 2412.06464,
table 2). Here models of two layers (H2 has three) of width 128 learn the task itself in at most 2000 steps, on 8000 prompts each of 192,
256 and 512 tokens in turn (short ones show sooner what is asked for), from words of generated sentences, so that only the memory is
compared. Level 3, where 36 characters are to be copied, has 6000 steps: after 2000 only DeltaNet had learned it. A row counts as found if
every character of its value is right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, get_args

from gdn.data.synthetic.needle import Level, Needle
from gdn.experiments import models, plots
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, HEADS, VOCAB, LENGTH = 128, 2, 1024, 512
EXAMPLES = 8000
LEARNED = (192, 256, LENGTH)
"""Tokens of the prompts that are learned from, a batch of each in turn."""
FACTORS = (1, 2, 4, 8)
LEVELS: tuple[Level, ...] = get_args(Level)


def runs(toy: bool) -> list[Run]:
    seeds = range(1 if toy else 3)
    return [_run(series, level, seed, toy) for seed in seeds for series, level in models.every(LEVELS, toy=toy)]


def _run(series: str, level: Level, seed: int, toy: bool) -> Run:
    width, length = (16, 192) if toy else (WIDTH, LENGTH)
    task = Needle(level=level, length=length, vocab=VOCAB)
    training = Training(
        steps=2 if toy else 6000 if level == 3 else 2000,
        batch=2 if toy else 32,
        optim=AdamW(lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=Schedule(warmup=100, final_fraction=0.1),
        precision="fp32" if toy else "bf16",
        check_every=250,
        enough=0.995,
        examples=4 if toy else EXAMPLES,
    )
    factors = (1,) if toy else FACTORS
    mixers = models.pattern(series, width, HEADS, length // 4)
    return Run(
        series=series,
        x=f"S-NIAH-{level}",
        seed=seed,
        model=LM.Config(vocab=VOCAB, width=width, layers=models.depth(mixers, 2), mlp=3 * width, pattern=mixers, tie_embeddings=False),
        tasks=tuple(task.with_(length=n) for n in ((length,) if toy else LEARNED)),
        training=training,
        tests=tuple(
            Test(
                name=f"{LENGTH * factor} tokens",
                task=task.with_(length=factor * length),
                measure="sequences",
                examples=2 if toy else 256,
                batch=2 if toy else 128 // factor,
            )
            for factor in factors
        ),
    )


def figure(rows: Sequence[Row]) -> Figure:
    drawn, panels = plots.panels(3, title="A needle in a haystack: fraction of values found, trained at 512 tokens")
    tests = {f"{LENGTH * factor} tokens": float(LENGTH * factor) for factor in FACTORS}
    for axes, level in zip(panels, LEVELS):
        plots.over_tests(axes, rows, tests, f"S-NIAH-{level}")
        plots.doubling(axes, list(tests.values()))
        plots.finish(axes, x="tokens of the prompt", y="fraction of values found", title=f"S-NIAH-{level}")
    plots.legend(drawn, panels)
    return drawn


EXPERIMENT = Experiment(
    name="niah",
    claim="Without decay memory survives repeated filler best (level 1); with a real haystack it has to forget (levels 2 and 3).",
    runs=runs,
    figure=figure,
    later=lambda run: run.x == "S-NIAH-3",
    x_name="task",
    published={
        "Gated DeltaNet, S-NIAH-1": "98.4 88.4 91.4 91.8",
        "DeltaNet, S-NIAH-1": "97.4 96.8 99.0 98.8",
        "Mamba2, S-NIAH-1": "99.2 98.8 65.4 30.4",
        "Gated DeltaNet, S-NIAH-2": "100.0 99.8 92.2 29.6",
        "DeltaNet, S-NIAH-2": "98.4 45.6 18.6 14.4",
        "Mamba2, S-NIAH-2": "99.4 98.8 56.2 17.0",
        "Gated DeltaNet, S-NIAH-3": "86.6 84.2 27.6",
        "DeltaNet, S-NIAH-3": "85.2 47.0 22.4",
        "Mamba2, S-NIAH-3": "64.4 47.6 4.6",
    },
    source="Gated DeltaNet (arXiv 2412.06464), table 2: per cent at 1K, 2K, 4K and 8K tokens, language models trained at 4K, zero-shot.",
)
