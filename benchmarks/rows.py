"""Rows of a benchmark, one after another under a time limit, each written to a file as soon as it is known.

A row that fails or takes too long is a row that says so, and the next one is measured. Rows stand in order of importance, because a run may
be cut: by its budget, or by whoever lent the machine. A fault that leaves the device unusable (an illegal access in one peer's kernel) starts
the process again at the next row.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "triton",
    "transformers",
    "flash-linear-attention",
    "fla-core",
    "flash-qla",
    "tilelang",
    "attn-gym",
    "nvidia-cutlass-dsl",
    "mamba-ssm",
    "flash-attn",
)
FROM, ENDS = "GDN_BENCHMARK_FROM", "GDN_BENCHMARK_ENDS"
"""Environment of a process that goes on where another one lost its device: the first row, and when the budget ends (seconds since 1970)."""


@dataclass(frozen=True)
class Row:
    """One measurement."""

    problem: dict[str, Any]
    """What is measured: operator or model, shape, what of it."""
    impl: str
    """Whose: "ours", "fla", ..."""
    measure: Callable[[], dict[str, Any]]


class OutOfTime(BaseException):
    """The time limit of a row. Not an Exception, so that no library takes it for a failed attempt of its own and tries another."""


def add_arguments(parser: argparse.ArgumentParser, *, budget: float = 540, row_limit: float = 120) -> None:
    """The options that every benchmark of rows has."""
    parser.add_argument("--out", default="", help="jsonl file that each row is appended to as soon as it is measured")
    parser.add_argument(
        "--budget", type=positive, default=budget, help="seconds for all rows; the ones left then are not measured (default %(default)s)"
    )
    parser.add_argument(
        "--row-limit", type=positive, default=row_limit, help="seconds for one row, compiling and autotuning included (default %(default)s)"
    )


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text}")
    return value


def chosen(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: a comma list of some of the known names, in the order given."""

    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r}: expected some of {', '.join(known)}")
        return names

    return parse


def batch_by_length(text: str) -> tuple[int, int]:
    """An argparse type: 8x4096 is 8 sequences of 4096 tokens."""
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected batch x length, as 8x4096")
    return int(parts[0]), int(parts[1])


def run(bench: str, rows: Sequence[Row], args: argparse.Namespace, device: torch.device | str = "cuda") -> list[dict[str, Any]]:
    """Measure, print and write the rows; those that the budget leaves out are named at the end."""
    first = int(os.environ.get(FROM, 0))
    ends = float(os.environ.get(ENDS, time.time() + args.budget))
    facts, results = machine(torch.device(device)), []
    for index in range(first, len(rows)):
        row, left = rows[index], ends - time.time()
        if left <= 0:
            print(f"not measured, the budget is spent: {'; '.join(describe(r) for r in rows[index:])}", flush=True)
            break
        result = {"bench": bench, **row.problem, "impl": row.impl, **attempt(row, min(left, args.row_limit)), **facts}
        results.append(result)
        print(f"{describe(row)}: {json.dumps({k: v for k, v in result.items() if k not in facts and k not in row.problem})}", flush=True)
        if args.out:
            append(Path(args.out), result)
        if index + 1 < len(rows) and ("failed" in result or "errors_missing" in result) and lost(torch.device(device)):
            print("the device is lost; starting again at the next row", flush=True)
            os.environ[FROM], os.environ[ENDS] = str(index + 1), str(ends)
            os.execv(sys.executable, sys.orig_argv)
    return results


def attempt(row: Row, limit: float) -> dict[str, Any]:
    """What the row measures, or why it failed; and the seconds it took."""
    started = time.perf_counter()
    try:
        with time_limit(limit):
            found = row.measure()
    except OutOfTime:
        found = {"failed": f"more than {limit:.0f} s"}
    except Exception as failure:
        found = {"failed": f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:400]}
    release()
    return {**found, "took_s": round(time.perf_counter() - started, 1)}


def compared(errors: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Errors by name, to three digits. A failure to compare does not take the times of the row with it."""
    try:
        return {"errors": {name: float(f"{error:.3g}") for name, error in errors().items()}}
    except Exception as failure:
        return {"errors_missing": f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:200]}


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise OutOfTime in the body, at a Python instruction, once the seconds are over; and again each second, should a callback swallow it."""

    def over(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def release() -> None:
    """Let go of the memory of a row."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if torch.cuda.is_initialized():
        gc.collect()
        with suppress(RuntimeError):  # the device is lost, which `lost` finds
            torch.cuda.empty_cache()


def lost(device: torch.device) -> bool:
    """Whether no more work can be given to the device by this process."""
    if device.type != "cuda":
        return False
    try:
        torch.ones(1, device=device).add_(1).item()
    except RuntimeError as failure:
        return not isinstance(failure, torch.OutOfMemoryError)
    return False


def append(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(result) + "\n")


def describe(row: Row) -> str:
    return f"{' '.join(str(v) for v in row.problem.values())} {row.impl}"


@cache
def machine(device: torch.device) -> dict[str, Any]:
    """Where, with what, when and how."""
    versions = {name: version for name in PACKAGES if (version := installed(name))}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "torch": torch.__version__,
        **versions,
        "python": platform.python_version(),
        **({"commit": commit} if (commit := revision()) else {}),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "command": command(),
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    from gdn.core.device import machine as here

    return here().name if here().device == "cpu" else platform.processor() or platform.machine()


def command() -> str:
    script = Path(sys.argv[0])
    return shlex.join(["python", f"{script.parent.name}/{script.name}", *sys.argv[1:]])


def revision() -> str | None:
    """The commit of this tree, where it is a checkout."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return found.stdout.strip() or None
