"""Results as a table: for each series the mean over seeds, the range, and what was published."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import rich.table

from gdn.core.device import has_package
from gdn.experiments.definition import Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """Texts of a table, and what stands below it."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str]

    @classmethod
    def of(cls, experiment: Experiment, rows: Sequence[Row]) -> Table:
        tests = list(dict.fromkeys(name for row in rows for name in row["scores"]))
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
        return cls(columns, lines, notes)

    def rich(self) -> rich.table.Table:
        """For a terminal."""
        table = rich.table.Table(caption="\n".join(self.notes), caption_justify="left")
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self, *, complete: bool) -> str:
        """For a file."""
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        notes = [*self.notes, *([] if complete else ["Not all runs are finished."])]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + "\n\n".join(notes) + "\n"


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


def text(x: float | str) -> str:
    """`16`, `0.5` or the text itself."""
    return f"{x:g}" if isinstance(x, float | int) else x


def draw(figure: Callable[[Sequence[Row]], Figure], rows: Sequence[Row], path: Path) -> bool:
    """Save the picture; False without matplotlib."""
    if not has_package("matplotlib"):
        return False
    figure(rows).savefig(path, dpi=130)
    return True
