"""Experiments by name: what `gdn experiment` does, and what a program can call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gdn.core.device import named_device
from gdn.core.errors import ConfigError
from gdn.experiments import find
from gdn.experiments.conduct import conduct_all


def experiments(
    names: Sequence[str],
    *,
    toy: bool = False,
    only: str = "",
    directory: Path | None = None,
    device: str = "auto",
    jobs: int = 1,
    budget: float | None = None,
) -> None:
    """Carry out experiments, "all" for every one. Results go to experiments/NAME (of toys: runs/experiments/NAME-toy), or to `directory`,
    with several to folders in it. The rest is as in `conduct_all`."""
    if "all" in names:
        names = find.names()
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise ConfigError(f"name: expected each experiment once, got {', '.join(doubled)} several times")
    loaded = [find.load(name) for name in names]
    home = directory or Path("runs/experiments" if toy else "experiments")
    folders = [home if directory and len(names) == 1 else home / (f"{name}-toy" if toy and not directory else name) for name in names]
    conduct_all(list(zip(loaded, folders)), named_device(device), toy=toy, only=only, jobs=jobs, budget=budget)
