"""The doctor examines every operator, finds none wrong, and finds a fault that is planted."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from gdn.core.dispatch import Impl, ops
from gdn.core.errors import ArgumentError
from gdn.testing import doctor

CPU = torch.device("cpu")


def test_every_operator_has_an_example() -> None:
    assert set(doctor.EXAMPLES) == set(ops())


@pytest.mark.parametrize("name", sorted(doctor.EXAMPLES))
def test_every_row_that_runs_here_is_right(name: str) -> None:
    findings = doctor.examine_op(ops()[name], CPU, torch.float32)
    assert any(f.error is not None for f in findings)
    for finding in findings:
        assert finding.ok, finding
    assert sum(f.chosen for f in findings) == 1


def half_as_large(x: torch.Tensor, eps: float) -> torch.Tensor:
    return 0.5 * ops()["l2norm"].function("reference")(x, eps)


def test_a_wrong_row_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    op = ops()["l2norm"]
    monkeypatch.setattr(op, "impls", op.impls)
    op.register(Impl("wrong", f"{__name__}:half_as_large"))
    monkeypatch.setattr(doctor, "EXAMPLES", {"l2norm": doctor.EXAMPLES["l2norm"]})
    assert doctor.examine("cpu") == 1
    op._choices.clear()
    assert "l2norm: wrong is wrong here" in capsys.readouterr().out


def raises(x: torch.Tensor, eps: float) -> torch.Tensor:
    raise KeyError("a compiler's own error")


def test_a_row_that_raises_anything_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    op = ops()["l2norm"]
    monkeypatch.setattr(op, "impls", op.impls)
    op.register(Impl("broken", f"{__name__}:raises"))
    found = {f.impl: f for f in doctor.examine_op(op, CPU, torch.float32)}
    op._choices.clear()
    assert not found["broken"].ok and found["broken"].error == float("inf")
    assert found["reference"].ok
    assert "l2norm: broken failed: KeyError" in capsys.readouterr().err


@pytest.mark.parametrize("reason", ["", "Failed to find C compiler [gcc]"])
def test_slow_launches_are_told(reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor.portable_plan, "why_not", lambda: reason)
    doctor._say_how_kernels_are_launched(Console(width=200))
    shown = capsys.readouterr().out
    assert shown == (f"eager calls take the host longer than they need, as each kernel is launched by itself: {reason}\n" if reason else "")


def test_operators_are_not_begun_after_the_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "EXAMPLES", {name: doctor.EXAMPLES[name] for name in ("l2norm", "rms_norm")})
    assert doctor.examine("cpu", seconds=1e-6) == 1
    shown = capsys.readouterr().out
    assert "2 operators not examined" in shown and "nothing was examined" in shown and "agree" not in shown
    assert doctor.examine("cpu", seconds=0) == 0
    assert "every implementation that runs here agrees" in capsys.readouterr().out


def test_what_was_examined_in_time_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "EXAMPLES", {name: doctor.EXAMPLES[name] for name in ("l2norm", "rms_norm")})
    clock, examine_op = [0.0], doctor.examine_op
    monkeypatch.setattr(doctor, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter))
    monkeypatch.setattr(doctor, "examine_op", lambda *args: (examine_op(*args), clock.__setitem__(0, 60.0))[0])
    assert doctor.examine("cpu", seconds=55) == 0
    shown = capsys.readouterr().out
    assert "1 operators not examined" in shown and "every implementation that was examined agrees" in shown


def test_skipped_rows_say_why_and_times_are_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "EXAMPLES", {"l2norm": doctor.EXAMPLES["l2norm"]})
    monkeypatch.setattr(doctor, "milliseconds", lambda call, device: 12.34)
    assert doctor.examine("cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("portable" in line and "(1)" in line for line in lines) and "(1) needs a cuda tensor, got cpu" in lines
    assert any("→ torch" in line and "12.34" in line and "ok" in line for line in lines)


def test_verdicts_and_reasons_are_whole_in_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    why = "needs [bfloat16] tensors"
    findings = [
        doctor.Finding("value_gated_linear_attention_step", "torch", True, error=1e-7, allowed=2e-7, milliseconds=123.4),
        doctor.Finding("value_gated_linear_attention_step", "portable", False, why),
    ]
    Console(width=50).print(doctor._table(findings, torch.float32))
    lines = capsys.readouterr().out.splitlines()
    assert any("→ torch" in line and "1.0e-07" in line and "123.40" in line and "ok" in line for line in lines)
    assert any("portable" in line and "(1)" in line for line in lines) and f"(1) {why}" in lines


def test_the_truth_of_small_problems_is_found_in_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other programs use the cores, threads wait for each other until the time of the whole examination is over."""
    threads: list[int] = []
    monkeypatch.setattr(doctor, "_expected", lambda *args: threads.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        doctor._prepare(["l2norm"], torch.device("cpu"), torch.float32, float("inf"), lambda text: None)
        assert (threads, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_bad_seconds_are_named() -> None:
    with pytest.raises(ArgumentError, match="seconds: expected 0"):
        doctor.examine("cpu", seconds=-1)


class Event:
    """A device whose clock moves by 2 ms a call."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        self.at = -1.0

    def record(self) -> None:
        self.at = Event.now

    def elapsed_time(self, other: Event) -> float:
        return other.at - self.at


def test_a_gpu_is_timed_between_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def call() -> None:
        Event.now += 2.0

    assert doctor.milliseconds(call, torch.device("cuda")) == 2.0


@pytest.mark.parametrize(("seconds", "calls"), [(0.2, 2), (0.09, 5), (0.06, 7), (0.001, 22)])
def test_a_slow_call_is_timed_once(seconds: float, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = [0.0], list[float]()

    def call() -> None:
        called.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(doctor, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    assert doctor.milliseconds(call, CPU) == pytest.approx(1e3 * seconds) and len(called) == calls


def test_half_of_the_time_is_for_examining(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What references had no time to tell is asked of them then."""
    monkeypatch.setattr(doctor, "EXAMPLES", {name: doctor.EXAMPLES[name] for name in ("l2norm", "rms_norm", "write_gate")})
    clock, expected, seconds = [0.0], doctor._expected, list[float]()
    monkeypatch.setattr(doctor, "time", SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter))

    def slow(*args: Any) -> doctor.Expected:
        seconds.append(clock[0])
        clock[0] += 20.0
        return expected(*args)

    monkeypatch.setattr(doctor, "_expected", slow)
    assert doctor.examine("cpu", seconds=55) == 0
    assert seconds == [0.0, 20.0, 40.0]
    assert "not examined" not in capsys.readouterr().out


def test_a_row_is_held_to_the_error_of_its_own_dtype() -> None:
    found = {f.impl: f for f in doctor.examine_op(ops()["l2norm"], CPU, torch.bfloat16)}
    own = found["reference"].error
    assert own is not None and 1e-4 < own < 1e-2 and found["torch"].ok


def test_the_reference_is_held_to_float64_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes longer than all other rows. Its error is what the others are allowed, and its own finding."""
    run, rows = doctor.compare.run, list[str]()
    monkeypatch.setattr(doctor.compare, "run", lambda op, row, arguments: (rows.append(row), run(op, row, arguments))[1])
    found = {f.impl: f for f in doctor.examine_op(ops()["l2norm"], CPU, torch.float32)}
    assert rows.count("reference") == 2 and rows.count("torch") == 1
    assert found["reference"].error is not None and 0 < found["reference"].error < 1e-6
