"""The benchmark prints and records what it measured, and gives a wrong row no time."""

from __future__ import annotations

import functools
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gdn.core.dispatch import Impl
from gdn.core.errors import ArgumentError
from gdn.ops.delta_rule import OP
from gdn.ops.delta_rule.problems import Problem
from gdn.testing import bench

TINY = Problem(name="tiny", T=70, H=1, HV=2, K=8, V=8)


@pytest.fixture
def one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first row is timed, in this process."""
    monkeypatch.setattr(bench, "SLOW", {"recurrent": 0, "reference": 0})
    monkeypatch.setattr(bench, "_apart", lambda function, *args: function(*args))
    monkeypatch.setattr(bench, "_peak", lambda problem, name: dict.fromkeys(bench.MODES, 2**20))


@pytest.mark.usefixtures("one_row")
def test_table_and_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "results" / "ops.jsonl"
    assert bench.bench_problems([TINY], repeats=2, out=out) == 0
    printed = capsys.readouterr().out
    assert "T=70 H=1 HV=2 K=8 V=8" in printed and "transformers" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == len(bench.MODES) * len(bench._rows(TINY))
    assert {row["mode"] for row in rows} == set(bench.MODES)
    for row in rows:
        assert row["ok"] and row["milliseconds"] > 0 and len(row["samples"]) == 2 and row["threads"] >= 1
        assert row["cpu"] and row["torch"] and row["transformers"] and row["command"] and row["problem"]["T"] == 70


def test_the_peer_is_plain_torch_where_transformers_would_call_another(monkeypatch: pytest.MonkeyPatch) -> None:
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    plain = inspect.unwrap(module.torch_chunk_gated_delta_rule)

    @functools.wraps(plain)
    def of_another_library(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", of_another_library)
    peer = bench.peer()
    assert peer is not None
    assert peer(TINY.build())[0].shape == (1, 70, 2, 8)


def test_a_file_that_cannot_be_written_is_named_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", lambda *_: measured.append(1) or [])
    file = tmp_path / "file"
    file.write_text("rows\n")
    for out in (tmp_path, file / "rows.jsonl", file / "folder" / "rows.jsonl"):
        with pytest.raises(
            ArgumentError, match=rf"out: expected a file that can be written, got {re.escape(str(out))} \(.*{tmp_path.name}"
        ):
            bench.bench_problems([TINY], repeats=1, out=out)
    fresh = tmp_path / "fresh.jsonl"
    monkeypatch.setattr(bench, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.bench_problems([TINY], repeats=1, out=fresh)
    assert not measured and not fresh.exists()
    monkeypatch.setattr(bench, "measure", lambda *_: measured.append(1) or [])
    assert bench.bench_problems([TINY], repeats=1, out=file) == 0
    assert measured and file.read_text() == "rows\n"


def test_repeats_are_at_least_one() -> None:
    with pytest.raises(ArgumentError, match="repeats: expected at least 1, got 0"):
        bench.bench_problems([TINY], repeats=0, out=None)


def without_decay(q: Tensor, k: Tensor, v: Tensor, g: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return OP.function("reference")(q, k, v, 0 * g, *rest)


@pytest.mark.usefixtures("one_row")
def test_a_wrong_row_gets_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(OP, "impls", OP.impls)
    OP.register(Impl("wrong row", f"{__name__}:without_decay"))
    out = tmp_path / "ops.jsonl"
    try:
        assert bench.bench_problems([TINY], repeats=1, out=out) == 1
    finally:
        OP._choices.clear()
    line = next(line for line in capsys.readouterr().out.splitlines() if "wrong row" in line)
    assert "wrong" in line.replace("wrong row", "")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    (row,) = [row for row in rows if row["impl"] == "wrong row"]
    assert not row["ok"] and "milliseconds" not in row
    assert all("milliseconds" in row for row in rows if row["impl"] != "wrong row")


def test_peak_memory_is_that_of_a_fresh_process() -> None:
    peaks = bench._peak(TINY.with_(T=4096, K=64, V=64), "chunked")
    if not peaks:
        pytest.skip("the system does not tell")
    assert 2**20 < peaks["forward"] <= peaks["forward+backward"] < 2**30
