"""Results as a table: for each series the mean over seeds, the range, and what was published."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import rich.table

from gdn.core.device import has_package
from gdn.experiments.definition import Experiment, Row, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = ("parameters", "steps", "published")
"""Columns that a narrow terminal can do without, the first one first."""


@dataclass(frozen=True)
class Table:
    """Texts of a table, and what stands below it."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]
    runs: int
    """Finished ones."""
    x_name: str = ""
    """The column of what is varied."""

    @classmethod
    def of(cls, experiment: Experiment, rows: Sequence[Row]) -> Table:
        tests = sorted(dict.fromkeys(name for row in rows for name in row["scores"]), key=numbers)
        varied = bool(experiment.x_name)
        columns = ["model", *([experiment.x_name] if varied else []), *tests, "seeds", "steps", "parameters"]
        if experiment.published:
            columns.append("published")
        lines = []
        for (series, x), group in grouped(rows).items():
            line = [series, *([text(x)] if varied else [])]
            line += [spread([row["scores"][test] for row in group if test in row["scores"]]) for test in tests]
            steps = [row["steps"] for row in group]
            line += [str(len(group)), f"{min(steps):,}" if min(steps) == max(steps) else f"{min(steps):,}-{max(steps):,}"]
            line.append(f"{group[0]['parameters']:,}")
            if experiment.published:
                line.append(experiment.published.get(f"{series}, {text(x)}", experiment.published.get(series, "")))
            lines.append(line)
        machines = ", ".join(dict.fromkeys(f"{row['device']}, torch {row['torch']}" for row in rows))
        notes = [f"Mean over seeds (least to most). {sum(row['seconds'] for row in rows) / 60:.1f} minutes in all on {machines}."]
        notes += [f"Published: {experiment.source}"] if experiment.published else []
        return cls(columns, lines, notes, len(rows), experiment.x_name)

    def rich(self, width: int) -> list[rich.table.Table]:
        """For a terminal. Where all columns do not fit side by side: a table for each thing that is varied, no ranges, then without the
        columns that say least, and in the end some columns in one table and some in the next."""
        columns, rows = list(self.columns), self.rows
        if natural(columns, rows) <= width:
            return [shown(columns, rows)]
        xs = [row[1] for row in rows] if self.x_name else []
        rows = drop(columns, rows, self.x_name) if xs else rows
        if natural(columns, rows) > width:
            rows = [[row[0], *(cell.split(" (")[0] for cell in row[1:])] for row in rows]
        for name in LEAST:
            if natural(columns, rows) > width and name in columns:
                rows = drop(columns, rows, name)
        groups = {f"{self.x_name}: {x}": [row for row, at in zip(rows, xs) if at == x] for x in dict.fromkeys(xs)} or {None: rows}
        parts = fitting(columns, rows, width)
        return [
            shown([columns[i] for i in part], [[row[i] for i in part] for row in group], title)
            for title, group in groups.items()
            for part in parts
        ]

    def markdown(self, *, of: int) -> str:
        """For a file. `of`: how many runs there are when all are finished."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        notes = [*([] if self.runs == of else [f"Incomplete: {self.runs} of {of} runs are finished."]), *self.notes]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n\n".join(notes) + "\n"


def shown(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> rich.table.Table:
    """A table for a terminal, with a word of a heading on each line."""
    table = rich.table.Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column("\n".join(column.split()), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def natural(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> int:
    """Characters that a table takes on a terminal if nothing is cut."""
    return 1 + sum(3 + max(map(len, [*column.split(), *(row[i] for row in rows)])) for i, column in enumerate(columns))


def fitting(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """The columns of each of as few tables as have them all, none wider than a terminal; the first column stands in every one."""
    parts = [[0]]
    for i in range(1, len(columns)):
        wider = [*parts[-1], i]
        if len(wider) > 2 and natural([columns[j] for j in wider], [[row[j] for j in wider] for row in rows]) > width:
            wider = [0, i]
            parts.append(wider)
        parts[-1] = wider
    return parts


def drop(columns: list[str], rows: Sequence[Sequence[str]], name: str) -> list[list[str]]:
    """The rows without a column, which is taken from `columns`."""
    at = columns.index(name)
    del columns[at]
    return [[*row[:at], *row[at + 1 :]] for row in rows]


def arranged(rows: Sequence[Row], runs: Sequence[Run]) -> list[Row]:
    """Rows by what is varied, numbers from small to large, then by model and seed, each in the order of the runs."""
    xs = list(dict.fromkeys(run.x for run in runs))
    xs.sort(key=lambda x: x if isinstance(x, float) else 0.0)
    series = list(dict.fromkeys(run.series for run in runs))
    return sorted(rows, key=lambda row: (xs.index(row["x"]), series.index(row["series"]), row["seed"]))


def grouped(rows: Sequence[Row]) -> dict[tuple[str, float | str], list[Row]]:
    """Rows that differ in their seed only, by series and x."""
    groups: dict[tuple[str, float | str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["series"], row["x"]), []).append(row)
    return groups


def spread(values: Sequence[float]) -> str:
    """`0.912 (0.88-0.95)`, or one number."""
    if not values:
        return ""
    mean = sum(values) / len(values)
    return f"{mean:.3f} ({min(values):.2f}-{max(values):.2f})" if len(values) > 1 else f"{mean:.3f}"


def numbers(name: str) -> list[int]:
    """The numbers in a name, by which tests are in order."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def text(x: float | str) -> str:
    """`16`, `0.5` or the text itself."""
    return f"{x:g}" if isinstance(x, float | int) else x


def draw(figure: Callable[[Sequence[Row]], Figure], rows: Sequence[Row], path: Path, *, of: int) -> bool:
    """Save the picture, which says so if it is not of all runs; False without matplotlib."""
    if not has_package("matplotlib"):
        return False
    drawn = figure(rows)
    if len(rows) < of:
        drawn.suptitle(f"{drawn.get_suptitle()}\nincomplete: {len(rows)} of {of} runs", fontsize=11)
    drawn.savefig(path, dpi=130)
    return True
