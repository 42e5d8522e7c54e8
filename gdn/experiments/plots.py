"""Parts of pictures. One colour is one model; a band reaches from the worst seed to the best, a small dot is a seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gdn.experiments.definition import Row
from gdn.experiments.report import grouped, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (*(f"C{i}" for i in range(10)), "black", "gold", "navy", "limegreen", "salmon", "indigo")
MARKERS = "osD^vPX*<>hpd8H."


def panels(count: int, *, title: str, height: float = 4.2, across: int | None = None) -> tuple[Figure, list[Axes]]:
    """A figure with some axes, `across` of them side by side, or all; `height` is that of a row of them."""
    from matplotlib.figure import Figure

    across = min(across or count, count)
    down = -(-count // across)
    figure = Figure(figsize=(7.2 if across == 1 else 4.6 * across, height * down), layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = list(figure.subplots(down, across, squeeze=False).flatten())
    for spare in axes[count:]:
        spare.remove()
    return figure, axes[:count]


def place(series: str, rows: Sequence[Row]) -> int:
    """A model's number, by order of appearance."""
    return list(dict.fromkeys(row["series"] for row in rows)).index(series)


def colour(series: str, rows: Sequence[Row]) -> str:
    """A model's colour; the rows are those of the whole picture."""
    return COLOURS[place(series, rows) % len(COLOURS)]


def marker(series: str, rows: Sequence[Row]) -> str:
    """A model's marker, likewise."""
    return MARKERS[place(series, rows) % len(MARKERS)]


def over_x(axes: Axes, rows: Sequence[Row], test: str) -> None:
    """A line for each series: the score of a test against x."""
    for series in dict.fromkeys(row["series"] for row in rows):
        points = {
            float(x): [row["scores"][test] for row in group]
            for (name, x), group in grouped(rows).items()
            if name == series and all(test in row["scores"] for row in group)
        }
        lines(axes, sorted(points.items()), colour(series, rows), series, marker=marker(series, rows))


def over_tests(axes: Axes, rows: Sequence[Row], tests: Mapping[str, float], x: float | str = "") -> None:
    """A line for each series: its score at `x` against what the tests vary."""
    for series in dict.fromkeys(row["series"] for row in rows):
        mine = [row["scores"] for row in rows if (row["series"], row["x"]) == (series, x)]
        found = {at: [scores[test] for scores in mine if test in scores] for test, at in tests.items()}
        lines(axes, [(at, v) for at, v in found.items() if v], colour(series, rows), series, marker=marker(series, rows))


def over_steps(axes: Axes, rows: Sequence[Row]) -> None:
    """A thin line for each run whose scores were kept: those of the first test. One that had enough early keeps its score."""
    rows = [row for row in rows if row["curve"]]
    longest = max((row["curve"][-1][0] for row in rows), default=0)
    for series in dict.fromkeys(row["series"] for row in rows):
        for i, row in enumerate([row for row in rows if row["series"] == series]):
            end = longest if row["steps"] < row["run"]["training"]["steps"] else row["curve"][-1][0]
            steps, values = zip(*[*row["curve"], (end, row["curve"][-1][1])])
            axes.plot(steps, values, color=colour(series, rows), linewidth=1.1, alpha=0.8, label=series if i == 0 else None)


def over_places(axes: Axes, rows: Sequence[Row], test: str) -> None:
    """A line for each series: a test's measure at each place of the sequence, for the rows that kept it."""
    for series in dict.fromkeys(row["series"] for row in rows):
        points: dict[float, list[float]] = {}
        for row in rows:
            if row["series"] == series:
                for at, value in row["profiles"].get(test, ()):
                    points.setdefault(at + 1, []).append(value)
        lines(axes, sorted(points.items()), colour(series, rows), series)


def lines(axes: Axes, points: Sequence[tuple[float, list[float]]], colour: str, label: str, **style: Any) -> None:
    """The mean of the values at each x, and a band from the least to the most; with a marker, a dot for each value instead."""
    if not points:
        return
    xs = [x for x, _ in points]
    axes.plot(xs, [sum(v) / len(v) for _, v in points], color=colour, label=label, linewidth=1.8, markersize=6, **style)
    if "marker" in style:
        axes.scatter([x for x, v in points for _ in v], [y for _, v in points for y in v], s=9, color=colour, alpha=0.6)
    else:
        axes.fill_between(xs, [min(v) for _, v in points], [max(v) for _, v in points], color=colour, alpha=0.15, linewidth=0)


def bars(axes: Axes, rows: Sequence[Row], tests: Sequence[str]) -> None:
    """Groups of bars: the tests, and in each a bar for every series; dots are seeds."""
    for series in dict.fromkeys(row["series"] for row in rows):
        found = [[row["scores"][test] for row in rows if row["series"] == series and test in row["scores"]] for test in tests]
        shown = [(bar(series, rows, group), values) for group, values in enumerate(found) if values]
        axes.bar([x for x, _ in shown], [sum(v) / len(v) for _, v in shown], bar_width(rows), color=colour(series, rows), label=series)
        axes.scatter([x for x, v in shown for _ in v], [y for _, v in shown for y in v], s=8, color="black", zorder=3)
    axes.set_xticks(range(len(tests)), [text(test) for test in tests])


def bar(series: str, rows: Sequence[Row], group: int) -> float:
    """Where the middle of a series' bar is in a group of `bars` of these rows."""
    count = len({row["series"] for row in rows})
    return group + (place(series, rows) - (count - 1) / 2) * 0.8 / count


def bar_width(rows: Sequence[Row]) -> float:
    """Of each bar of these rows."""
    return 0.72 / len({row["series"] for row in rows})


def doubling(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis with these values written out."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [text(value) for value in values])
    axes.minorticks_off()


def finish(axes: Axes, *, x: str, y: str = "", title: str = "", chance: float | None = None, legend: bool = False) -> None:
    """Labels, a grid, the level of guessing, and accuracies from 0 to 1."""
    axes.set(xlabel=x, ylabel=y, ylim=(-0.03, 1.05))
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    if chance is not None:
        axes.axhline(chance, color="grey", linestyle=":", linewidth=1)
        axes.annotate("guessing", (1, chance), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8, color="grey")
    if legend and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=8)


def legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One legend below all panels, with what any of them shows."""
    found = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    if found:
        figure.legend(list(found.values()), list(found), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
