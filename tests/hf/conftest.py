"""Quiet transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
from transformers.utils import logging


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers warns of its own deprecations and prints progress."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|accelerate|peft")
        yield
