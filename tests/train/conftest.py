"""A model of 9 000 parameters on generated text: a step takes some milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from gdn.data import DataConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.train import AdamW, Checkpoints, Schedule, Trainer, report

MODEL = LM.Config(vocab=257, width=16, layers=1, mlp=32, pattern=(GatedDeltaNet.Config(heads=1, head_dim=16, expand_v=1.0),))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices; and subprocesses that are compared must use as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def picture() -> None:
    """Asked for by tests that want the picture of the losses."""


@pytest.fixture(autouse=True)
def no_picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other runs leave none: it takes as long as their steps."""
    if "picture" not in request.fixturenames:
        monkeypatch.setattr(report, "has_package", lambda name: False)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small files of words."""
    folder = tmp_path_factory.mktemp("text")
    words = random.Random(0)
    for i in range(40):
        (folder / f"{i}.txt").write_text(" ".join(words.choice(["one", "two", "three", "five", "eight"]) for _ in range(150)))
    return folder


@pytest.fixture
def lm() -> LM:
    torch.manual_seed(0)
    return LM(MODEL)


@pytest.fixture
def tiny(text: Path, tmp_path: Path) -> Callable[..., Trainer.Config]:
    """A run of 12 steps into tmp_path/NAME, with any field changed."""

    def config(name: str = "run", **changes: object) -> Trainer.Config:
        base = Trainer.Config(
            model=MODEL,
            data=DataConfig(source=str(text), length=32, batch=2, validation_fraction=0.2),
            optim=AdamW(lr=3e-3),
            schedule=Schedule(warmup=3),
            checkpoints=Checkpoints(every=4),
            steps=12,
            log_every=2,
            validate_every=6,
            validation_tokens=128,
            sample_tokens=8,
            device="cpu",
            directory=str(tmp_path / name),
        )
        return base.with_(**changes)

    return config
