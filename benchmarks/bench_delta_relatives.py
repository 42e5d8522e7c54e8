"""Several writes a token and channel decays on the CPU, each beside the way it would be done without them.

    python benchmarks/bench_delta_relatives.py [--repeats 9] [--out FILE]

Several writes: the row "stretched" is the naive way, the gated delta rule over a sequence n times as long. Channel decays: the same operator
of transformers in plain torch (where it is installed), and the gated delta rule with one decay a head as the bound. Float32, one thread;
milliseconds are processor time, so that what else the machine does counts less; rows take turns; the median and the least of the repeats.
Before it is timed, a row is compared with the float64 reference on 128 tokens (the largest relative error of outputs and gradients).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn.core import device as hardware
from gdn.core.dispatch import use
from gdn.ops import channel_delta_rule, gated_delta_product, gated_delta_rule
from gdn.ops.delta_channel import problems as channel
from gdn.ops.delta_product import problems as product
from gdn.testing import compare

Call = Callable[[dict[str, Any]], tuple[Tensor, Tensor]]


def row(operator: Callable[..., tuple[Tensor, Tensor]], impl: str) -> Call:
    def call(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with use(**{operator.__name__: impl}):
            return operator(**arguments)

    return call


def one_decay_a_head(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    return gated_delta_rule(**{**arguments, "g": arguments["g"][..., 0]})


def peer() -> dict[str, Call]:
    if not hardware.has_package("transformers"):
        return {}
    from transformers.models.kimi_linear.modeling_kimi_linear import chunk_kimi_delta_attention

    def call(arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
        q, k, v, g, beta = (arguments[name] for name in ("q", "k", "v", "g", "beta"))
        return chunk_kimi_delta_attention(q, k, v, g=g, beta=beta, output_final_state=True)

    return {"transformers": call}


def error(call: Call, reference: Call, build: Callable[[torch.dtype], dict[str, Any]]) -> float:
    results = []
    for function, dtype in ((call, torch.float32), (reference, torch.float64)):
        arguments = build(dtype)
        outputs = function(arguments)
        results.append((*outputs, *torch.autograd.grad(outputs, list(arguments.values()), compare.weights(outputs))))
    return max(compare.error(a.detach().double(), b.detach()) for a, b in zip(*results))


def milliseconds(call: Call, arguments: dict[str, Any], backward: bool) -> float:
    begin = time.process_time()
    with torch.set_grad_enabled(backward):
        outputs = call(arguments)
        if backward:
            torch.autograd.grad(outputs, list(arguments.values()), [x.detach() for x in outputs], allow_unused=True)
    return 1e3 * (time.process_time() - begin)


def bench(title: str, calls: dict[str, Call], reference: Call, problem: Any, short: Any, repeats: int) -> list[dict[str, Any]]:
    arguments = problem.build(dtype=torch.float32)
    samples: dict[tuple[str, bool], list[float]] = {}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            for backward in (False, True):
                elapsed = milliseconds(call, arguments, backward)
                if turn:  # the first is a warm-up
                    samples.setdefault((name, backward), []).append(elapsed)
    found = []
    for (name, backward), times in samples.items():
        exact = None if name == "one decay a head" else error(calls[name], reference, lambda dtype: short.build(dtype=dtype))
        mode = "forward+backward" if backward else "forward"
        result = {"problem": title, "impl": name, "mode": mode, "median": statistics.median(times), "least": min(times), "error": exact}
        print(f"{title:40} {name:18} {mode:18} {result['median']:8.1f} {result['least']:8.1f}   {'' if exact is None else f'{exact:.1e}'}")
        found.append(result)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{hardware.machine().name}, one thread, torch {torch.__version__}\n{'':40} {'':18} {'':18} {'median':>8} {'least':>8}   error")
    found = []
    for problem in product.BENCHMARK:
        short = product.Problem(tokens=problem.tokens.with_(T=128, H=1, HV=1), n=problem.n)
        calls = {name: row(gated_delta_product, name) for name in ("chunked", "stretched")}
        found += bench(problem.name, calls, row(gated_delta_product, "reference"), problem, short, options.repeats)
    for problem in channel.BENCHMARK:
        short = channel.Problem(rule=problem.rule.with_(T=128, H=1, HV=1))
        calls = {"chunked": row(channel_delta_rule, "chunked"), "one decay a head": one_decay_a_head} | peer()
        found += bench(f"{problem.name}, channel decays", calls, row(channel_delta_rule, "reference"), problem, short, options.repeats)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        machine = {"cpu": hardware.machine().name, "torch": torch.__version__, "threads": 1, "unit": "ms of processor time"}
        with options.out.open("a") as lines:
            lines.writelines(json.dumps(result | machine) + "\n" for result in found)


if __name__ == "__main__":
    main()
