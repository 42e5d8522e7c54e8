"""Stopping and going on, one results file for several starts, tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from gdn.core.errors import ConfigError, DataError
from gdn.data.synthetic import MQAR, Parity
from gdn.experiments import conduct as module
from gdn.experiments import lanes
from gdn.experiments.conduct import conduct, read
from gdn.experiments.definition import Experiment, Row, Run, Test, Training
from gdn.experiments.inputs import stream
from gdn.experiments.learn import learn, learning
from gdn.experiments.report import Table, arranged
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

CPU = torch.device("cpu")
TASK = Parity(length=6, shortest=6, running=True)


def run(series: str = "model", seed: int = 0, **changes: Any) -> Run:
    model = LM.Config(vocab=3, width=8, layers=1, mlp=8, pattern=(GatedDeltaNet.Config(heads=1, head_dim=4),))
    tests = (Test(name="short", task=TASK, examples=8), Test(name="long", task=TASK.with_(length=12, shortest=12), examples=8))
    return Run(series=series, seed=seed, model=model, tasks=(TASK,), training=Training(steps=3, batch=4, check_every=2), tests=tests).with_(
        **changes
    )


def figure(rows: Any) -> Any:
    matplotlib = pytest.importorskip("matplotlib.figure")
    return matplotlib.Figure()


def experiment(*runs: Run, **changes: Any) -> Experiment:
    return Experiment(name="example", claim="It works.", runs=lambda toy: runs, figure=figure, **changes)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def test_finished_runs_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def counted(run: Run, *rest: Any) -> Any:
        done.append(run.title)
        return learning(run, *rest)

    monkeypatch.setattr(lanes, "learning", counted)
    conduct(experiment(run(), run(seed=1)), tmp_path, CPU, console=quiet())
    assert done == ["model, seed 0", "model, seed 1"]
    rows = conduct(experiment(run(seed=1), run(seed=2), run(seed=0)), tmp_path, CPU, console=quiet())
    assert done[2:] == ["model, seed 2"]
    assert [row["seed"] for row in rows] == [1, 2, 0]
    # Anything that could change the result makes another run of it.
    conduct(experiment(run(training=Training(steps=4, batch=4))), tmp_path, CPU, console=quiet())
    assert len(done) == 4


def test_a_stopped_experiment_keeps_what_is_finished_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(run: Run, *rest: Any) -> Any:
        if run.seed == 1:
            raise KeyboardInterrupt
        return learning(run, *rest)

    runs = [run(seed=seed) for seed in range(3)]
    monkeypatch.setattr(lanes, "learning", stopped)
    with pytest.raises(KeyboardInterrupt):
        conduct(experiment(*runs), tmp_path, CPU, console=quiet())
    assert [row["seed"] for row in read(tmp_path / "results.jsonl")] == [0]
    assert "Incomplete: 1 of 3 runs are finished." in (tmp_path / "table.md").read_text()
    monkeypatch.setattr(lanes, "learning", learning)
    assert len(conduct(experiment(*runs), tmp_path, CPU, console=quiet())) == 3
    assert "Incomplete" not in (tmp_path / "table.md").read_text()


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    conduct(experiment(run(), run(seed=1)), tmp_path, CPU, console=quiet())
    file.write_bytes(file.read_bytes()[:-40] + b"\xff\x00")
    assert len(conduct(experiment(run(), run(seed=1)), tmp_path, CPU, console=quiet())) == 2
    assert [row["seed"] for row in read(file)] == [0, 1]
    for damaged in (b"no json\n", b'{"series": "\xff"}\n'):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"results\.jsonl:1: expected a row of results"):
            read(file)


def test_old_results_stay_good_when_a_field_is_added_and_not_when_one_is_gone(tmp_path: Path) -> None:
    (row,) = conduct(experiment(run()), tmp_path, CPU, console=quiet())
    before = json.loads(json.dumps(row))
    del before["run"]["model"]["pattern"][0]["conv_size"]  # as if written before that option existed
    assert module.run_of(before) == run()
    before["run"]["model"]["pattern"][0]["no_such_option"] = 1
    assert module.run_of(before) is None


@pytest.mark.parametrize("toy", [True, False])
def test_what_is_printed_of_toys_says_so(tmp_path: Path, toy: bool) -> None:
    printed = io.StringIO()
    conduct(experiment(run()), tmp_path, CPU, toy=toy, console=Console(file=printed, width=200))
    assert ("\nexample, toy: " in printed.getvalue()) is toy
    assert "toy" not in (tmp_path / "table.md").read_text()


def test_only_some_series(tmp_path: Path) -> None:
    both = experiment(run("one"), run("two"))
    assert [row["series"] for row in conduct(both, tmp_path, CPU, only="two", console=quiet())] == ["two"]
    with pytest.raises(ConfigError, match="one, two"):
        conduct(both, tmp_path, CPU, only="three", console=quiet())


def test_the_same_run_gives_the_same_numbers() -> None:
    first, again, other = learn(run(), CPU), learn(run(), CPU), learn(run(seed=1), CPU)
    assert first["loss"] == again["loss"]
    assert first["scores"] == again["scores"]
    assert first["loss"] != other["loss"]
    assert first["steps"] == 3
    assert [step for step, _ in first["curve"]] == [2, 3]


def test_training_stops_when_it_is_good_enough() -> None:
    row = learn(run(training=Training(steps=50, batch=4, check_every=2, enough=0.0)), CPU)
    assert row["steps"] == 4  # two looks in a row


def test_a_small_model_learns() -> None:
    task = MQAR(vocab=8, length=8, pairs=1, random_fill=False)
    model = LM.Config(vocab=8, width=32, layers=1, mlp=0, pattern=(GatedDeltaNet.Config(heads=1, head_dim=16),))
    tests = (Test(name="recall", task=task, examples=64),)
    row = learn(Run(series="", model=model, tasks=(task,), training=Training(steps=150, batch=32), tests=tests), CPU)
    assert row["scores"]["recall"] > 0.95


def test_a_fixed_training_set_is_gone_through_once_an_epoch() -> None:
    training = Training(steps=6, batch=4, examples=14)
    batches = [sample.tokens for sample in stream([MQAR(vocab=64, length=16, pairs=3)], training, seed=0)]
    rows = [[tuple(row.tolist()) for batch in epoch for row in batch] for epoch in (batches[:3], batches[3:])]
    assert len(set(rows[0])) == len(set(rows[1])) == 12  # of 14, the last two make no whole batch
    assert rows[0] != rows[1]
    assert len(set(rows[0]) | set(rows[1])) <= 14


def test_tasks_are_learned_in_turn_or_in_stages() -> None:
    tasks = [MQAR(vocab=64, length=16, pairs=3), MQAR(vocab=64, length=24, pairs=3)]
    for examples in (None, 8):
        training = Training(steps=5, batch=4, examples=examples)
        assert [sample.tokens.shape[1] for sample in stream(tasks, training, seed=0)] == [16, 24, 16, 24, 16]
        stages = training.with_(order="stages")
        assert [sample.tokens.shape[1] for sample in stream(tasks, stages, seed=0)] == [16, 16, 16, 24, 24]


def row_of(series: str, x: float | str, seed: int, **scores: float) -> Row:
    row = {"series": series, "x": x, "seed": seed, "scores": scores, "steps": 5, "parameters": 1234, "seconds": 60.0}
    return row | {"device": "cpu", "torch": "2.13"}


def test_the_table_has_means_ranges_and_published_figures() -> None:
    rows = [row_of("GDN", x, seed, accuracy=score) for x, seed, score in ((4.0, 0, 0.5), (4.0, 1, 0.7), (8.0, 0, 0.25))]
    table = Table.of(experiment(x_name="pairs", published={"GDN, 4": "0.9"}, source="A paper"), rows)
    assert table.columns == ["model", "pairs", "accuracy", "seeds", "steps", "parameters", "published"]
    assert table.rows == [["GDN", "4", "0.600 (0.50-0.70)", "2", "5", "1,234", "0.9"], ["GDN", "8", "0.250", "1", "5", "1,234", ""]]
    text = table.markdown(of=4)
    assert "| GDN | 4 | 0.600 (0.50-0.70) | 2 | 5 | 1,234 | 0.9 |" in text
    assert "3.0 minutes" in text
    assert "Published: A paper" in text
    assert "Incomplete: 3 of 4 runs are finished." in text
    assert "Incomplete" not in table.markdown(of=3)


def test_a_narrow_terminal_gets_a_table_for_each_x_and_whole_cells() -> None:
    tests = {f"length {n}": 0.5 for n in (64, 128, 256)}
    rows = [row_of("Gated DeltaNet, beta < 2", x, seed, **tests) for x in ("recall", "copying") for seed in (0, 1)]
    table = Table.of(experiment(x_name="task", published={"Gated DeltaNet, beta < 2": "0.9"}, source="A paper"), rows)

    def printed(width: int) -> str:
        console = Console(file=io.StringIO(), width=width)
        for part in table.rich(width):
            console.print(part)
        assert isinstance(console.file, io.StringIO)
        return console.file.getvalue()

    wide, narrow = printed(160), printed(80)
    assert wide.count("0.500 (0.50-0.50)") == 6
    assert wide.count("published") == 1
    assert [line.strip() for line in narrow.splitlines() if "task" in line] == ["task: recall", "task: copying"]
    assert narrow.count("Gated DeltaNet, beta < 2 │  0.500 │  0.500 │  0.500 │     2 │") == 2
    assert "parameters" not in narrow
    assert "…" not in wide + narrow


def test_a_narrow_terminal_has_every_score_and_whole_names() -> None:
    tests = {f"{pairs} pairs, length {n}n": pairs / 1000 for pairs in (64, 16, 32, 128) for n in (8, 4)}
    series = ("GDN, beta in (0, 2)", "GDN, beta in (0, 1)")
    table = Table.of(experiment(), [row_of(name, "", seed, **tests) for name in series for seed in (0, 1)])
    assert table.columns[1:4] == ["16 pairs, length 4n", "16 pairs, length 8n", "32 pairs, length 4n"]
    console = Console(file=io.StringIO(), width=80)
    console.print(*table.rich(80))
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "…" not in text
    assert [text.count(name) for name in series] == [2, 2]
    assert [text.count(f" {pairs / 1000:.3f} ") for pairs in (16, 32, 64, 128)] == [4, 4, 4, 4]


def test_tables_go_by_what_is_varied_then_by_model() -> None:
    runs = [run(series, x=x, seed=seed) for seed in (0, 1) for x in (64.0, 32.0) for series in ("b", "a")]
    rows = [row_of(series, x, seed) for series, x, seed in (("a", 64.0, 1), ("a", 32.0, 0), ("b", 64.0, 0), ("b", 32.0, 1))]
    assert [(row["x"], row["series"]) for row in arranged(rows, runs)] == [(32.0, "b"), (32.0, "a"), (64.0, "b"), (64.0, "a")]


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab: expected 3 as in Parity, got 5"):
        run(model=run().model.with_(vocab=5))
    with pytest.raises(ConfigError, match="tests: expected at least one"):
        run(tests=())
    with pytest.raises(ConfigError, match="tasks: expected at least one"):
        run(tasks=())
    with pytest.raises(ConfigError, match="steps: expected at least 1"):
        Training(steps=0, batch=1)
    with pytest.raises(ConfigError, match="examples: expected at least batch=8"):
        Training(steps=1, batch=8, examples=4)
    with pytest.raises(ConfigError, match="examples: expected at least 1"):
        Test(name="", task=TASK, examples=0)
