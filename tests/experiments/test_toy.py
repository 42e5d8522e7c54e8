"""Every experiment runs from end to end with toy sizes, so that none can rot."""

from __future__ import annotations

import json
import pkgutil
from pathlib import Path

import pytest
import torch

import gdn.experiments
from gdn import cli, experiments
from gdn.experiments import plots
from gdn.experiments.conduct import conduct
from gdn.experiments.definition import Run

PARTS = {"command", "conduct", "definition", "find", "inputs", "learn", "measure", "models", "plots", "pool", "readout", "report", "sets"}
PARTS |= {"lanes", "update"}


def test_every_experiment_is_listed() -> None:
    files = {module.name for module in pkgutil.iter_modules(gdn.experiments.__path__)}
    assert files == PARTS | set(experiments.names())
    assert all(experiments.load(name).name == name for name in experiments.names())


@pytest.mark.parametrize("name", experiments.names())
def test_toy(name: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    experiment = experiments.load(name)
    rows = conduct(experiment, tmp_path, torch.device("cpu"), toy=True)
    assert len(rows) == len(experiment.runs(True))
    assert {row["series"] for row in rows} == {run.series for run in experiment.runs(False)}
    assert all(0 <= value <= 1 for row in rows for value in row["scores"].values())
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert all(panel.has_data() for panel in experiment.figure(rows).axes)
    table = (tmp_path / "table.md").read_text()
    assert all(row["series"] in table for row in rows)
    assert "Incomplete" not in table


@pytest.mark.parametrize("name", experiments.names())
def test_a_toy_learns_every_task_in_every_order_that_full_runs_do(name: str) -> None:
    def learned(toy: bool) -> set[tuple[str, str, str]]:
        runs = experiments.load(name).runs(toy)
        return {(run.training.order, type(task).__name__, getattr(task, "group", "")) for run in runs for task in run.tasks}

    # S4 is learned as S3 is.
    assert learned(toy=False) - learned(toy=True) <= {("turns", "GroupWords", "S4")}
    for run in experiments.load(name).runs(True):
        assert run.training.order == "turns" or run.training.steps >= len(run.tasks), "a stage without a step"


@pytest.mark.parametrize("name", experiments.names())
def test_full_runs_can_be_told_apart_and_survive_the_results_file(name: str) -> None:
    runs = experiments.load(name).runs(False)
    assert len({run.key for run in runs}) == len(runs)
    assert all(set(run.model.pattern) == set(run.model.mixers) for run in runs)  # no hybrid is cut off
    for run in (runs[0], runs[-1]):
        again = Run.from_dict(json.loads(json.dumps(run.to_dict())))
        assert again == run
        assert again.key == run.key


@pytest.mark.parametrize("name", experiments.names())
def test_published_figures_belong_to_runs(name: str) -> None:
    experiment = experiments.load(name)
    known = {run.series for run in experiment.runs(False)}
    known |= {f"{run.series}, {run.x:g}" if isinstance(run.x, float) else f"{run.series}, {run.x}" for run in experiment.runs(False)}
    assert set(experiment.published) <= known
    assert bool(experiment.published) == bool(experiment.source)


def test_the_command_lists_and_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["experiment"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in experiments.names())
    assert cli.main(["experiment", "parity", "--toy", "--device", "cpu"]) == 0
    assert (tmp_path / "runs/experiments/parity-toy/results.jsonl").is_file()
    assert cli.main(["experiment", "paritty"]) == 1
    assert 'Did you mean "parity"?' in capsys.readouterr().err


@pytest.mark.parametrize("name", experiments.names())
def test_no_two_models_of_a_picture_look_the_same(name: str) -> None:
    rows = [{"series": run.series} for run in experiments.load(name).runs(False)]
    models = {row["series"] for row in rows}
    assert len({plots.colour(model, rows) for model in models}) == len(models)
    assert len({plots.marker(model, rows) for model in models}) == len(models)
