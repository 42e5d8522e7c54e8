"""`gdn bench ops`: the gated delta rule on the CPU, timed beside the same operator of transformers.

First every row is run on the problem at 2048 tokens at most, and the outputs and gradients of the first key head (heads do not meet) are
compared with the float64 recurrence. A row that is wrong gets no time. Then the rows take turns, so that what else the machine does falls
on all of them. Peak memory is that of a fresh process for each row: the largest resident memory during the calls over that before them.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import gdn
from gdn.core import device as hardware
from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.core.files import expect_writable
from gdn.ops import gated_delta_rule
from gdn.ops.delta_rule import OP
from gdn.ops.delta_rule.problems import BENCHMARK, Problem
from gdn.testing import compare

PEER = "transformers"
SLOW = {"recurrent": 256, "reference": 256}
"""Rows that walk token by token, and the longest sequence they are timed on."""
CHECKED_TOKENS = 2048
MODES = ("forward", "forward+backward")

Function = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One row of one problem. Times in milliseconds and bytes by mode; none where the row is wrong."""

    impl: str
    error: float
    allowed: float
    samples: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    peak: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    def median(self, mode: str) -> float | None:
        return statistics.median(self.samples[mode]) if self.samples.get(mode) else None


def bench_ops(*, full: bool = False, repeats: int = 5, out: Path | None = None) -> int:
    """Time the gated delta rule on the CPU beside transformers', errors and peak memory included.

    Args:
        full: Also 8192 tokens, and two value heads for each key head.
        repeats: Timed calls of each; the median counts.
        out: Append one JSON line per measurement to this file.
    """
    return bench_problems(BENCHMARK if full else BENCHMARK[:1], repeats=repeats, out=out)


def bench_problems(problems: Sequence[Problem], *, repeats: int, out: Path | None) -> int:
    """Measure, print and record problems; the exit status is 1 when a row is wrong."""
    if repeats < 1:
        raise ArgumentError(f"repeats: expected at least 1, got {repeats}")
    if out is not None:
        expect_writable(out, "out")
    console = Console()
    machine = hardware.machine()
    console.print(f"{machine.name}, {torch.get_num_threads()} threads, torch {machine.torch}, float32")
    if peer() is None:
        console.print('no peer to compare with: pip install "gated-delta-networks\\[test]" brings transformers')
    wrong = 0
    for problem in problems:
        measurements = measure(problem, repeats)
        console.print(_table(problem, measurements))
        wrong += sum(not m.ok for m in measurements)
        if out is not None:
            _record(out, problem, measurements)
    return 1 if wrong else 0


def measure(problem: Problem, repeats: int) -> list[Measurement]:
    """Check every row, then time those that are right.

    Each mode is timed in a fresh process, the rows in turns: what has run before changes what memory costs. After a backward pass the
    allocator keeps large blocks, and the peer's forward, which in a process that only reads spends a third of its time on page faults,
    finds them there.
    """
    found = _check(problem, _rows(problem))
    right = [m.impl for m in found if m.ok]
    samples = {mode: _apart(_times_here, problem, right, mode, repeats) for mode in MODES}
    return [
        dataclasses.replace(m, samples={mode: samples[mode][m.impl] for mode in MODES}, peak=_peak(problem, m.impl)) if m.ok else m
        for m in found
    ]


def _apart(function: Callable[..., Any], *args: Any) -> Any:
    """The result of a function in a fresh process with as many threads."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, args)


def _times_here(problem: Problem, names: Sequence[str], mode: str, repeats: int) -> dict[str, list[float]]:
    functions = {name: _function(name) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    arguments = problem.build(dtype=torch.float32)
    for turn in range(repeats + 1):
        for name, function in functions.items():
            elapsed = _time(function, arguments, mode)
            if turn:  # the first is a warm-up
                samples[name].append(elapsed)
    return samples


def peer() -> Function | None:
    """The gated delta rule of transformers (Qwen3-Next) in plain torch, called like ours; None where it is not installed.

    In plain torch also where flash-linear-attention is installed, which transformers would call by the same name.
    """
    if not hardware.has_package("transformers"):
        return None
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # importing the model says that its optional kernels are missing
    try:
        from transformers.models.qwen3_next import modeling_qwen3_next
    finally:
        logging.set_verbosity(level)
    rule = inspect.unwrap(modeling_qwen3_next.torch_chunk_gated_delta_rule)

    def function(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = (arguments[name] for name in ("q", "k", "v", "g", "beta"))
        groups = v.shape[2] // k.shape[2]
        if groups > 1:
            q, k = (x.repeat_interleave(groups, dim=2) for x in (q, k))
        start = arguments.get("initial_state")
        o, state = rule(q, k, v, g=g, beta=beta, initial_state=start, output_final_state=True)
        assert state is not None
        return o, state

    return function


def _rows(problem: Problem) -> list[str]:
    runs = [v.name for v in OP.explain("cpu", torch.float32, K=problem.K, V=problem.V) if v.reason is None]
    return [name for name in runs if SLOW.get(name, problem.T) >= problem.T] + ([PEER] if peer() is not None else [])


def _function(name: str) -> Function:
    if name == PEER:
        found = peer()
        assert found is not None
        return found

    def function(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with use(gated_delta_rule=name):
            return gated_delta_rule(**arguments)

    return function


def _check(problem: Problem, names: Sequence[str]) -> list[Measurement]:
    """The error of each row, and what it may be. The peer, whose rounding is its own affair, must only compute the same function."""
    short = problem.with_(T=min(problem.T, CHECKED_TOKENS))
    truth = _first_head(short, _function("reference"), torch.float64, alone=True)
    rounding = compare.distance(_first_head(short, _function("reference"), torch.float32, alone=True), truth)
    ours = compare.allowed(rounding, torch.float32)
    found = []
    for name in names:
        error = compare.distance(_first_head(short, _function(name), torch.float32, alone=False), truth)
        found.append(Measurement(name, error, 1e-3 if name == PEER else ours))
    return found


def _first_head(problem: Problem, function: Function, dtype: torch.dtype, *, alone: bool) -> compare.Results:
    """Outputs and gradients of the first key head and its value heads, computed with all heads or `alone`."""
    groups = problem.HV // problem.H
    arguments = problem.build(dtype=dtype)
    shape = (problem.B, problem.T, problem.HV, problem.V), (problem.B, problem.HV, problem.K, problem.V)
    weights = compare.weights([torch.empty(s, dtype=dtype) for s in shape])
    if alone:
        arguments = {name: _heads(name, x, groups).detach().clone().requires_grad_() for name, x in arguments.items()}
        weights = [weights[0][:, :, :groups], weights[1][:, :groups]]
    outputs = function(arguments)
    gradients = dict(zip(arguments, torch.autograd.grad(outputs, list(arguments.values()), weights)))
    tensors = {"o": outputs[0][:, :, :groups], "state": outputs[1][:, :groups]}
    tensors |= {f"gradient of {name}": _heads(name, x, groups) for name, x in gradients.items()}
    return compare.Results(tuple(tensors), tuple(x.detach().double() for x in tensors.values()))


def _heads(name: str, x: Tensor, groups: int) -> Tensor:
    return x[:, :, : 1 if name in ("q", "k") else groups]


def _time(function: Function, arguments: dict[str, Any], mode: str) -> float:
    start = time.perf_counter()
    _call(function, arguments, mode)
    return 1e3 * (time.perf_counter() - start)


def _call(function: Function, arguments: dict[str, Any], mode: str) -> None:
    with torch.set_grad_enabled(mode != "forward"):
        outputs = function(arguments)
        if mode != "forward":
            torch.autograd.grad(outputs, list(arguments.values()), [x.detach() for x in outputs])


def _peak(problem: Problem, name: str) -> dict[str, int]:
    """Peak memory by mode, measured in a fresh process; empty where the system does not tell (it is read from /proc)."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    return _apart(_peak_here, problem, name)


def _peak_here(problem: Problem, name: str) -> dict[str, int]:
    function = _function(name)
    _call(function, problem.with_(T=64).build(dtype=torch.float32), MODES[1])  # libraries load, threads start
    arguments = problem.build(dtype=torch.float32)
    Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is resident now
    before, peaks = _status("VmRSS"), {}
    for mode in MODES:  # the lesser first: the peak never falls
        _call(function, arguments, mode)
        peaks[mode] = _status("VmHWM") - before
    return peaks


def _status(field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def _table(problem: Problem, measurements: Sequence[Measurement]) -> Table:
    sizes = f"B={problem.B} T={problem.T} H={problem.H} HV={problem.HV} K={problem.K} V={problem.V}"
    table = Table(title=f"gated_delta_rule, {problem.name}: {sizes}", title_justify="left", caption=f"speed: {PEER} = 1")
    for column in ("row", "what", "error", "allowed", "ms", "MiB", "speed"):
        table.add_column(column, justify="left" if column in ("row", "what") else "right")
    theirs = next((m for m in measurements if m.impl == PEER), None)
    for m in measurements:
        for mode in MODES:
            cells = [m.impl, mode, f"{m.error:.1e}", f"{m.allowed:.1e}"]
            if not m.ok:
                table.add_row(*cells, "[red]wrong[/]")
                continue
            ratio = None if theirs is None or m is theirs else _ratio(theirs, m, mode)
            memory = f"{m.peak[mode] / 2**20:.0f}" if m.peak else ""
            table.add_row(*cells, f"{m.median(mode):.1f}", memory, "" if ratio is None else f"{ratio:.2f}")
    return table


def _ratio(theirs: Measurement, ours: Measurement, mode: str) -> float | None:
    """How many times the peer's time ours goes into."""
    a, b = theirs.median(mode), ours.median(mode)
    return None if a is None or b is None else a / b


def _record(out: Path, problem: Problem, measurements: Sequence[Measurement]) -> None:
    from importlib.metadata import version

    machine = hardware.machine()
    common = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["gdn", *sys.argv[1:]]),
        "cpu": machine.name,
        "threads": torch.get_num_threads(),
        "gdn": gdn.__version__,
        "torch": torch.__version__,
        PEER: version(PEER) if hardware.has_package(PEER) else None,
        "op": OP.name,
        "dtype": "float32",
        "problem": dataclasses.asdict(problem),
    }
    with out.open("a") as lines:
        for m in measurements:
            row = common | {"impl": m.impl, "error": m.error, "allowed": m.allowed, "ok": m.ok}
            for mode in MODES if m.ok else ():
                timed = {"mode": mode, "milliseconds": m.median(mode), "samples": m.samples[mode], "peak_bytes": m.peak.get(mode)}
                lines.write(json.dumps(row | timed) + "\n")
            if not m.ok:
                lines.write(json.dumps(row) + "\n")
