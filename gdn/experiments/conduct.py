"""Carry out an experiment: every run that is not in results.jsonl yet, then the table and the picture."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from gdn.core.errors import ConfigError, DataError
from gdn.experiments import report
from gdn.experiments.definition import Experiment, Row, Run
from gdn.experiments.learn import learn
from gdn.train.display import duration

RESULTS, TABLE, PLOT = "results.jsonl", "table.md", "plot.png"


def conduct(
    experiment: Experiment, directory: Path, device: torch.device, *, toy: bool = False, only: str = "", console: Console | None = None
) -> list[Row]:
    """The rows of all runs. Each is written as soon as it is finished, so that stopping loses only the run that is going on.

    Args:
        experiment: what to do.
        directory: where results.jsonl, table.md and plot.png go.
        device: where models run.
        toy: a few steps of each model instead.
        only: do only runs whose series contains this.
    """
    console = console or Console(highlight=False)
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / RESULTS
    runs = list(experiment.runs(toy))
    finished = {run.key: row for row in read(file) if (run := run_of(row))}
    missing = [run for run in runs if run.key not in finished and only in run.series]
    if only and not any(only in run.series for run in runs):
        raise ConfigError(f'only: no series contains "{only}": {", ".join(dict.fromkeys(run.series for run in runs))}')
    console.print(f"{experiment.name}: {experiment.claim}", markup=False, soft_wrap=True)
    console.print(f"{len(runs)} runs, {len(missing)} to do, on {device}; results in {directory}", markup=False, soft_wrap=True)
    began = time.monotonic()
    try:
        for i, run in enumerate(missing):
            spent = time.monotonic() - began
            left = f", about {duration(spent / i * (len(missing) - i))} left" if i else ""
            console.print(f"run {i + 1} of {len(missing)}: {run.title}{left}", markup=False, soft_wrap=True)
            row = learn(run, device, Watcher(run, console))
            finished[run.key] = row
            with file.open("a") as lines:
                lines.write(json.dumps(row) + "\n")
            scores = "  ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
            console.print(f"    {row['steps']:,} steps in {duration(row['seconds'])}: {scores}", markup=False, soft_wrap=True)
    finally:
        # Also when stopped half-way: what there is can be looked at.
        rows = [finished[run.key] for run in runs if run.key in finished]
        if rows:
            present(experiment, rows, directory, console, complete=len(rows) == len(runs))
    return rows


def present(experiment: Experiment, rows: Sequence[Row], directory: Path, console: Console, *, complete: bool) -> None:
    """Print the table, write it, and draw the picture."""
    table = report.Table.of(experiment, rows)
    console.print(table.rich())
    (directory / TABLE).write_text(table.markdown(complete=complete))
    drawn = report.draw(experiment.figure, rows, directory / PLOT)
    console.print(
        f"{directory / TABLE}" + (f", {directory / PLOT}" if drawn else '; for the plot: pip install "gated-delta-networks[train]"')
    )


def read(file: Path) -> list[Row]:
    """The rows of a results file; none without one. A last line that was cut off is left out, and cut off the file."""
    if not file.is_file():
        return []
    text = file.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        file.write_text(whole)
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            rows[-1]["run"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f"{file}:{number}: expected a row of results, got {line[:60]!r}") from error
    return rows


def run_of(row: Row) -> Run | None:
    """What a row is the result of. None if it was written by a version whose configurations could be something else.

    A field that is newer than the row has its default, so old results stay good when an option is added.
    """
    try:
        return Run.from_dict(row["run"])
    except ConfigError:
        return None


class Watcher:
    """Shows how a run gets on: a line now and then."""

    def __init__(self, run: Run, console: Console, seconds: float = 10) -> None:
        self.run, self.console, self.seconds = run, console, seconds
        self.last = time.monotonic()

    def __call__(self, step: int, loss: float, value: float) -> None:
        if time.monotonic() - self.last >= self.seconds:
            self.last = time.monotonic()
            test = self.run.tests[0].name
            self.console.print(
                f"    step {step:,} of {self.run.training.steps:,}  loss {loss:.4f}  {test} {value:.3f}", markup=False, soft_wrap=True
            )
