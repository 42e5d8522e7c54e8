"""Decoding with a whole language model on a GPU: tokens a second at several batch sizes. `python benchmarks/bench_decode_gpu.py --help`

A step reads one token of every sequence, updates the state and takes the likeliest next token; the time is that of many steps in a row, divided,
after a short context has been read. Ours is run as it is called ("ours"), the same step captured as a CUDA graph ("ours graph"), and the
compiled step captured ("ours compiled graph"). Beside it FLA's model with its cache in the plainest loop ("fla") and through its `generate`
("fla generate"), and a Transformer++ of equal size whose cache holds the context ("transformer"). FLA's cache replaces its tensors, so its step
cannot be captured as it is.

`GB_s` is what must move over the time: all weights once, and the state read and written.

The error is that of the logits of one step after a context has been read, of the last sequence, relative in norm against our model in float64
on that context and token at once, at weights drawn alike for all models (notes/errors_at_the_start.md). A graph replays what "ours" calls.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bench_train_gpu as train
import clock
import rows
import torch
from torch import nn

from gdn.models import LM
from gdn.testing import compare

Step = Callable[[], Any]
IMPLS = ("ours graph", "ours", "fla", "fla generate", "ours compiled graph", "transformer")


def seconds_per_step(step: Step, steps: int, device: torch.device, rounds: int = 3) -> float:
    """Median over some rounds of many steps in a row."""
    for _ in range(3):
        step()
    times = []
    for _ in range(rounds):
        clock.synchronize(device)
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        clock.synchronize(device)
        times.append((time.perf_counter() - begin) / steps)
    return statistics.median(times)


def measure(impl: str, size: str, batch: int, context: int, steps: int, device: str) -> dict[str, Any]:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model, found, seconds = (fla if impl.startswith("fla") else ours)(impl, size, batch, context, steps, where)
    weights = sum(p.nbytes for p in model.parameters())
    found |= {
        "ms_per_token": round(1e3 * seconds, 4),
        "tokens_per_s": round(batch / seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    if "state_MiB" in found and impl != "transformer":
        found["GB_s"] = round((weights + 2 * (found["state_MiB"] << 20)) / seconds / 1e9)
    if where.type == "cuda":
        found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found | rows.compared(lambda: error(model, impl, size, batch, context, where))


@torch.no_grad()
def error(model: Any, impl: str, size: str, batch: int, context: int, device: torch.device) -> dict[str, float]:
    """Of the logits of a step."""
    train.draw_matrices(model)
    prompt = random_tokens(train.config(impl, size).vocab, batch, context + 1, device)
    if isinstance(model, LM):
        state = model.init_state(batch)
        model(prompt[:, :-1], state=state)
        logits, config, weights = model(prompt[:, -1:], state=state).logits, model.config, model.state_dict()
    else:
        cache = model(input_ids=prompt[:, :-1], use_cache=True).past_key_values
        logits = model(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True).logits
        config, weights = train.of_fla(model)
    exact = train.in_float64(config, weights)(prompt[-1:]).logits
    return {"logits": compare.error(logits[-1, -1].double(), exact[-1, -1])}


def ours(impl: str, size: str, batch: int, context: int, steps: int, device: torch.device) -> tuple[nn.Module, dict[str, Any], float]:
    if "graph" in impl and device.type != "cuda":
        raise ValueError("a CUDA graph needs a GPU")
    model = prepared(LM(train.config(impl, size)), device)
    state = model.init_state(batch)
    begin = time.perf_counter()
    model(random_tokens(model.config.vocab, batch, context, device), state=state)
    clock.synchronize(device)
    found = {"context_s": round(time.perf_counter() - begin, 2), "state_MiB": state.nbytes >> 20}
    run = torch.compile(model, fullgraph=True) if "compiled" in impl else model
    token = random_tokens(model.config.vocab, batch, 1, device)

    @torch.no_grad()
    def step() -> None:
        token.copy_(run(token, state=state).logits.argmax(-1))

    begin = time.perf_counter()
    step()
    call = clock.captured(step) if "graph" in impl else step
    clock.synchronize(device)
    found["first_s"] = round(time.perf_counter() - begin, 2)
    return model, found, seconds_per_step(call, steps, device)


def fla(impl: str, size: str, batch: int, context: int, steps: int, device: torch.device) -> tuple[nn.Module, dict[str, Any], float]:
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    model = prepared(GatedDeltaNetForCausalLM(GatedDeltaNetConfig(vocab_size=32000, **train.FLA[size])), device)
    prompt = random_tokens(32000, batch, context, device)
    if impl == "fla generate":
        return model, {}, generating(model, prompt, steps, device)
    begin = time.perf_counter()
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    token = random_tokens(32000, batch, 1, device)

    def step() -> None:
        nonlocal cache
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        token.copy_(out.logits[:, -1:].argmax(-1))

    step()
    clock.synchronize(device)
    found = {"first_s": round(time.perf_counter() - begin, 2)}
    return model, found, seconds_per_step(step, steps, device)


def generating(model: Any, prompt: torch.Tensor, steps: int, device: torch.device) -> float:
    """Seconds a token of `generate`: long minus short, so that the prompt does not count."""

    def seconds(tokens: int) -> float:
        clock.synchronize(device)
        begin = time.perf_counter()
        model.generate(
            prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=True, pad_token_id=0, eos_token_id=None
        )
        clock.synchronize(device)
        return time.perf_counter() - begin

    seconds(2)
    return statistics.median((seconds(2 + steps) - seconds(2)) / steps for _ in range(3))


def prepared(model: Any, device: torch.device) -> Any:
    return model.to(device=device, dtype=torch.bfloat16).eval()


def random_tokens(vocab: int, batch: int, length: int, device: torch.device) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), device=device)


def table(results: list[dict[str, Any]]) -> str:
    """Tokens a second (and milliseconds a step): a line for each implementation, a column for each batch."""
    batches = list(dict.fromkeys(r["batch"] for r in results))
    lines = [f"{'tokens/s (ms a step)':22s}" + "".join(f"{f'B={b}':>22s}" for b in batches)]
    for impl in dict.fromkeys(r["impl"] for r in results):
        cells = {
            r["batch"]: f"{r['tokens_per_s']:,} ({r['ms_per_token']:.2f}){shown(r)}" if "tokens_per_s" in r else r["failed"][:20]
            for r in results
            if r["impl"] == impl
        }
        lines.append(f"{impl:22s}" + "".join(f"{cells.get(b, '-'):>22s}" for b in batches))
    return "\n".join(lines)


def shown(result: dict[str, Any]) -> str:
    """The error, where there is one."""
    return f" {result['errors']['logits']:.0e}" if "errors" in result else ""


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impls", type=rows.chosen(IMPLS), default=list(IMPLS), help="comma list of " + ", ".join(IMPLS))
    parser.add_argument("--size", default="gdn_1.3b", choices=train.OURS, help="as in bench_train_gpu.py (default %(default)s)")
    parser.add_argument("--batches", default="1,32,256", help="comma list (default %(default)s)")
    parser.add_argument("--context", type=int, default=64, help="tokens read before (default %(default)s)")
    parser.add_argument("--steps", type=int, default=50, help="tokens in a row that a time is of (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    rows.add_arguments(parser, budget=300)
    args = parser.parse_args(argv)
    batches = args.batches.split(",")
    if not all(b.isdigit() and int(b) for b in batches):
        parser.error(f"--batches: expected whole numbers above 0, got {args.batches}")
    args.batches = [int(b) for b in batches]
    for name in ("context", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use; --device cpu --size tiny tries the script out")
    return args


def plan(args: argparse.Namespace) -> list[rows.Row]:
    return [
        rows.Row(
            {"size": args.size, "batch": batch, "context": args.context},
            impl,
            functools.partial(measure, impl, args.size, batch, args.context, args.steps, args.device),
        )
        for impl in args.impls
        for batch in args.batches
    ]


def main() -> None:
    args = parse()
    print(table(rows.run("decode", plan(args), args, args.device)))


if __name__ == "__main__":
    main()
