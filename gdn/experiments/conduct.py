"""Carry out experiments: every run that is not in results.jsonl yet, then the table and the picture."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from gdn.core.errors import ConfigError, DataError, ExperimentError
from gdn.experiments import report
from gdn.experiments.definition import Experiment, Row, Run
from gdn.experiments.learn import learn
from gdn.experiments.pool import outcomes
from gdn.train.display import duration

RESULTS, TABLE, PLOT = "results.jsonl", "table.md", "plot.png"


def conduct(
    experiment: Experiment, directory: Path, device: torch.device, *, toy: bool = False, only: str = "", console: Console | None = None
) -> list[Row]:
    """The rows of all runs of one experiment, done one after another. See `conduct_all`."""
    (rows,) = conduct_all([(experiment, directory)], device, toy=toy, only=only, console=console)
    return rows


def conduct_all(
    chosen: Sequence[tuple[Experiment, Path]],
    device: torch.device,
    *,
    toy: bool = False,
    only: str = "",
    jobs: int = 1,
    budget: float | None = None,
    console: Console | None = None,
) -> list[list[Row]]:
    """The rows of all runs of some experiments. Each is written as soon as it is finished, so that stopping loses only what is going on.

    Every run with the first seed comes before any with the second, so that a run cut short has something to say about every claim.

    Args:
        chosen: what to do, and where results.jsonl, table.md and plot.png of each go.
        device: where models run; "cuda" with several jobs is every GPU.
        toy: a few steps of each model instead.
        only: do only runs whose series contains this.
        jobs: processes that runs are spread over. With one, runs are done in this process.
        budget: seconds after which no further run is begun.

    Raises:
        ExperimentError: runs failed in other processes; all others have been done.
    """
    if jobs < 1:
        raise ConfigError(f"jobs: expected at least 1, got {jobs}")
    if budget is not None and not budget > 0:
        raise ConfigError(f"budget: expected a number of seconds above 0, got {budget}")
    console = console or Console(highlight=False)
    conducts = [Conduct.of(experiment, directory, toy, console) for experiment, directory in chosen]
    missing = [(conduct, run) for conduct in conducts for run in conduct.missing(only)]
    missing.sort(key=lambda pair: (pair[1].seed, pair[0].place(pair[1])))
    if only and not any(only in run.series for conduct in conducts for run in conduct.runs):
        series = dict.fromkeys(run.series for conduct in conducts for run in conduct.runs)
        raise ConfigError(f'only: no series contains "{only}": {", ".join(series)}')
    for conduct in conducts:
        conduct.introduce(len(conduct.missing(only)), device)
    try:
        failures = _do(missing, device, jobs, budget, console)
    finally:
        # Also when stopped half-way: what there is can be looked at.
        for conduct in conducts:
            conduct.present()
    if failures:
        raise ExperimentError(f"{len(failures)} of {len(missing)} runs failed:\n  " + "\n  ".join(failures))
    return [conduct.rows for conduct in conducts]


def _do(missing: Sequence[tuple[Conduct, Run]], device: torch.device, jobs: int, budget: float | None, console: Console) -> list[str]:
    """Do the runs; the failures of those done in other processes."""
    began = time.monotonic()

    def more() -> bool:
        return budget is None or time.monotonic() - began < budget

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def title(number: int) -> str:
        conduct, run = missing[number]
        return f"{conduct.experiment.name}, {run.title}"

    def left(done: int) -> str:
        spent = time.monotonic() - began
        return f", about {duration(spent / done * (len(missing) - done))} left" if 0 < done < len(missing) else ""

    done, failures = 0, []
    if jobs == 1:
        for number, (conduct, run) in enumerate(missing):
            if not more():
                break
            say(f"run {number + 1} of {len(missing)}: {title(number)}{left(number)}")
            row = learn(run, device, Watcher(run, console))
            conduct.add(run, row)
            say(f"    {result(row)}")
            done += 1
    else:
        for outcome in outcomes(enumerate(run for _, run in missing), device, jobs, more=more):
            done += 1
            if outcome.row is None:
                failures.append(f"{title(outcome.number)}: {outcome.failure}")
                say(f"{done} of {len(missing)}: {failures[-1]}")
                continue
            conduct, run = missing[outcome.number]
            conduct.add(run, outcome.row)
            say(f"{done} of {len(missing)}: {title(outcome.number)}: {result(outcome.row)}{left(done)}")
    if done < len(missing):
        say(f"{len(missing) - done} runs were not begun: the budget of {budget:g} s is spent. The same command again goes on with them.")
    return failures


def result(row: Row) -> str:
    """What came out, on a line."""
    scores = "  ".join(f"{name} {value:.3f}" for name, value in row["scores"].items())
    refused = f"  (not captured: {row['not_captured']})" if "not_captured" in row else ""
    return f"{row['steps']:,} steps in {duration(row['seconds'])}: {scores}{refused}"


@dataclass
class Conduct:
    """One experiment being carried out."""

    experiment: Experiment
    directory: Path
    runs: list[Run]
    finished: dict[str, Row]
    """Rows by the key of their run."""
    console: Console

    @classmethod
    def of(cls, experiment: Experiment, directory: Path, toy: bool, console: Console) -> Conduct:
        directory.mkdir(parents=True, exist_ok=True)
        finished = {run.key: row for row in read(directory / RESULTS) if (run := run_of(row))}
        return cls(experiment, directory, list(experiment.runs(toy)), finished, console)

    def missing(self, only: str) -> list[Run]:
        return [run for run in self.runs if run.key not in self.finished and only in run.series]

    def place(self, run: Run) -> int:
        """Of its model among the models. Runs of one model follow each other, so that few wait for the same training set."""
        return list(dict.fromkeys(each.series for each in self.runs)).index(run.series)

    def introduce(self, missing: int, device: torch.device) -> None:
        say = f"{self.experiment.name}: {self.experiment.claim}\n{len(self.runs)} runs, {missing} to do, on {device}; "
        self.console.print(f"{say}results in {self.directory}", markup=False, soft_wrap=True)

    def add(self, run: Run, row: Row) -> None:
        """Write a row."""
        self.finished[run.key] = row
        with (self.directory / RESULTS).open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    @property
    def rows(self) -> list[Row]:
        return [self.finished[run.key] for run in self.runs if run.key in self.finished]

    def present(self) -> None:
        if self.rows:
            present(self.experiment, self.rows, self.directory, self.console, complete=len(self.rows) == len(self.runs))


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
