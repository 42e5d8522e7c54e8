"""Experiments by name."""

from __future__ import annotations

import importlib

from gdn.core.errors import ConfigError, nearest
from gdn.experiments.definition import Experiment

NAMES = ("parity", "s3", "mqar", "mqar_grid", "state_tracking", "mad", "niah", "selective_copying", "regbench")
"""The files of this folder that define one: first those that a laptop runs in minutes, then those for a GPU."""


def names() -> tuple[str, ...]:
    """The experiments that come with gdn."""
    return NAMES


def load(name: str) -> Experiment:
    """An experiment by name."""
    if name not in NAMES:
        raise ConfigError(f'no experiment "{name}".{nearest(name, NAMES)}')
    return importlib.import_module(f"gdn.experiments.{name}").EXPERIMENT
