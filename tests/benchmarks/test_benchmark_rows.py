from __future__ import annotations

import argparse
import contextlib
import json
import os
import time

import pytest
import rows
import torch


def arguments(tmp_path, **changes):
    return argparse.Namespace(**{"out": str(tmp_path / "deep" / "out.jsonl"), "budget": 60.0, "row_limit": 30.0, **changes})


def row(measure, impl="ours", **problem):
    return rows.Row(problem or {"shape": "1x8"}, impl, measure)


def read(args):
    with open(args.out) as file:
        return [json.loads(line) for line in file]


def fails():
    raise ValueError("not\n  here")


def test_a_failing_row_is_a_row_and_the_next_is_measured(tmp_path):
    args = arguments(tmp_path)
    found = rows.run("demo", [row(fails, "peer", shape="2x4"), row(lambda: {"eager_ms": 1.5})], args, "cpu")
    assert [r["impl"] for r in found] == ["peer", "ours"]
    assert found[0]["failed"] == "ValueError: not here" and found[0]["shape"] == "2x4"
    assert found[1]["eager_ms"] == 1.5 and "failed" not in found[1]
    assert read(args) == found


def test_rows_say_where_when_and_how(tmp_path):
    args = arguments(tmp_path)
    found = rows.run("demo", [row(dict)], args, "cpu")[0]
    assert found["bench"] == "demo" and found["torch"] == torch.__version__
    assert found["command"].startswith("python ") and found["device"] and found["date"].endswith("Z")


def test_each_row_is_written_before_the_next_begins(tmp_path):
    args = arguments(tmp_path)
    seen = []
    rows.run("demo", [row(lambda: {"x": 1}), row(lambda: seen.append(len(read(args))) or {})], args, "cpu")
    assert seen == [1]


def spin(*_):
    while True:
        time.sleep(0.01)


def swallow():
    """A library that takes every Exception for its own, and once even more than that."""
    for handler in (BaseException, Exception):
        with contextlib.suppress(handler):
            spin()


@pytest.mark.parametrize("measure", [spin, swallow])
def test_a_row_beyond_its_limit_ends(tmp_path, measure):
    args = arguments(tmp_path, row_limit=0.2)
    begin = time.monotonic()
    found = rows.run("demo", [row(measure), row(lambda: {"x": 1})], args, "cpu")
    assert found[0]["failed"] == "more than 0 s" and found[1]["x"] == 1
    assert time.monotonic() - begin < 20


def test_no_alarm_is_left_behind(tmp_path):
    args = arguments(tmp_path, row_limit=0.2)
    rows.run("demo", [row(dict)], args, "cpu")
    time.sleep(0.4)


def test_rows_beyond_the_budget_are_named_and_not_measured(tmp_path, capsys):
    args = arguments(tmp_path, budget=0.2)
    found = rows.run("demo", [row(spin), row(lambda: {"x": 1}, shape="3x3")], args, "cpu")
    assert len(found) == len(read(args)) == 1
    assert "budget is spent: 3x3 ours" in capsys.readouterr().out


def lost_in_a_comparison():
    return {"x": 2} | rows.compared(fails)


@pytest.mark.parametrize("loses", [fails, lost_in_a_comparison])
def test_a_lost_device_starts_the_process_again_at_the_next_row(loses, tmp_path, monkeypatch):
    class Started(BaseException):
        pass

    def start(*_):
        raise Started

    args = arguments(tmp_path)
    monkeypatch.setattr(rows, "lost", lambda device: True)
    monkeypatch.setattr(os, "execv", start)
    for name in (rows.FROM, rows.ENDS):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv(rows.ENDS, str(time.time() + 60))
    plan = [row(lambda: {"x": 1}), row(loses), row(lambda: {"x": 3})]
    with pytest.raises(Started):
        rows.run("demo", plan, args, "cpu")
    assert os.environ[rows.FROM] == "2"
    assert float(os.environ[rows.ENDS]) > time.time()
    assert [r["x"] for r in rows.run("demo", plan, args, "cpu")] == [3]
    assert len(read(args)) == 3


def test_an_interrupt_by_hand_ends_the_run(tmp_path):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows.run("demo", [row(stop)], arguments(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("parse", "text", "message"),
    [
        (rows.chosen(["ours", "fla"]), "ours,flaa", "'flaa': expected some of ours, fla"),
        (rows.batch_by_length, "8", "expected batch x length"),
        (rows.batch_by_length, "0x8", "expected batch x length"),
        (rows.positive, "-1", "above 0"),
    ],
)
def test_arguments_are_checked(parse, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(text)
