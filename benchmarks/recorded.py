"""Recorded rows in one form: what was measured, on which machine, by whom, in which run; and the newest of each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "results"

PROBLEMS: dict[str, tuple[str, ...]] = {
    "delta_rule": ("what", "row", "kind", "dtype", "segment"),
    "layer": ("mixer", "width", "shape", "dtype"),
    "train": ("size", "shape"),
    "decode": ("size", "batch", "context"),
    "small_ops": ("row",),
    "first": ("work",),
    "ops": ("op", "name", "mode", "dtype"),
    "accelerate": ("work", "length", "vocab", "layers", "dtype"),
    "accelerate_gpu": ("work", "size", "shape"),
}
"""What tells the problems of each benchmark apart."""

VERSIONS = (
    "gdn", "commit", "torch", "triton", "flash-linear-attention", "fla-core", "flash-qla", "tilelang", "attn-gym", "nvidia-cutlass-dsl", "mamba-ssm", "flash-attn",
    "transformers", "python", "threads",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One call of a script."""

    device: str
    versions: tuple[tuple[str, str], ...]
    date: str
    """Empty where it was not recorded, as are the command and the note."""
    command: str
    note: str


@dataclass(frozen=True)
class Result:
    """One row."""

    bench: str
    problem: tuple[Any, ...]
    """In the order of `PROBLEMS`; None where a row does not say."""
    impl: str
    values: Mapping[str, Any]
    run: Run
    beside: tuple[Result, ...] = ()
    """Others of the problem in the same run, if it is one of the `newest`."""

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(name, default)

    def fact(self, name: str) -> Any:
        """A part of the problem by its name."""
        return self.problem[PROBLEMS[self.bench].index(name)]

    @property
    def failed(self) -> str | None:
        return self.values.get("failed")


def load(folder: Path = FOLDER) -> list[Result]:
    """Every row of every file, in the order of the files' names and of their lines."""
    found = []
    for path in sorted(folder.rglob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            try:
                found += [result for row in rearranged(json.loads(line), path.stem) if (result := parsed(row)) is not None]
            except (KeyError, ValueError) as problem:
                raise ValueError(f"{path}, line {number}: {type(problem).__name__}: {problem}") from problem
    return found


def parsed(row: dict[str, Any]) -> Result | None:
    """A row in the form of `rows.run`; None for a peer that was not installed, which is no result."""
    bench = row["bench"]
    if bench not in PROBLEMS:
        raise ValueError(f"bench: expected one of {', '.join(PROBLEMS)}, got {bench!r}")
    if str(row.get("failed", "")).startswith(("ModuleNotFoundError", "ImportError")):
        return None
    versions = tuple((name, str(row[name])) for name in VERSIONS if name in row)
    run = Run(row["device"], versions, row.get("date", ""), row.get("command", ""), row.get("run", ""))
    return Result(bench, tuple(row.get(name) for name in PROBLEMS[bench]), row["impl"], row, run)


def rearranged(row: dict[str, Any], file: str) -> list[dict[str, Any]]:
    """Rows of scripts with forms of their own, and of older forms, in that of `rows.run`."""
    row = {"bench": row.get("bench", {"ops": "ops", "accelerate": "accelerate"}.get(file, file)), **row}
    if isinstance(row.get("error"), str):
        row["failed"] = row.pop("error")
    return _FORMS.get(row["bench"], lambda row: [row])(row)


def _delta_rule(row: dict[str, Any]) -> list[dict[str, Any]]:
    row["impl"] = row["impl"].partition(" 0.")[0]
    if row.get("run") == "with FLA":  # before versions were recorded
        row["flash-linear-attention"] = "0.6.0"
    if row["what"] == "training" and " K" in row["row"]:
        row["what"] = "wide"
    return [{"kind": "layer", "dtype": "bfloat16", **row}]


def _train(row: dict[str, Any]) -> list[dict[str, Any]]:
    if "model" in row:
        row |= {"impl": row["model"] + (" compiled" if row["compiled"] else ""), "mfu_6n": row.pop("mfu")}
    return [row]


def _small_ops(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"impl": "portable", **row}]


def _ops(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [row | {"device": row["cpu"], "date": row["time"], "eager_ms": row["milliseconds"], **row["problem"], "dtype": row["dtype"]}]


def _accelerate(row: dict[str, Any]) -> list[dict[str, Any]]:
    """One row holds both sides."""
    return [row | {"impl": impl, "eager_ms": 1e3 * row[f"{side}_s"]} for impl, side in (("ours", "gdn"), ("transformers", "stock"))]


_FORMS = {"delta_rule": _delta_rule, "train": _train, "small_ops": _small_ops, "ops": _ops, "accelerate": _accelerate}


def newest(results: Iterable[Result]) -> list[Result]:
    """The newest measurement of each machine, problem and implementation, and a failure only where nothing was ever measured."""
    found: dict[tuple[Any, ...], Result] = {}
    together: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        together.setdefault((result.bench, result.problem, result.run), []).append(result)
        key = (result.run.device, result.bench, result.problem, result.impl)
        before = found.get(key)
        if before is None or (not result.failed, result.run.date) >= (not before.failed, before.run.date):
            found[key] = result
    return [replace(r, beside=tuple(together[r.bench, r.problem, r.run])) for r in found.values()]
