"""Runs for a laptop."""

from __future__ import annotations

from gdn.data import DataConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.models.sizes import from_depth
from gdn.train import AdamW, Schedule, Trainer

BYTES = 257
"""Vocabulary of the byte tokenizer: 256 bytes and the end of a document."""


def demo() -> Trainer.Config:
    """A small model on this machine's Python source, in about three minutes on two CPU cores."""
    mixer = GatedDeltaNet.Config(heads=3, head_dim=32)
    return Trainer.Config(
        model=LM.Config(vocab=BYTES, width=128, layers=4, mlp=384, pattern=(mixer,)),
        data=DataConfig(source="python", tokenizer="bytes", length=256, batch=4, mix=1024),
        optim=AdamW(lr=4e-3),
        schedule=Schedule(warmup=50),
        steps=4000,
        time_limit_s=190,
        validate_every=1000,
        log_every=20,
        prompt="def ",
        directory="runs/demo",
    )


def corpus() -> Trainer.Config:
    """A model of depth 4 on this machine's Python source; the start for runs of your own."""
    return Trainer.Config(
        model=from_depth(4, vocab=BYTES),
        data=DataConfig(source="python", tokenizer="bytes", length=1024, batch=8, mix=32),
        optim=AdamW(lr=2e-3),
        schedule=Schedule(warmup=200),
        steps=10_000,
        validate_every=500,
        prompt="def ",
        directory="runs/corpus",
    )
