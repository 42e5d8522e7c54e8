"""Write BENCHMARKS.md and its plots from benchmarks/results/**/*.jsonl. `python benchmarks/report.py`

A figure is the newest of its machine, problem and implementation. Each table says which runs its rows are from, and the list of runs at the end
of a machine's part says when they were, with which versions and by which command. `--check` writes nothing and fails where the committed text is
not what the results give.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pictures
from recorded import Result, Run, load, newest

ROOT = Path(__file__).resolve().parents[1]

PEERS = {
    "ours": "gdn", "chunked": "gdn (chunked)", "ours compiled": "gdn, compiled", "ours graph": "gdn, CUDA graph", "ours compiled graph": "gdn, compiled, CUDA graph",
    "portable": "portable (Triton)", "fla": "FLA", "fla padded": "FLA, padded", "fla generate": "FLA, generate", "flash_qla": "FlashQLA",
    "attention_gym": "attention-gym", "transformers": "transformers", "transformer": "Transformer++", "transformer compiled": "Transformer++, compiled", "ours blocks": "gdn, blocks compiled", "transformer blocks": "Transformer++, blocks compiled",
}  # fmt: skip
"""Implementations as they are called in tables, in their order."""
Lines = list[str]


def title(impl: str) -> str:
    return PEERS.get(impl, impl)


def in_order(impls: Iterable[str]) -> list[str]:
    """Known implementations in the order of `PEERS`, the others as they come."""
    return sorted(dict.fromkeys(impls), key=lambda impl: list(PEERS).index(impl) if impl in PEERS else len(PEERS))


def number(x: float | None) -> str:
    """Three significant digits, and none in vain: 0.0653, 1.94, 510, 64,300."""
    if x is None:
        return ""
    digits = 2 if x == 0 else max(0, 2 - _exponent(x))
    return f"{x:,.{digits}f}"


def _exponent(x: float) -> int:
    """Of the number as it is after rounding to three digits."""
    return int(f"{x:.2e}".partition("e")[2])


WORDS = ("", "model", "implementation", "peers ms")
"""Columns of text; the others are numbers."""


def cells(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> Lines:
    head = ["| " + " | ".join(columns) + " |", "|" + "|".join("---" if name in WORDS else "---:" for name in columns) + "|"]
    return [*head, *("| " + " | ".join(line) + " |" for line in lines)]


def by_size(name: str) -> tuple[list[int], str]:
    """Order of problems: by the numbers in their names."""
    return [int(digits) for digits in re.findall(r"\d+", name)], name


class Numbered:
    """Runs of a machine by number, in the order in which they are referred to."""

    def __init__(self) -> None:
        self.runs: list[Run] = []

    def __call__(self, results: Iterable[Result]) -> str:
        for result in results:
            if result.run not in self.runs:
                self.runs.append(result.run)
        return ", ".join(str(n) for n in sorted({self.runs.index(r.run) + 1 for r in results}))

    def listed(self) -> Lines:
        lines = []
        for i, run in enumerate(self.runs, 1):
            versions = ", ".join(f"{name} {version}" for name, version in run.versions) or "versions not recorded"
            command = f"`{run.command}`" if run.command else "command not recorded"
            note = f" ({run.note})" if run.note else ""
            lines.append(f"{i}. {run.date or 'date not recorded'}{note}: {command}; {versions}")
        return lines


def groups(results: Sequence[Result]) -> dict[tuple, dict[str, Result]]:
    """Implementations of each problem."""
    found: dict[tuple, dict[str, Result]] = {}
    for result in results:
        found.setdefault(result.problem, {})[result.impl] = result
    return found


def over(mine: Result | None, peer: Result | None) -> str:
    """A peer's time over ours in the same run, eager and under a graph; over our newest, with a star, where it was not in that run."""
    if mine is None or peer is None:
        return ""
    mine = next((r for r in peer.beside if r.impl == mine.impl), mine)
    ratios = [number(peer[name] / mine[name]) for name in ("eager_ms", "graph_ms") if peer.get(name) and mine.get(name)]
    star = "" if mine.run == peer.run else "\\*"
    return f"{' / '.join(ratios)}×{star}" if ratios else ""


def time_of(result: Result | None) -> str:
    """Eager time, and that under a graph where there is one."""
    if result is None:
        return ""
    if result.failed:
        return "failed"
    return " / ".join(number(result[name]) for name in ("eager_ms", "graph_ms") if name in result.values)


def peak(result: Result | None) -> str:
    """Peak memory of a call with its inputs."""
    if result is None or "peak_MiB" not in result.values:
        return ""
    return f"{result['peak_MiB'] + result.get('inputs_MiB', 0):,}"


def worst(result: Result | None) -> str:
    errors = {} if result is None else result.get("errors") or {}
    return f"{max(errors.values()):.1e}" if errors else ""


def dashed(errors: Iterable[str]) -> str:
    """Several in one cell, with a dash for each that was not measured, and one if none was."""
    found = list(errors)
    return " / ".join(error or "-" for error in found) if any(found) else "-"


def failures(results: Sequence[Result]) -> Lines:
    """Why, under a table with rows that failed."""
    found = [f"- {title(r.impl)}, {' '.join(str(p) for p in r.problem if p is not None)}: {r.failed}" for r in results if r.failed]
    return ["", "Failed:", "", *found] if found else []


RULE_TABLES = {
    "forward": "Gated delta rule, forward",
    "training": "Gated delta rule, forward and backward",
    "wide": "Gated delta rule with wide heads, forward and backward",
}


def rule(results: Sequence[Result], runs: Numbered) -> Lines:
    """Times and their ratios; memory and errors."""
    out: Lines = []
    for what, heading in RULE_TABLES.items():
        rows = [r for r in results if r.fact("what") == what]
        if not rows:
            continue
        by_problem = dict(sorted(((p[PROBLEM_ROW], found) for p, found in groups(rows).items()), key=lambda item: by_size(item[0])))
        impls = in_order(r.impl for r in rows)
        peers = [impl for impl in impls if impl != "ours"]
        times = [
            [name, *(time_of(f.get(i)) for i in impls), *(over(f.get("ours"), f.get(i)) for i in peers), runs(f.values())]
            for name, f in by_problem.items()
        ]
        rest = [
            [name, *(peak(f.get(i)) for i in impls), *(worst(f.get(i)) for i in impls)]
            for name, f in by_problem.items()
        ]  # fmt: skip
        out += [
            "", f"### {heading}", "",
            "Milliseconds, eager / CUDA graph, and their ratios. Rows are query/key heads / value heads, batch x length or lengths of packed documents; K = V = 128"
            " unless the row says otherwise.", "",
            *cells(["", *map(title, impls), *(f"{title(p)} / gdn" for p in peers), "run"], times), "",
            "Peak MiB with inputs and outputs, and the largest error of any output or gradient against float64, relative in norm:", "",
            *cells(["", *(f"{title(i)} MiB" for i in impls), *(f"{title(i)} error" for i in impls)], rest),
            *failures(rows),
        ]  # fmt: skip
    return out + hard(results, runs)


PROBLEM_ROW = 1
"""Where the name of the row stands in a problem of the rule."""


def hard(results: Sequence[Result], runs: Numbered) -> Lines:
    """Errors of each output and gradient on inputs that are hard, and on small problems."""
    rows = [r for r in results if r.fact("what") in ("errors", "check") and "errors" in r.values]
    if not rows:
        return []
    names = list(dict.fromkeys(name for r in rows for name in r["errors"]))
    lines = []
    for problem, found in groups(rows).items():
        what = " ".join(str(part) for part in problem[1:4] if part) + ("" if problem[4] is None else f" S={problem[4]}")
        lines += [
            [what, title(i), *(f"{found[i]['errors'][n]:.1e}" if n in found[i]["errors"] else "" for n in names), runs([found[i]])]
            for i in in_order(found)
        ]
    text = (
        "Relative in norm, against float64. layer: gates as the layer initialises them; doubled: beta near 2, correlated keys; still: no decay;"
        " strong: a log decay of about -3 a token."
    )
    return ["", "### Errors of the gated delta rule", "", text, "", *cells(["", "implementation", *names, "run"], lines)]


def layers(results: Sequence[Result], runs: Numbered) -> Lines:
    lines = []
    for problem, found in groups(results).items():
        mine, compiled, fla = (found.get(i) for i in ("ours", "ours compiled", "fla"))
        count = " / ".join(f"{r.get('parameters'):,}" for r in (mine, fla) if r and r.get("parameters"))
        ratios = [over(mine, fla), over(compiled, fla)]
        memory = " / ".join(peak(r) for r in (mine, compiled, fla) if r and peak(r))
        lines.append(
            [
                f"{problem[0]}, {problem[2]}, {problem[3]}",
                count,
                *map(time_of, (mine, compiled, fla)),
                *ratios,
                memory,
                dashed(worst(r) for r in (mine, compiled, fla) if r),
                runs(found.values()),
            ]
        )
    notes = dict.fromkeys(f"- {r.fact('mixer')}: {r['note']}" for r in results if r.get("note"))
    columns = ["", "parameters gdn / FLA", "gdn", "gdn, compiled", "FLA", "FLA / gdn", "FLA / compiled"]
    columns += [f"{what} gdn / compiled / FLA" for what in ("MiB", "error")] + ["run"]
    return [
        "", "### One layer, forward and backward", "",
        f"Milliseconds, eager (/ CUDA graph), at a width of {', '.join(sorted({str(r.fact('width')) for r in results}))}. The error is the largest of the"
        " output, the gradient of the input and that of any parameter, relative in norm, against float64 with the same weights; a dash where none was measured.", "",
        *cells(columns, lines), *(["", *notes] if notes else []), *failures(results),
    ]  # fmt: skip


def training(results: Sequence[Result], runs: Numbered) -> Lines:
    lines = []
    for problem, found in groups(results).items():
        for impl in in_order(found):
            r = found[impl]
            size = f"{problem[0]} {problem[1]}"
            if r.failed:
                lines.append([size, title(impl), "", "failed", *[""] * 6, runs([r])])
                continue
            share = [f"{r[name]:.1%}" if name in r.values else "" for name in ("mfu", "mfu_6n")]
            step = " / ".join(number(r[name]) for name in ("step_ms", "graph_ms") if name in r.values)
            figures = [number(r["tokens_per_s"]), step, *share, number(r.get("peak_GiB")), number(r["first_s"])]
            errors = r.get("errors") or {}
            error = dashed(f"{errors[name]:.1e}" if name in errors else "" for name in ("loss", "gradients"))
            lines.append([size, title(impl), f"{r['parameters'] / 1e9:.3f}", *figures, error, runs([r])])
    columns = ["", "model", "parameters, 10⁹", "tokens/s", "ms a step", "utilisation", "6 N", "peak GiB", "first step, s"]
    columns += ["error of loss / gradients", "run"]
    return [
        "", "### Training a language model", "",
        "Forward, loss, backward and AdamW, bfloat16; milliseconds eager (/ as one CUDA graph). Utilisation is the share of the data sheet's dense bfloat16 rate that the model's own operations"
        " make; 6 N counts 6 operations a parameter and token instead. Errors are relative (of all gradients together, in norm), against float64 with the"
        " same weights, drawn alike for all models; a dash where none was measured.", "",
        *cells(columns, lines), *failures(results),
    ]  # fmt: skip


def decoding(results: Sequence[Result], runs: Numbered) -> Lines:
    lines = []
    for problem, found in groups(results).items():
        for impl in in_order(found):
            r = found[impl]
            figures = (
                ["failed", *[""] * 4]
                if r.failed
                else [number(r.get(n)) for n in ("tokens_per_s", "ms_per_token", "GB_s", "state_MiB", "peak_GiB")]
            )
            error = f"{r['errors']['logits']:.1e}" if r.get("errors") else "-"
            lines.append([f"{problem[0]} B={problem[1]}", title(impl), *figures, error, runs([r])])
    columns = ["", "model", "tokens/s", "ms a step", "GB/s", "state MiB", "peak GiB", "error of logits", "run"]
    return ["", "### Decoding with a language model", "", *cells(columns, lines), *failures(results)]


def small(results: Sequence[Result], runs: Numbered) -> Lines:
    lines = []
    for problem, found in groups(results).items():
        for impl, r in found.items():
            speed = f"{r['of_copy']:.0%}" if "of_copy" in r.values else f"{number(r['TFLOP_s'])} TFLOP/s" if "TFLOP_s" in r.values else ""
            times = [number(1e3 * r[n]) if n in r.values else "" for n in ("eager_ms", "graph_ms")] if not r.failed else ["failed", ""]
            errors = [f"{r[n]:.1e}" if n in r.values else "" for n in ("error", "plain_error")]
            forward = f" (forward {number(r['host_forward_us'])})" if "host_forward_us" in r.values else ""
            host = [
                number(r.get("host_us")) + forward,
                str(r.get("launches", "")),
                number(r.get("bare_us")),
                number(r.get("host_first_us")),
            ]
            lines.append([problem[0], title(impl), *times, *host, speed, *errors, runs([r])])
    of_host = ["host µs", "launches", "host µs of these by Triton", "host µs after a wait"]
    measured = ["eager µs", "graph µs", *of_host, "of copy bandwidth", "error", "plain torch's error"]
    columns = ["", "implementation", *measured, "run"]
    said = (
        "Errors are of small problems of the same kind (in the script), the largest of any output or gradient, relative in norm; "
        "where FLA has the operator too, of the first output and its gradients."
    )
    return ["", "### Operators around it", "", said, "", *cells(columns, lines), *failures(results)]


def first_results(results: Sequence[Result], runs: Numbered) -> Lines:
    lines = [[r.fact("work"), title(r.impl), number(r["first_s"]), runs([r])] for r in results]
    note = "From the call to the result, on a machine where nothing had been compiled before: caches of kernels and graphs were empty."
    return ["", "### First results", "", note, "", *cells(["", "implementation", "seconds", "run"], lines)]


def processor_ops(results: Sequence[Result], runs: Numbered) -> Lines:
    lines = []
    for problem, found in groups(results).items():
        peers = [i for i in found if i != "chunked"]
        mine = found.get("chunked")
        times = "; ".join(f"{title(i)} {time_of(found[i])}" for i in peers)
        ratio = "; ".join(over(mine, found[i]) for i in peers)
        error = "; ".join(f"{r['error']:.1e}" for r in found.values())
        lines.append([f"{problem[0]}, {problem[1]}, {problem[2]}", time_of(mine), times, ratio, error, runs(found.values())])
    columns = ["", "gdn (chunked) ms", "peers ms", "peers / gdn", "errors, gdn first", "run"]
    return ["", "### Operators", "", *cells(columns, lines)]


def accelerated(results: Sequence[Result], runs: Numbered) -> Lines:
    lines = []
    for problem, found in groups(results).items():
        mine, stock = found.get("ours"), found.get("transformers")
        what = f"{problem[0]}, {problem[1]} tokens, {problem[3]} layers, vocabulary {problem[2]:,}"
        limit = f"{mine['limit']:.2f}×" if mine and mine.get("limit") else ""
        lines.append([what, time_of(mine), time_of(stock), over(mine, stock), limit, runs(found.values())])
    columns = ["", "with gdn.accelerate, ms", "as it comes, ms", "ratio", "limit", "run"]
    note = "The limit is the ratio if nothing but the matrix products of the weights took time, and these ran at the cores' greatest rate."
    return ["", "### transformers' Qwen3.5, as it comes and with gdn.accelerate", "", note, "", *cells(columns, lines)]


def accelerated_on_a_gpu(results: Sequence[Result], runs: Numbered) -> Lines:
    lines = []
    for problem, found in groups(results).items():
        stock = found.get("stock")
        for impl, r in found.items():
            ratio, star = "", "" if stock is None or stock.run == r.run else "\\*"
            if stock is not None and not stock.failed and not r.failed:
                ratio = f"{number(stock['ms'] / r['ms'])}×{star}"
            figures = (
                ["failed", *[""] * 3] if r.failed else [r["rule"], number(r["ms"]), number(r["tokens_per_s"]), number(r.get("peak_GiB"))]
            )
            lines.append([f"{problem[0]}, {problem[2]}", impl, *figures, ratio, runs([r])])
    columns = ["", "model", "rule on", "ms a step", "tokens/s", "peak GiB", "stock / this", "run"]
    return [
        "", "### transformers' Qwen3.5, as it comes and with gdn.accelerate", "",
        "A random model of the 0.8B one's shape, bfloat16. A training step is forward, loss, backward and AdamW.", "",
        *cells(columns, lines), *failures(results),
    ]  # fmt: skip


SECTIONS: dict[str, Callable[[Sequence[Result], Numbered], Lines]] = {
    "delta_rule": rule, "layer": layers, "train": training, "decode": decoding, "small_ops": small, "first": first_results, "ops": processor_ops,
    "accelerate": accelerated, "accelerate_gpu": accelerated_on_a_gpu,
}  # fmt: skip
"""The part of each benchmark, in order."""

HEAD = """# Benchmarks

`python benchmarks/report.py` makes this page and its plots from the rows in `benchmarks/results/`; change those, not this. A figure is the
newest of its machine, problem and implementation, a median of single calls. "FLA / gdn" is FLA's time over ours in the same run: above 1 we
are faster. A star marks a ratio of two runs. The last column counts into the list of runs under the tables."""


def text(results: Sequence[Result]) -> str:
    """The page."""
    results = newest(results)
    lines = [HEAD]
    for device in devices(results):
        here, runs = [r for r in results if r.run.device == device], Numbered()
        lines += ["", f"## {device}"]
        for picture in pictures.drawable(here):
            lines += ["", f"![{picture.caption}]({picture.path(device)})"]
        for bench, section in SECTIONS.items():
            rows = [r for r in here if r.bench == bench]
            if rows:
                lines += section(rows, runs)
        lines += ["", "### Runs", "", *runs.listed()]
    return "\n".join(lines) + "\n"


def devices(results: Iterable[Result]) -> list[str]:
    """GPUs first."""
    return sorted({r.run.device for r in results}, key=lambda name: ("NVIDIA" not in name, name))


def draw(results: Sequence[Result], root: Path) -> list[Path]:
    """The plots that the page shows, in place of all older ones."""
    results, paths = newest(results), []
    for device in devices(results):
        here = [r for r in results if r.run.device == device]
        for picture in pictures.drawable(here):
            path = root / picture.path(device)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.draw(here, title).savefig(path, dpi=110, metadata={"Software": None})
            paths.append(path)
    for old in set((root / pictures.FOLDER).glob("*.png")) - set(paths):
        old.unlink()
    return paths


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare the committed text and write nothing")
    args = parser.parse_args(argv)
    page, results = ROOT / "BENCHMARKS.md", load()
    if args.check:
        current = page.exists() and page.read_text() == text(results)
        print(
            "BENCHMARKS.md is what the results give" if current else "BENCHMARKS.md is not what the results give: run benchmarks/report.py"
        )
        return 0 if current else 1
    page.write_text(text(results))
    for path in (page, *draw(results, ROOT)):
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
