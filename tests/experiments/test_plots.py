"""What pictures of experiments show."""

from __future__ import annotations

import pytest

from gdn.experiments import plots

figure = pytest.importorskip("matplotlib.figure")


def test_a_run_that_had_enough_early_keeps_its_score_to_the_end() -> None:
    """A run that took all its steps ends where it ended, though others have more."""

    def row(series: str, steps: int, foreseen: int, *curve: tuple[int, float]) -> plots.Row:
        return {"series": series, "steps": steps, "curve": [list(point) for point in curve], "run": {"training": {"steps": foreseen}}}

    axes = figure.Figure().subplots()
    plots.over_steps(
        axes, [row("a", 200, 1000, (100, 0.5), (200, 1.0)), row("b", 1000, 1000, (500, 0.1), (1000, 0.2)), row("c", 900, 900, (900, 0.3))]
    )
    ends = [(line.get_xdata()[-1], line.get_ydata()[-1]) for line in axes.get_lines()]
    assert ends == [(1000, 1.0), (1000, 0.2), (900, 0.3)]
