"""`gdn.accelerate` beside stock transformers on a GPU: a training step and decoding. `python benchmarks/bench_accelerate_gpu.py --help`

A random model of the shape of Qwen3.5-0.8B's text model in bfloat16, built by transformers. Stock runs the rule on flash-linear-attention
where it is installed (`rule` in the rows says), and its convolution in torch. A training step is forward, loss, backward and AdamW. Decoding
reads one token of every sequence and takes the likeliest next one; the time is that of many steps in a row, divided, after a short context.
"compiled" is `torch.compile`, with `fullgraph=True` on ours; "graph" is the step captured as a CUDA graph, over transformers' `StaticCache`.

A compiled training step takes a minute to compile, flash-linear-attention some minutes to tune; `--work` splits them into two runs.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import logging
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clock
import rows
import torch
import transformers
from bench_accelerate import SHAPE, WHOLE_LAYERS, WHOLE_VOCAB
from bench_decode_gpu import Step, random_tokens, seconds_per_step

import gdn
from gdn.hf.names import CACHE

WORKS = {
    "train": ("gdn compiled", "stock", "gdn", "stock compiled"),
    "decode": ("gdn graph", "stock", "gdn", "stock graph", "gdn compiled graph"),
}
"""What is measured, of which implementations, in order of importance."""

SIZES: dict[str, dict[str, Any]] = {
    "qwen3_5_0.8b": {**SHAPE, "num_hidden_layers": WHOLE_LAYERS, "vocab_size": WHOLE_VOCAB},
    "tiny": {
        "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "num_hidden_layers": 4, "vocab_size": 64,
    },
}  # fmt: skip


def build(impl: str, size: str, device: torch.device) -> Any:
    """The model, the same for every implementation, accelerated for ours."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    with device:
        model = transformers.Qwen3_5ForCausalLM(transformers.Qwen3_5TextConfig(**SIZES[size]))
    model.to(torch.bfloat16)
    if impl.startswith("gdn"):
        gdn.accelerate(model)
    return model


def runner(impl: str, model: Any) -> Any:
    """The model as it is called."""
    if "compiled" not in impl:
        return model
    return torch.compile(model, fullgraph=impl.startswith("gdn"))


def train(impl: str, size: str, batch: int, length: int, steps: int, device: torch.device) -> dict[str, Any]:
    started = time.perf_counter()
    model = build(impl, size, device).train()
    run, optimizer = runner(impl, model), torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    torch.manual_seed(1)
    times, losses, first = [], [], 0.0
    for step in range(steps + 1):
        tokens = random_tokens(model.config.vocab_size, batch, length, device)
        clock.synchronize(device)
        begin = time.perf_counter()
        loss = run(tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        clock.synchronize(device)
        if step == 0:
            first = time.perf_counter() - started
        else:
            times.append(time.perf_counter() - begin)
        losses.append(round(loss.item(), 4))
    median = statistics.median(times)
    return {"losses": losses[:3], "first_s": round(first, 1), "ms": round(1e3 * median, 2), "tokens_per_s": round(batch * length / median)}


@torch.no_grad()
def decode(impl: str, size: str, batch: int, context: int, steps: int, device: torch.device) -> dict[str, Any]:
    model = build(impl, size, device).eval()
    cache = (
        transformers.StaticCache(model.config, max_cache_len=context + 3 * steps + 16)
        if "graph" in impl
        else transformers.DynamicCache(config=model.config)
    )
    torch.manual_seed(1)
    model(random_tokens(model.config.vocab_size, batch, context, device), use_cache=True, **{CACHE: cache})
    run, token = runner(impl, model), random_tokens(model.config.vocab_size, batch, 1, device)

    @torch.no_grad()
    def step() -> None:
        token.copy_(run(token, use_cache=True, **{CACHE: cache}).logits[:, -1:].argmax(-1))

    clock.synchronize(device)
    begin = time.perf_counter()
    step()
    call = captured(step, device) if "graph" in impl else step
    clock.synchronize(device)
    first = time.perf_counter() - begin
    seconds = seconds_per_step(call, steps, device)
    return {"first_s": round(first, 1), "ms": round(1e3 * seconds, 3), "tokens_per_s": round(batch / seconds)}


def captured(step: Step, device: torch.device) -> Step:
    if device.type != "cuda":
        raise ValueError("a CUDA graph needs a GPU")
    return clock.captured(step)


def measure(work: str, impl: str, size: str, batch: int, length: int, steps: int, device: str) -> dict[str, Any]:
    where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = (train if work == "train" else decode)(impl, size, batch, length, steps, where)
    found["rule"] = "gdn" if impl.startswith("gdn") else stock_rule()
    if where.type == "cuda":
        found["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return found


def stock_rule() -> str:
    """What stock transformers runs the gated delta rule on."""
    return "fla" if importlib.util.find_spec("fla") else "torch"


def table(results: list[dict[str, Any]]) -> str:
    """A line for each row, with the speed over that of stock as it is called."""
    plain = {(r["work"], r["shape"]): r["ms"] for r in results if r["impl"] == "stock" and "ms" in r}
    lines = [f"{'':42s}{'ms':>10s}{'tokens/s':>12s}{'over stock':>12s}"]
    for r in results:
        start = f"{r['work']:8s}{r['shape']:12s}{r['impl']:22s}"
        base = plain.get((r["work"], r["shape"]))
        ratio = f"{base / r['ms']:.2f}" if base and "ms" in r else "-"
        lines.append(f"{start}{r['ms']:10.2f}{r['tokens_per_s']:12,}{ratio:>12s}" if "ms" in r else f"{start}  {r['failed'][:60]}")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    every = list(dict.fromkeys(impl for impls in WORKS.values() for impl in impls))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=rows.chosen(tuple(WORKS)), default=list(WORKS), help="comma list of train, decode (default: both)")
    parser.add_argument("--impls", type=rows.chosen(every), default=every, help=f"comma list of {', '.join(every)}")
    parser.add_argument("--size", default="qwen3_5_0.8b", choices=SIZES)
    parser.add_argument("--train-shapes", default="2x4096", help="comma list of batch x length (default %(default)s)")
    parser.add_argument("--decode-shapes", default="1x128,32x128", help="comma list of batch x context (default %(default)s)")
    parser.add_argument("--train-steps", type=int, default=6, help="steps that the median is of (default %(default)s)")
    parser.add_argument("--decode-steps", type=int, default=50, help="tokens in a row that a time is of (default %(default)s)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    rows.add_arguments(parser, row_limit=300)
    args = parser.parse_args(argv)
    for work in WORKS:
        try:
            setattr(args, f"{work}_shapes", [rows.batch_by_length(shape) for shape in getattr(args, f"{work}_shapes").split(",")])
        except argparse.ArgumentTypeError as problem:
            parser.error(f"--{work}-shapes: {problem}")
        if getattr(args, f"{work}_steps") < 1:
            parser.error(f"--{work}-steps: expected at least 1, got {getattr(args, f'{work}_steps')}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use; --device cpu --size tiny tries the script out")
    return args


def plan(args: argparse.Namespace) -> list[rows.Row]:
    return [
        rows.Row(
            {"work": work, "size": args.size, "shape": f"{batch}x{length}"},
            impl,
            functools.partial(measure, work, impl, args.size, batch, length, getattr(args, f"{work}_steps"), args.device),
        )
        for work in args.work
        for batch, length in getattr(args, f"{work}_shapes")
        for impl in WORKS[work]
        if impl in args.impls
    ]


def main() -> None:
    args = parse()
    print(table(rows.run("accelerate_gpu", plan(args), args, args.device)))


if __name__ == "__main__":
    main()
