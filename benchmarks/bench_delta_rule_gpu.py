"""The gated delta rule on a GPU: right against float64, then timed, beside its peers. `python benchmarks/bench_delta_rule_gpu.py --help`

Tables: `forward`, `training` (forward and backward) and `wide` (training with wide heads) time a call, in eager mode and as a CUDA graph, with
the L2 cache flushed before each, and give its peak memory and its errors; `errors` gives errors on inputs that are hard. Gates are drawn as
the layer initialises them (A uniform in 0..16, dt log-uniform in 1e-3..1e-1) unless the row says otherwise. An error is relative in norm,
against the chunked row in float64, which `--check` compares with the recurrence itself.

Peers that can be imported: fla (flash-linear-attention, its own Triton kernels), flash_qla, attention_gym, and transformers (its rule of
Qwen3-Next in plain torch, what its models run where no peer of these is installed; not for packed rows). FLA tunes each number of heads
anew, and packed rows once more, but not each length: 25 to 45 s forward and about as much backward; FlashQLA compiles for a minute for each
number of heads. Both keep the results on disk, so a second run on the same machine takes seconds. Cold, `--tables forward,training --peers fla`
takes about 6 minutes, with flash_qla 6 more; warm, 2. Rows of the same heads stand together, the most telling first.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clock
import rows
import torch
import torch.nn.functional as F
import tuning
from torch import Tensor

from gdn.core.dispatch import use
from gdn.core.packing import Packing
from gdn.ops import gated_delta_rule
from gdn.ops.delta_rule import portable
from gdn.ops.delta_rule.reference import gated_delta_rule as reference
from gdn.testing import bench

Problem = tuple[int, int, int, int, int, int, tuple[int, ...] | None]
"""H, HV, K, V, batch, length, lengths of packed documents."""

FORWARD: list[Problem] = [
    (16, 32, 128, 128, 8, 4096, None),
    (16, 32, 128, 128, 1, 32768, None),
    (16, 32, 128, 128, 1, 8192, None),
    (16, 32, 128, 128, 8, 1024, None),
    (16, 16, 128, 128, 8, 4096, None),
    (16, 16, 128, 128, 1, 8192, None),
    (2, 8, 128, 128, 1, 32768, None),
    (2, 8, 128, 128, 1, 8192, None),
    (2, 8, 128, 128, 1, 2048, None),
    (16, 64, 128, 128, 8, 4096, None),
    (16, 64, 128, 128, 1, 32768, None),
    (16, 32, 128, 128, 1, 8192, (6144, 2048)),
]
TRAINING: list[Problem] = [
    (16, 16, 128, 128, 8, 4096, None),
    (16, 32, 128, 128, 1, 32768, None),
    (16, 32, 128, 128, 1, 8192, None),
    (2, 8, 128, 128, 1, 32768, None),
]
WIDE: list[Problem] = [(6, 6, 256, 512, 8, 4096, None), (9, 9, 200, 400, 8, 4096, None)]
HARD: Problem = (16, 32, 128, 128, 1, 2048, None)
KINDS = ("layer", "doubled", "still", "strong")
TABLES = ("forward", "training", "wide", "errors")


def name(problem: Problem) -> str:
    H, HV, K, V, B, T, lengths = problem
    size = "+".join(map(str, lengths)) if lengths else f"{B}x{T}"
    return f"{H}/{HV} {size}" + ("" if K == V == 128 else f" K{K} V{V}")


def inputs(problem: Problem, dtype: torch.dtype = torch.bfloat16, seed: int = 0, kind: str = "layer", device: str = "cuda") -> list[Tensor]:
    """q, k (unit length), v, g, beta. Kinds: layer, still (g = 0), strong (g about -3), doubled (beta near 2, correlated keys, mild decay)."""
    H, HV, K, V, B, T, _ = problem
    r = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r, device=device)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=r, device=device)

    q, k = randn(B, T, H, K), randn(B, T, H, K)
    if kind == "doubled":
        k = 0.1**0.5 * k + 0.9**0.5 * randn(1, 1, H, K)
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta = randn(B, T, HV).sigmoid()
    dt = torch.exp(rand(HV) * 4.605 - 6.908)
    g = -16 * rand(HV) * F.softplus(randn(B, T, HV) + dt + torch.log(-torch.expm1(-dt)))
    if kind == "still":
        g = torch.zeros_like(g)
    elif kind == "strong":
        g = -3 - rand(B, T, HV)
    elif kind == "doubled":
        g, beta = -0.01 * rand(B, T, HV), 1.9 + 0.1 * rand(B, T, HV)
    return [x.to(dtype) for x in (q, k, randn(B, T, HV, V))] + [g, beta]


Rule = Callable[..., tuple[Tensor, Tensor]]
"""q, k, v, g, beta and perhaps an initial state [N, HV, K, V] -> o, final state [N, HV, K, V]."""


def starts(problem: Problem, device: str, dtype: torch.dtype) -> Tensor | None:
    """Where packed documents begin, and the end."""
    lengths = problem[6]
    return torch.tensor([0, *itertools.accumulate(lengths)], device=device, dtype=dtype) if lengths else None


def ours(problem: Problem, device: str = "cuda") -> Rule:
    packing = Packing.from_lengths(problem[6], device=device) if problem[6] else None
    return lambda q, k, v, g, beta, state=None: gated_delta_rule(q, k, v, g, beta, initial_state=state, packing=packing)


def fla(problem: Problem, device: str = "cuda") -> Rule:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule as rule

    cu = starts(problem, device, torch.int64)
    return lambda *x: rule(*x[:5], scale=problem[2] ** -0.5, initial_state=x[5] if x[5:] else None, output_final_state=True, cu_seqlens=cu)


def fla_padded(problem: Problem, device: str = "cuda") -> Rule:
    """FLA on keys and values filled up with zeros to widths that are powers of two."""
    K, V = problem[2:4]
    more = [(1 << (size - 1).bit_length()) - size for size in (K, V)]
    rule = fla(problem, device)

    def run(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
        o, state = rule(F.pad(q, (0, more[0])), F.pad(k, (0, more[0])), F.pad(v, (0, more[1])), g, beta)
        return o[..., :V], state[..., :K, :V]

    return run


def flash_qla(problem: Problem, device: str = "cuda") -> Rule:
    from flash_qla import chunk_gated_delta_rule as rule

    cu = starts(problem, device, torch.int64)
    return lambda *x: rule(*x[:5], scale=problem[2] ** -0.5, initial_state=x[5] if x[5:] else None, output_final_state=True, cu_seqlens=cu)


def attention_gym(problem: Problem, device: str = "cuda") -> Rule:
    from attn_gym.linear.gdn import chunk_gdn

    cu = starts(problem, device, torch.int32)

    def run(*x: Tensor) -> tuple[Tensor, Tensor]:
        state = x[5].mT.contiguous() if x[5:] else None
        o, state = chunk_gdn(*x[:5], state, scale=problem[2] ** -0.5, cu_seqlens=cu, output_final_state=True)
        return o, state.mT

    return run


def transformers(problem: Problem, device: str = "cuda") -> Rule:
    rule = bench.peer()
    if rule is None:
        raise ImportError("transformers is not installed")
    names = ("q", "k", "v", "g", "beta", "initial_state")
    return lambda *x: rule(dict(zip(names, x)))


RULES: dict[str, Callable[..., Rule]] = {
    "ours": ours, "fla": fla, "fla padded": fla_padded, "flash_qla": flash_qla, "attention_gym": attention_gym,
    "transformers": transformers,
}  # fmt: skip
PEERS = ("fla", "flash_qla", "attention_gym", "transformers")


def serves(impl: str, problem: Problem) -> bool:
    """Whether a peer takes the widths and packed rows; FLA runs widths between powers of two as they are and padded."""
    K, V = problem[2:4]
    if impl == "transformers":
        return problem[6] is None
    if impl == "fla padded":
        return bool(K & (K - 1) or V & (V - 1))
    return K == V == 128 or impl in ("ours", "fla")


NAMES = ("o", "S", "dq", "dk", "dv", "dg", "dbeta", "dS0")


def error(x: Tensor, truth: Tensor) -> float:
    return float(f"{(x.double() - truth).norm() / (truth.norm() + 1e-30):.3g}")


def results_of(rule: Rule, x: Sequence[Tensor], do: Tensor | None) -> list[Tensor]:
    """o and the final state, and with the gradient of o those of q, k, v, g and beta."""
    if do is None:
        with torch.no_grad():
            return list(rule(*x))
    leaves = [t.detach().requires_grad_() for t in x]
    o, state = rule(*leaves)
    return [o.detach(), state.detach(), *torch.autograd.grad(o, leaves, do)]


@functools.lru_cache(maxsize=1)
def truth(problem: Problem, kind: str, training: bool, device: str, dtype: torch.dtype) -> list[Tensor]:
    """What the rule is in float64 on these inputs; kept while the implementations of a problem are measured."""
    x = [t.double() for t in inputs(problem, dtype, kind=kind, device=device)]
    with use(gated_delta_rule="chunked"):
        return results_of(ours(problem, device), x, output_gradient(problem, device, dtype).double() if training else None)


def output_gradient(problem: Problem, device: str, dtype: torch.dtype) -> Tensor:
    _, HV, _, V, B, T, _ = problem
    return torch.randn(B, T, HV, V, generator=torch.Generator(device).manual_seed(1), device=device).to(dtype)


def measure(problem: Problem, table: str, kind: str, impl: str, args: argparse.Namespace) -> dict[str, Any]:
    """Time, memory and errors of one implementation; only errors in the table of that name."""
    training, device = table != "forward", args.device
    x = inputs(problem, kind=kind, device=device)
    do = output_gradient(problem, device, x[0].dtype) if training else None
    rule = RULES[impl](problem, device)
    found: dict[str, Any] = {}
    if table != "errors":
        call = timed_call(rule, x, do)
        found = clock.measure(call, device, repeats=args.repeats)
        found["inputs_MiB"] = sum(t.nbytes for t in (*x, *([do] if training else []))) >> 20
        if impl == "ours" and args.kernels:
            found["kernels_us"] = {k: round(v, 1) for k, v in kernels(call).items()}
    if not args.no_errors:
        found |= rows.compared(lambda: errors(rule, x, do, (problem, kind, training, device, x[0].dtype)))
    return found


def measured(problem: Problem, table: str, kind: str, impl: str, args: argparse.Namespace) -> dict[str, Any]:
    return tuning.ahead(functools.partial(measure, problem, table, kind, impl, args), args, tunes=impl in ("fla", "fla padded"))


def errors(rule: Rule, x: list[Tensor], do: Tensor | None, of: tuple[Any, ...]) -> dict[str, float]:
    return {n: error(a, b) for n, a, b in zip(NAMES, results_of(rule, x, do), truth(*of))}


def timed_call(rule: Rule, x: list[Tensor], do: Tensor | None) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_(do is not None) for t in x]

    def forward() -> Any:
        with torch.no_grad():
            return rule(*x)

    def training() -> Any:
        return torch.autograd.grad(rule(*leaves)[0], leaves, do)

    return forward if do is None else training


def kernels(call: Callable[[], Any], repeats: int = 5) -> dict[str, float]:
    """Device microseconds of each kernel of a call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    total: dict[str, float] = collections.defaultdict(float)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            total[event.name.split("(")[0][:40]] += event.device_time / repeats
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def problems(table: str) -> list[tuple[Problem, str]]:
    """The problems of a table and the kind of their inputs."""
    if table == "errors":
        return [(HARD, kind) for kind in KINDS]
    return [(problem, "layer") for problem in {"forward": FORWARD, "training": TRAINING, "wide": WIDE}[table]]


def shrunk(problem: Problem) -> Problem:
    """The same problem small enough for a processor."""
    H, HV, K, V, B, T, lengths = problem
    return (1, HV // H, K, V, B, T // 64, tuple(n // 64 for n in lengths) if lengths else None)


def plan(args: argparse.Namespace) -> list[rows.Row]:
    found = []
    impls = ["ours", *(impl for peer in args.peers for impl in ((peer, "fla padded") if peer == "fla" else (peer,)))]
    for table in args.tables:
        for problem, kind in problems(table):
            size = problem if args.device == "cuda" else shrunk(problem)
            if args.match not in f"{name(problem)} {kind}":
                continue
            facts = {"what": table, "row": name(size), "kind": kind}
            for impl in impls:
                if serves(impl, problem):
                    found.append(rows.Row(facts, impl, functools.partial(measured, size, table, kind, impl, args)))
    return found


def summary(results: list[dict[str, Any]]) -> str:
    """Peers' times over ours, eager and as a graph, and the largest error of each."""
    lines = []
    by_row = itertools.groupby(results, key=lambda r: (r["what"], r["row"], r["kind"]))
    for (table, row, kind), group in by_row:
        found = {r["impl"]: r for r in group}
        mine = found.get("ours", {})
        cells = []
        for impl, r in found.items():
            ratios = [f"{r[t] / mine[t]:.2f}" for t in ("eager_ms", "graph_ms") if impl != "ours" and r.get(t) and mine.get(t)]
            times = "/".join(f"{r[t]:.3f}" for t in ("eager_ms", "graph_ms") if t in r)
            worst = f" err {max(r['errors'].values()):.1e}" if r.get("errors") else ""
            peak = f" {r['peak_MiB']} MiB" if "peak_MiB" in r else ""
            cells.append(f"{impl} {times or r.get('failed', '')[:60]}{' x' + '/'.join(ratios) if ratios else ''}{worst}{peak}")
        lines.append(f"{table:9s} {row:24s} {kind:8s} " + " | ".join(cells))
    return "\n".join(lines)


def check(problem: Problem, dtype: torch.dtype, kind: str, segment: int | None, impls: Sequence[str], device: str) -> list[dict[str, Any]]:
    """Errors of forward and gradients, initial and final states included, against the recurrence in float64; also of the chunked row in
    float64, which is the truth of the timed tables."""
    HV, K, V, B, T, lengths = problem[1:]
    x = inputs(problem, dtype, kind=kind, device=device)
    r = torch.Generator(device).manual_seed(1)
    x.append(torch.randn(len(lengths) if lengths else B, HV, K, V, generator=r, device=device))
    d_final, do = torch.randn(x[5].shape, generator=r, device=device), torch.randn(B, T, HV, V, generator=r, device=device).to(dtype)
    packing = Packing.from_lengths(lengths, device=device) if lengths else None
    wide = [t.double() for t in x]
    true = gradients(lambda *y: reference(*y[:5], K**-0.5, y[5], packing), wide, do.double(), d_final.double())
    found = []
    for impl in ("chunked in float64", *impls):
        facts = {"what": "check", "row": name(problem), "dtype": str(dtype)[6:], "kind": kind, "segment": segment, "impl": impl}
        if impl in RULES:
            with segments(segment), use(gated_delta_rule="portable"):
                run = functools.partial(gradients, RULES[impl](problem, device), x, do, d_final)
                got = run()
                facts["same_bits"] = all(torch.equal(a, b) for a, b in zip(got, run()))
        else:
            with use(gated_delta_rule="chunked"):
                got = gradients(ours(problem, device), wide, do.double(), d_final.double())
        found.append({**facts, "errors": {n: error(a, b) for n, a, b in zip(NAMES, got, true)}})
        errors = " ".join(f"{n} {e:.1e}" for n, e in found[-1]["errors"].items())
        print(f"{name(problem):26s} {facts['dtype']:9s} {kind:8s} S={segment} {impl:18s} {errors} {facts.get('same_bits', '')}", flush=True)
    return found


def gradients(rule: Rule, x: list[Tensor], do: Tensor, d_final: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in x]
    o, state = rule(*leaves)
    return [o.detach(), state.detach(), *torch.autograd.grad((o, state), leaves, (do, d_final.to(state.dtype)))]


@contextlib.contextmanager
def segments(chunks: int | None) -> Iterator[None]:
    """Split sequences into segments of so many chunks, where a number is given."""
    rule = portable.segment_chunks
    if chunks is not None:
        portable.segment_chunks = lambda *a: chunks  # type: ignore[assignment]
    portable.plan.cache_clear()
    try:
        yield
    finally:
        portable.segment_chunks = rule
        portable.plan.cache_clear()


bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
CHECKS: list[tuple[Problem, torch.dtype, str, int | None]] = [
    ((2, 4, 128, 128, 1, 700, None), bf16, "layer", 0),
    ((2, 4, 128, 128, 1, 700, None), bf16, "layer", 4),
    ((2, 4, 128, 128, 1, 700, None), bf16, "still", 4),
    ((2, 2, 128, 128, 2, 300, None), bf16, "strong", 0),
    ((2, 2, 128, 128, 1, 300, None), bf16, "doubled", 0),
    ((2, 4, 128, 128, 1, 700, (300, 0, 1, 399)), bf16, "layer", 0),
    ((2, 4, 128, 128, 1, 700, (300, 0, 1, 399)), bf16, "still", 2),
    ((1, 2, 128, 128, 1, 300, None), f16, "layer", 0),
    ((1, 2, 128, 128, 1, 300, None), f32, "layer", 2),
    ((1, 2, 64, 64, 1, 200, None), bf16, "layer", 0),
    ((1, 1, 16, 16, 2, 100, None), bf16, "layer", 0),
    ((1, 1, 96, 192, 1, 200, None), bf16, "layer", 0),
    ((1, 1, 192, 384, 1, 200, None), bf16, "layer", 0),
    ((1, 2, 200, 400, 1, 200, None), bf16, "layer", 2),
    ((1, 1, 256, 512, 1, 200, None), bf16, "layer", 0),
    ((1, 1, 64, 64, 1, 200, None), f32, "layer", 0),
]
"""Problem, dtype, kind and, of portable kernels, chunks of a segment (0: the sequence is not split)."""
QUICK = (1, 6, 8, 13)
"""The rows of CHECKS for a first look."""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tables",
        type=rows.chosen(TABLES),
        default=list(TABLES),
        help=f"comma list of {', '.join(TABLES)}, measured in the order named (default: all)",
    )
    parser.add_argument("--peers", type=rows.chosen(PEERS), default=[], help=f"comma list of {', '.join(PEERS)}")
    parser.add_argument("--match", default="", help='only rows with this in their name or kind, as "16/32 1x"')
    parser.add_argument("--repeats", type=int, default=20, help="calls that a median is of (default %(default)s)")
    parser.add_argument("--kernels", action="store_true", help="time each kernel of ours as well")
    parser.add_argument("--no-errors", action="store_true", help="leave out the comparison with float64")
    parser.add_argument("--check", choices=("quick", "all"), help="first compare with the recurrence over the list of small problems")
    parser.add_argument(
        "--device", default="cuda", choices=("cuda", "cpu"), help="cpu runs every problem 64 times shorter, to try the script out"
    )
    tuning.add_arguments(parser)
    rows.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use; --device cpu runs tiny shapes to try the script out")
    return args


def main() -> None:
    args = parse()
    if args.check:
        for index in range(len(CHECKS)) if args.check == "all" else QUICK:
            problem, dtype, kind, segment = CHECKS[index]
            peers = [p for p in args.peers if dtype == torch.bfloat16 and serves(p, problem)]
            for result in check(problem, dtype, kind, segment, ["ours", *peers], args.device):
                if args.out:
                    rows.append(Path(args.out), {"bench": "delta_rule", **result, **rows.machine(torch.device(args.device))})
    print(summary(rows.run("delta_rule", plan(args), args, args.device)))


if __name__ == "__main__":
    main()
