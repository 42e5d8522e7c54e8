"""Carry out experiments: every run that is not in results.jsonl yet, then the table and the picture."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from gdn.core.errors import ConfigError, DataError, ExperimentError
from gdn.experiments import report
from gdn.experiments.definition import Experiment, Row, Run
from gdn.experiments.lanes import Outcome, default, in_turns
from gdn.experiments.pool import outcomes
from gdn.experiments.sets import Sets
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
    lanes: int | None = None,
    budget: float | None = None,
    console: Console | None = None,
) -> list[list[Row]]:
    """The rows of all runs of some experiments. Each is written as soon as it is finished, so that stopping loses only what is going on.

    Every run with the first seed comes before any with the second, so that what is cut short has something to say about every claim.
    Among those the order is that of the experiments and of their runs. What an experiment calls `later` waits for all seeds of the rest.

    Args:
        chosen: what to do, and where results.jsonl, table.md and plot.png of each go.
        device: where models run; "cuda" with several jobs is every GPU.
        toy: a few steps of each model instead.
        only: do only runs whose series contains this.
        jobs: processes that runs are spread over. With one, runs are done in this process.
        lanes: runs that each process advances in turns, on a GPU no more than fit (`lanes.room`). Default: one, on a GPU `lanes.ON_GPU`.
        budget: seconds after which what is not finished is dropped.

    Raises:
        ExperimentError: runs failed in other processes; all others have been done.
    """
    lanes = default(device) if lanes is None else lanes
    for name, value in (("jobs", jobs), ("lanes", lanes)):
        if value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    if budget is not None and not budget > 0:
        raise ConfigError(f"budget: expected a number of seconds above 0, got {budget}")
    console = console or Console(highlight=False)
    conducts = [Conduct.of(experiment, directory, toy, console) for experiment, directory in chosen]
    missing = [(conduct, run) for conduct in conducts for run in conduct.missing(only)]
    missing.sort(key=lambda pair: (pair[0].experiment.later(pair[1]), pair[1].seed))
    if only and not any(only in run.series for conduct in conducts for run in conduct.runs):
        series = dict.fromkeys(run.series for conduct in conducts for run in conduct.runs)
        raise ConfigError(f'only: no series contains "{only}": {", ".join(series)}')
    for conduct in conducts:
        conduct.introduce(len(conduct.missing(only)), device)
    try:
        failures = _do(missing, device, jobs, lanes, budget, console)
    finally:
        # Also when stopped half-way: what there is can be looked at.
        for conduct in conducts:
            conduct.present()
    if failures:
        raise ExperimentError(f"{len(failures)} of {len(missing)} runs failed:\n  " + "\n  ".join(failures))
    return [conduct.rows for conduct in conducts]


def _do(
    missing: Sequence[tuple[Conduct, Run]], device: torch.device, jobs: int, lanes: int, budget: float | None, console: Console
) -> list[str]:
    """Do the runs; the failures of those done in other processes."""
    began = time.monotonic()

    def left() -> float | None:
        return None if budget is None else budget - (time.monotonic() - began)

    def say(text: str) -> None:
        console.print(text, markup=False, soft_wrap=True)

    def title(number: int) -> str:
        conduct, run = missing[number]
        return f"{conduct.experiment.name}, {run.title}"

    runs = [run for _, run in missing]
    ends = _here(runs, device, lanes, left, console) if jobs == 1 else outcomes(enumerate(runs), device, jobs, lanes, left=left, tell=say)
    done, failures = 0, []
    for end in ends:
        done += 1
        spent = time.monotonic() - began
        after = f", about {duration(spent / done * (len(missing) - done))} left" if done < len(missing) else ""
        if end.row is None:
            failures.append(f"{title(end.number)}: {end.failure}")
            say(f"{done} of {len(missing)}: {failures[-1]}")
            continue
        conduct, run = missing[end.number]
        conduct.add(run, end.row)
        say(f"{done} of {len(missing)}: {title(end.number)}: {result(end.row)}{after}")
    if done < len(missing):
        say(f"{len(missing) - done} runs are not finished: the budget of {budget:g} s is spent. The same command again does them.")
    return failures


def _here(runs: Sequence[Run], device: torch.device, lanes: int, left: Callable[[], float | None], console: Console) -> Iterator[Outcome]:
    """The ends of runs that are done in this process."""
    watched = ((number, run, Watcher(run, console)) for number, run in enumerate(runs))
    with closing(in_turns(watched, device, lanes, Sets())) as ends:
        while (seconds := left()) is None or seconds > 0:
            try:
                end = next(ends)
            except StopIteration:
                return
            if end is not None:
                yield end


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
    toy: bool
    console: Console

    @classmethod
    def of(cls, experiment: Experiment, directory: Path, toy: bool, console: Console) -> Conduct:
        directory.mkdir(parents=True, exist_ok=True)
        finished = {run.key: row for row in read(directory / RESULTS) if (run := run_of(row))}
        return cls(experiment, directory, list(experiment.runs(toy)), finished, toy, console)

    def missing(self, only: str) -> list[Run]:
        return [run for run in self.runs if run.key not in self.finished and only in run.series]

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
            if self.toy:
                self.console.print(f"{self.experiment.name}, toy: a few steps of tiny models, whose scores say nothing", soft_wrap=True)
            present(self.experiment, report.arranged(self.rows, self.runs), self.directory, self.console, of=len(self.runs))


def present(experiment: Experiment, rows: Sequence[Row], directory: Path, console: Console, *, of: int) -> None:
    """Print the table, write it, and draw the picture. `of`: how many runs there are when all are finished."""
    table = report.Table.of(experiment, rows)
    for part in table.rich(console.width):
        console.print(part)
    console.print("\n".join(table.notes), markup=False, soft_wrap=True)
    (directory / TABLE).write_text(table.markdown(of=of))
    drawn = report.draw(experiment.figure, rows, directory / PLOT, of=of)
    console.print(
        f"{directory / TABLE}" + (f", {directory / PLOT}" if drawn else '; for the plot: pip install "gated-delta-networks[train]"'),
        markup=False,
        soft_wrap=True,
    )


def read(file: Path) -> list[Row]:
    """The rows of a results file; none without one. A last line that was cut off is left out, and cut off the file."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        file.write_bytes(whole)
    rows = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            rows.append(json.loads(line))
            rows[-1]["run"]
        except (ValueError, KeyError, TypeError) as error:  # ValueError: not JSON, or not UTF-8
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
                f"    {self.run.title}: step {step:,} of {self.run.training.steps:,}  loss {loss:.4f}  {test} {value:.3f}",
                markup=False,
                soft_wrap=True,
            )
