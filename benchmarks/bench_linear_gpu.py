"""Linear attention with decay, and the delta rule with channel decays, on a GPU: error against fp64, then time, beside FLA's `chunk_simple_gla`, `chunk_gla` and `chunk_kda` where they can be
imported.

    python benchmarks/bench_linear_gpu.py [--sizes gla,hgrn2] [--out FILE]

Sizes are those of the mixers at width 1024: 8 rows of 4096 tokens, bfloat16. Medians of eager calls timed with device events.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn import ops
from gdn.core import device as hardware
from gdn.core.dispatch import use
from gdn.testing import compare

SIZES = {
    "retnet": ("linear_attention", 8, 8, 128, 256),
    "mamba2": ("linear_attention", 1, 32, 128, 64),
    "gla": ("gated_linear_attention", 4, 4, 128, 256),
    "hgrn2": ("gated_linear_attention", 8, 8, 128, 128),
    "gsa values": ("gated_linear_attention", 4, 4, 64, 256),
    "kda": ("channel_delta_rule", 8, 8, 128, 128),
}
"""Operator, H, HV, K, V."""
PEERS = {
    "linear_attention": ("fla.ops.simple_gla", "chunk_simple_gla"),
    "gated_linear_attention": ("fla.ops.gla", "chunk_gla"),
    "channel_delta_rule": ("fla.ops.kda", "chunk_kda"),
}
Rule = Callable[..., tuple[Tensor, Tensor]]


def inputs(name: str, batch: int, length: int) -> list[Tensor]:
    op, H, HV, K, V = SIZES[name]
    r = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(batch, length, *x, generator=r, device="cuda").bfloat16() for x in ((H, K), (H, K), (HV, V)))
    gates = {"linear_attention": (HV,), "gated_linear_attention": (H, K), "channel_delta_rule": (HV, K)}[op]
    g = -0.1 * torch.randn(batch, length, *gates, generator=r, device="cuda").abs()
    if op != "channel_delta_rule":
        return [x.requires_grad_() for x in (q, k, v, g)]
    beta = torch.randn(batch, length, HV, generator=r, device="cuda").sigmoid()
    return [x.requires_grad_() for x in (q, torch.nn.functional.normalize(k, dim=-1), v, g, beta)]


def row(op: str, impl: str) -> Rule:
    def call(*x: Tensor) -> tuple[Tensor, Tensor]:
        with use(**{op: impl}):
            return getattr(ops, op)(*x)

    return call


def peer(op: str) -> dict[str, Rule]:
    if op not in PEERS or not hardware.has_package("fla"):
        return {}
    module, function = PEERS[op]
    rule = getattr(importlib.import_module(module), function)

    def call(q: Tensor, k: Tensor, v: Tensor, *gates: Tensor) -> tuple[Tensor, Tensor]:
        q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))  # it takes no groups
        return rule(q, k, v, *gates, scale=q.shape[3] ** -0.5, output_final_state=True)

    return {"fla": call}


def results(rule: Rule, x: list[Tensor]) -> list[Tensor]:
    outputs = rule(*x)
    return [*outputs, *torch.autograd.grad(outputs, x, compare.weights(outputs))]


def milliseconds(call: Callable[[], Any], repeats: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(SIZES), help="default: all")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use")
    found = []
    for name in options.sizes.split(","):
        op = SIZES[name][0]
        short, x = inputs(name, 1, 200), inputs(name, 8, 4096)
        truth = results(row(op, "reference"), [t.detach().double().requires_grad_() for t in short])
        for who, rule in {"portable": row(op, "portable"), **peer(op)}.items():
            errors = [compare.error(a.detach().double(), b.detach()) for a, b in zip(results(rule, short), truth)]

            def forward(rule: Rule = rule, x: list[Tensor] = x) -> Any:
                with torch.no_grad():
                    return rule(*x)

            def train(rule: Rule = rule, x: list[Tensor] = x) -> Any:
                o = rule(*x)[0]
                return torch.autograd.grad(o, x, o.detach())

            line = {
                "size": name,
                "impl": who,
                "forward_ms": milliseconds(forward),
                "training_ms": milliseconds(train),
                "error": max(errors),
            }
            print(json.dumps(line), flush=True)
            found.append(line | {"device": hardware.machine().name, "torch": torch.__version__})
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as lines:
            lines.writelines(json.dumps(line) + "\n" for line in found)


if __name__ == "__main__":
    main()
