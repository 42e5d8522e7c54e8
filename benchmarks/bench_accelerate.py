"""`gdn.accelerate` beside the stock transformers model, on the CPU: forward, training step, decoding. `--help` for the sizes.

A random Qwen3.5 text model with the layers of the 0.8B one, fewer of them, and as large a part of its vocabulary, so that the head's share
of the work is that of the whole model. Stock and accelerated take turns within each round, on the same weights and tokens; figures are
medians over the rounds, with the load of the machine beside them: on shared cores only the ratio means something. Processor seconds are
of all threads of this process; waiting for others is not in them.

The matrix products of the projections, the MLP and the head stay as they are. "limit" is what the speed-up would be if everything else took no
time: stock's time over that of those products at the greatest rate that these cores reach in any of a few large products.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor

import gdn
from gdn.core.device import machine
from gdn.hf.names import CACHE

WHOLE_LAYERS, WHOLE_VOCAB = 24, 248_320
SHAPE: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "tie_word_embeddings": True,
}
"""Of Qwen3.5-0.8B's text model."""


def build(layers: int, vocab: int) -> Any:
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    config = transformers.Qwen3_5TextConfig(**SHAPE, num_hidden_layers=layers, vocab_size=vocab)
    return transformers.Qwen3_5ForCausalLM(config)


def forward(model: Any, tokens: Tensor, steps: int) -> float:
    model.eval()
    with torch.no_grad():
        return model(tokens, labels=tokens, use_cache=False).loss.item()


def train(model: Any, tokens: Tensor, steps: int) -> float:
    model.train()
    model.zero_grad(set_to_none=True)
    loss = model(tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return loss.item()


def norm_of_gradients(model: Any) -> float:
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


def decoder(model: Any, tokens: Tensor) -> Callable[[Any, Tensor, int], float]:
    """After a prompt, which is not timed."""
    with torch.no_grad():
        out = model(tokens[:, :128], use_cache=True)

    def decode(model: Any, tokens: Tensor, steps: int) -> float:
        token, logits = out.logits[:, -1:].argmax(-1), out.logits
        with torch.no_grad():
            for _ in range(steps):
                logits = model(token, use_cache=True, **{CACHE: out[CACHE]}).logits
                token = logits[:, -1:].argmax(-1)
        return float(logits.double().square().mean().sqrt())

    return decode


def peak_rate() -> float:
    """The greatest rate of a product of large fp32 matrices, in operations a second."""
    best = 0.0
    for rows, inner, columns in ((1024, 1024, 2048), (2048, 2048, 2048), (7168, 1024, 1024), (1024, 3584, 1024)):
        a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
        for _ in range(8):
            start = time.perf_counter()
            torch.mm(a, b, out=out)
            best = max(best, 2 * rows * inner * columns / (time.perf_counter() - start))
    return best


def products(model: Any, tokens: Tensor, work: Callable[[Any, Tensor, int], float]) -> dict[str, float]:
    """The matrix products of weights in one call: their operations, their time in it, and the greatest rate of such products here."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        work(model, tokens, 0)
    events = [e for e in seen.key_averages(group_by_input_shape=True) if e.key == "aten::mm"]
    operations = sum(2.0 * e.count * e.input_shapes[0][0] * e.input_shapes[0][1] * e.input_shapes[1][1] for e in events)
    return {
        "products_s": sum(e.self_cpu_time_total for e in events) / 1e6,
        "products_gflop": operations / 1e9,
        "peak_gflop_per_s": peak_rate() / 1e9,
    }


def measure(model: Any, tokens: Tensor, work: str, rounds: int, steps: int) -> dict[str, Any]:
    wall: dict[str, list[float]] = {"stock": [], "gdn": []}
    busy: dict[str, list[float]] = {"stock": [], "gdn": []}
    values: dict[str, float] = {}
    gradients: dict[str, float] = {}
    load = [os.getloadavg()[0]]
    for turn in range(rounds + 1):
        for name in ("stock", "gdn") if turn % 2 else ("gdn", "stock"):
            with gdn.accelerate(model) if name == "gdn" else contextlib.nullcontext():
                run = {"forward": forward, "train": train}.get(work) or decoder(model.eval(), tokens)
                start, processor = time.perf_counter(), time.process_time()
                values[name] = run(model, tokens, steps)
                elapsed, spent = time.perf_counter() - start, time.process_time() - processor
            if work == "train":
                gradients[name] = norm_of_gradients(model)
            if turn:  # the first is for warming up
                wall[name].append(elapsed)
                busy[name].append(spent)
        load.append(os.getloadavg()[0])
    per = steps if work == "decode" else 1
    row: dict[str, Any] = {"work": work, "rounds": rounds}
    for name in ("stock", "gdn"):
        row |= {f"{name}_s": statistics.median(wall[name]) / per, f"{name}_processor_s": statistics.median(busy[name]) / per}
    row |= {"speedup": row["stock_s"] / row["gdn_s"], "processor_speedup": row["stock_processor_s"] / row["gdn_processor_s"]}
    row["loss_difference" if work != "decode" else "logits_difference"] = abs(values["gdn"] - values["stock"]) / abs(values["stock"])
    if work == "train":
        row["gradient_norm_difference"] = abs(gradients["gdn"] - gradients["stock"]) / gradients["stock"]
    if work != "decode":
        with gdn.accelerate(model):
            row |= products(model, tokens, {"forward": forward, "train": train}[work])
        row["limit"] = row["stock_s"] * row["peak_gflop_per_s"] / row["products_gflop"]
    if work == "decode":
        row |= {"stock_tokens_per_s": 1 / row["stock_s"], "gdn_tokens_per_s": 1 / row["gdn_s"]}
    return row | {"load_least": min(load), "load_most": max(load)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4, help="layers, a multiple of 4 (three of linear attention, one of full); default 4")
    parser.add_argument("--vocab", type=int, help="default: the same part of 248320 as layers of 24")
    parser.add_argument("--length", type=int, default=1024, help="tokens of the row; default 1024")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of which the median is taken; default 5")
    parser.add_argument("--decode", type=int, default=16, help="tokens decoded a round; default 16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", nargs="+", default=["forward", "train", "decode"], choices=["forward", "train", "decode"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu" / "accelerate.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    vocab = options.vocab or WHOLE_VOCAB * options.layers // WHOLE_LAYERS
    model = build(options.layers, vocab)
    tokens = torch.randint(vocab, (1, options.length), generator=torch.Generator().manual_seed(0))
    here = machine()
    common = {
        "device": here.name,
        "threads": options.threads,
        "torch": here.torch,
        "transformers": transformers.__version__,
        "dtype": "float32",
        "layers": options.layers,
        "vocab": vocab,
        "length": options.length,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for work in options.work:
        row = {**common, **measure(model, tokens, work, options.rounds, options.decode)}
        print(json.dumps(row), flush=True)
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
