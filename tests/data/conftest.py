"""Fixtures of the data tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from corpora import Corpus, write_corpus
from hypothesis import settings

from gdn.data import DataConfig

# No deadline: other work on the machine must not fail a test.
settings.register_profile("data", deadline=None, max_examples=60)
settings.load_profile("data")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read by huggingface_hub when it is first imported


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """The configuration of a small corpus by kind. A third of it is on the validation side."""

    def make(kind: str) -> DataConfig:
        return DataConfig(source=write_corpus(kind, tmp_path), length=37, batch=3, validation_fraction=0.33, seed=5)

    return make
