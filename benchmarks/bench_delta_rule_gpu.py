"""The gated delta rule on a GPU: right against fp64, then timed beside its peers. `python benchmarks/bench_delta_rule_gpu.py --help`

Every figure is a median of eager calls timed with device events, the L2 cache flushed before each, and of replays of a CUDA graph of the
same call. Gates are drawn as the layer initialises them (A uniform in 0..16, dt log-uniform in 1e-3..1e-1) unless the row says otherwise.
Peers run when they can be imported: FLA (flash-linear-attention), its own Triton kernels, and FlashQLA.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from gdn.core.packing import Packing
from gdn.ops import gated_delta_rule
from gdn.ops.delta_rule import portable
from gdn.ops.delta_rule.reference import gated_delta_rule as reference

FORWARD = [
    # H, HV, K, V, batch, length, lengths of packed documents
    (2, 8, 128, 128, 1, 32768, None),
    (2, 8, 128, 128, 1, 8192, None),
    (2, 8, 128, 128, 1, 2048, None),
    (16, 32, 128, 128, 1, 32768, None),
    (16, 32, 128, 128, 1, 8192, None),
    (16, 32, 128, 128, 8, 4096, None),
    (16, 32, 128, 128, 8, 1024, None),
    (16, 32, 128, 128, 1, 8192, (6144, 2048)),
    (16, 64, 128, 128, 1, 32768, None),
    (16, 64, 128, 128, 8, 4096, None),
    (16, 16, 128, 128, 1, 8192, None),
    (16, 16, 128, 128, 8, 4096, None),
]
BACKWARD = [
    (16, 16, 128, 128, 8, 4096, None),
    (16, 32, 128, 128, 1, 8192, None),
    (16, 32, 128, 128, 1, 32768, None),
    (2, 8, 128, 128, 1, 32768, None),
    (6, 6, 256, 512, 8, 4096, None),
    (9, 9, 200, 400, 8, 4096, None),
]


def name(row: tuple[Any, ...]) -> str:
    H, HV, K, V, B, T, lengths = row
    size = "+".join(map(str, lengths)) if lengths else f"{B}x{T}"
    return f"{H}/{HV} {size}" + ("" if K == V == 128 else f" K{K} V{V}")


def inputs(row: tuple[Any, ...], dtype: torch.dtype = torch.bfloat16, seed: int = 0, kind: str = "layer") -> list[Tensor]:
    """q, k (unit length), v, g, beta. Kinds: layer, still (g = 0), strong (g about -3), doubled (beta near 2, correlated keys, mild decay)."""
    H, HV, K, V, B, T, _ = row
    r = torch.Generator("cuda").manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=r, device="cuda")

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=r, device="cuda")

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


def ours(row: tuple[Any, ...]) -> Rule:
    packing = Packing.from_lengths(row[6], device="cuda") if row[6] else None
    return lambda *x: gated_delta_rule(*x, packing=packing)


def fla(row: tuple[Any, ...]) -> Rule:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    cu = torch.tensor([0, *torch.tensor(row[6]).cumsum(0).tolist()], device="cuda") if row[6] else None
    return lambda *x: chunk_gated_delta_rule(*x, scale=row[2] ** -0.5, output_final_state=True, cu_seqlens=cu)


def flash_qla(row: tuple[Any, ...]) -> Rule:
    from flash_qla import chunk_gated_delta_rule

    cu = torch.tensor([0, *torch.tensor(row[6]).cumsum(0).tolist()], device="cuda") if row[6] else None
    return lambda *x: chunk_gated_delta_rule(*x, scale=row[2] ** -0.5, output_final_state=True, cu_seqlens=cu)


RULES = {"ours": ours, "fla": fla, "flash_qla": flash_qla}


def time_call(call: Callable[[], Any], repeats: int = 20, graph: bool = False) -> float:
    """Median milliseconds."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    for _ in range(3):
        call()
    if graph:
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        run: Callable[[], Any] = captured.replay
    else:
        run = call
    times = []
    for _ in range(repeats):
        flush.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        times.append((a, b))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times)


def forward_call(rule: Rule, x: list[Tensor]) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return rule(*x)

    return call


def training_call(rule: Rule, x: list[Tensor], do: Tensor) -> Callable[[], Any]:
    leaves = [t.detach().requires_grad_() for t in x]

    def call() -> Any:
        return torch.autograd.grad(rule(*leaves)[0], leaves, do)

    return call


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


def error(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth).norm() / (truth.norm() + 1e-30))


def gradients(rule: Callable[..., Any], x: list[Tensor], do: Tensor, d_final: Tensor) -> list[Tensor]:
    leaves = [t.detach().requires_grad_() for t in x]
    o, state = rule(*leaves)
    return [
        o.detach(),
        state.detach(),
        *torch.autograd.grad((o.float() * do.float()).sum() + (state * d_final.to(state.dtype)).sum(), leaves),
    ]


NAMES = ("o", "S", "dq", "dk", "dv", "dg", "dbeta", "dS0")


def check(row: tuple[Any, ...], dtype: torch.dtype, kind: str, S: int | None = None, peers: tuple[str, ...] = ()) -> dict[str, Any]:
    """Errors of forward and gradients against the fp64 recurrence, relative in norm."""
    H, HV, K, V, B, T, lengths = row
    x = inputs(row, dtype, kind=kind)
    packing = Packing.from_lengths(lengths, device="cuda") if lengths else None
    N = len(lengths) if lengths else B
    r = torch.Generator("cuda").manual_seed(1)
    s0, d_final = (torch.randn(N, HV, K, V, generator=r, device="cuda") for _ in range(2))
    do = torch.randn(B, T, HV, V, generator=r, device="cuda").to(dtype)
    scale = K**-0.5
    truth = gradients(lambda *y: reference(*y[:5], scale, y[5], packing), [t.double() for t in (*x, s0)], do.double(), d_final.double())
    out: dict[str, Any] = {"row": name(row), "dtype": str(dtype)[6:], "kind": kind, "S": S}
    rules: dict[str, Callable[..., Any]] = {"ours": lambda *y: portable.gated_delta_rule(*y[:5], scale, y[5], packing)}
    if "fla" in peers:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule as f

        cu = packing.cu_seqlens.long() if packing else None
        rules["fla"] = lambda *y: f(*y[:5], scale=scale, initial_state=y[5], output_final_state=True, cu_seqlens=cu)
    if "flash_qla" in peers:
        from flash_qla import chunk_gated_delta_rule as h

        cu = packing.cu_seqlens.long() if packing else None
        rules["flash_qla"] = lambda *y: h(*y[:5], scale=scale, initial_state=y[5], output_final_state=True, cu_seqlens=cu)
    rule = portable.segment_chunks
    if S is not None:
        portable.segment_chunks = lambda *a: S  # type: ignore[assignment]
    portable.plan.cache_clear()
    try:
        for who, run in rules.items():
            got = gradients(run, [*x, s0], do, d_final)
            out[who] = {n: error(a, b) for n, a, b in zip(NAMES, got, truth)}
            if who == "ours":
                again = gradients(run, [*x, s0], do, d_final)
                out["same bits"] = all(torch.equal(a, b) for a, b in zip(got, again))
    finally:
        portable.segment_chunks = rule
        portable.plan.cache_clear()
    return out


def show(result: dict[str, Any]) -> None:
    for who in ("ours", "fla", "flash_qla"):
        if who in result:
            errors = " ".join(f"{n} {e:.1e}" for n, e in result[who].items())
            same = f"same bits {result['same bits']}" if who == "ours" else ""
            print(f"{result['row']:26s} {result['dtype']:9s} {result['kind']:8s} S={result['S']} {who:9s} {errors} {same}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", choices=("quick", "all"), help="errors against fp64 over the problem list")
    parser.add_argument("--peers", default="", help="comma list of fla, flash_qla")
    parser.add_argument("--forward", default="", help="rows of the forward list, as 0,3,5 or all")
    parser.add_argument("--backward", default="", help="rows of the forward+backward list")
    parser.add_argument("--kernels", action="store_true", help="time each kernel of ours as well")
    parser.add_argument("--out", default="", help="jsonl file for results")
    args = parser.parse_args()
    peers = tuple(p for p in args.peers.split(",") if p)
    results: list[dict[str, Any]] = []
    if args.check:
        for row, dtype, kind, S in CHECKS if args.check == "all" else [CHECKS[i] for i in QUICK]:
            results.append(check(row, dtype, kind, S, peers if dtype == torch.bfloat16 and row[2] == 128 else ()))
            show(results[-1])
    for what, rows, chosen in (("forward", FORWARD, args.forward), ("training", BACKWARD, args.backward)):
        for index in range(len(rows)) if chosen == "all" else [int(i) for i in chosen.split(",") if i]:
            results.append(measure(rows[index], what, ("ours", *peers), args.kernels))
    if args.out:
        with open(args.out, "a") as file:
            for result in results:
                file.write(json.dumps(result) + "\n")


def measure(row: tuple[Any, ...], what: str, who: tuple[str, ...], profile: bool) -> dict[str, Any]:
    x = inputs(row)
    do = torch.randn_like(x[2])
    out: dict[str, Any] = {"row": name(row), "what": what, "torch": torch.__version__}
    for rule in who:
        if rule == "flash_qla" and (row[2] != 128 or row[3] != 128):
            continue
        try:
            started = time.perf_counter()
            make = RULES[rule](row)
            call = forward_call(make, x) if what == "forward" else training_call(make, x, do)
            call()
            torch.cuda.synchronize()
            first = time.perf_counter() - started
            torch.cuda.reset_peak_memory_stats()
            call()
            out[rule] = {"first_s": round(first, 2), "peak_MiB": torch.cuda.max_memory_allocated() >> 20, "eager_ms": time_call(call)}
            if what == "forward":
                out[rule]["graph_ms"] = time_call(call, graph=True)
            if rule == "ours" and profile:
                out[rule]["kernels_us"] = {k: round(v, 1) for k, v in kernels(call).items()}
        except Exception as problem:
            out[rule] = {"error": f"{type(problem).__name__}: {problem}"[:300]}
        print(f"{what:9s} {name(row):26s} {rule:9s} {json.dumps(out[rule])}", flush=True)
    return out


bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
QUICK = (1, 6, 8, 13)
"""The rows of CHECKS for a first look."""
CHECKS: list[tuple[tuple[Any, ...], torch.dtype, str, int | None]] = [
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


if __name__ == "__main__":
    main()
