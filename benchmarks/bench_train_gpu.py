"""A training step of a whole language model on a GPU, beside FLA's Gated DeltaNet and a Transformer. `python benchmarks/bench_train_gpu.py --help`

One step is forward, loss, backward and AdamW, with bfloat16 parameters (gates float32) and random tokens. Printed for each model and shape:
seconds to the first step (everything compiled on the way), median milliseconds of a step, tokens per second, peak memory, and the share
of 989 TFLOP/s (the data sheet of an H100 or H200) that 6 floating-point operations a parameter and token make.
"""

from __future__ import annotations

import argparse
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
from torch import Tensor, nn

Loss = Callable[[Tensor], Tensor]


def ours(size: str, compiled: bool) -> tuple[nn.Module, Loss]:
    from gdn.mixers.gated_deltanet import GatedDeltaNet
    from gdn.models import LM
    from gdn.models.sizes import SIZES

    like_fla = LM.Config(
        vocab=32000, width=2048, layers=21, mlp=5632, tie_embeddings=False,
        pattern=(GatedDeltaNet.Config(heads=16, head_dim=128, expand_v=1.0),),
    )  # fmt: skip
    config = like_fla if size == "like_fla" else SIZES[size]
    with torch.device("cuda"):
        model = LM(config)
    model.to(torch.bfloat16)  # the gates stay float32
    run = torch.compile(model, fullgraph=True) if compiled else model
    return model, lambda tokens: run(tokens, targets=torch.roll(tokens, -1, 1)).loss


def fla(size: str, compiled: bool) -> tuple[nn.Module, Loss]:
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    shapes: dict[str, dict[str, Any]] = {
        "gdn_1.3b": {
            "hidden_size": 2400, "num_hidden_layers": 16, "num_heads": 9, "head_dim": 200, "expand_v": 2.0, "intermediate_size": 5888,
            "tie_word_embeddings": True,
        },
        "like_fla": {
            "hidden_size": 2048, "num_hidden_layers": 21, "num_heads": 16, "head_dim": 128, "expand_v": 1.0, "intermediate_size": 5632,
            "tie_word_embeddings": False,
        },
    }  # fmt: skip
    config = GatedDeltaNetConfig(vocab_size=32000, **shapes[size])
    with torch.device("cuda"):
        model = GatedDeltaNetForCausalLM(config).to(torch.bfloat16)
    return model, lambda tokens: model(input_ids=tokens, labels=tokens).loss


MODELS = {"ours": ours, "fla": fla}


def measure(name: str, size: str, batch: int, length: int, steps: int, compiled: bool) -> dict[str, Any]:
    started = time.perf_counter()
    torch.cuda.reset_peak_memory_stats()
    model, loss = MODELS[name](size, compiled)
    parameters = sum(p.numel() for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    times, first, value = [], 0.0, 0.0
    for step in range(steps + 1):
        tokens = torch.randint(32000, (batch, length), device="cuda")
        torch.cuda.synchronize()
        begin = time.perf_counter()
        found = loss(tokens)
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        if step == 0:
            first = time.perf_counter() - started
        else:
            times.append(time.perf_counter() - begin)
        value = found.item()
    median = statistics.median(times)
    tokens_per_second = batch * length / median
    return {
        "model": name, "size": size, "compiled": compiled, "shape": f"{batch}x{length}", "parameters": parameters, "loss": round(value, 3),
        "first_s": round(first, 1), "step_ms": round(median * 1e3, 1), "tokens_per_s": round(tokens_per_second),
        "peak_GiB": round(torch.cuda.max_memory_allocated() / 2**30, 1), "mfu": round(6 * parameters * tokens_per_second / 989e12, 3),
        "torch": torch.__version__, "device": torch.cuda.get_device_name(),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="ours", help="comma list of " + ", ".join(MODELS))
    parser.add_argument(
        "--size", default="like_fla", help="like_fla (16 heads of 128, 21 layers, 1.3 B) or gdn_1.3b (official: 9 heads of 200, values 400)"
    )
    parser.add_argument("--shapes", default="8x4096", help="comma list of batch x length")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) for ours")
    parser.add_argument("--out", default="", help="jsonl file for results")
    args = parser.parse_args()
    for shape in args.shapes.split(","):
        batch, length = map(int, shape.split("x"))
        for name in args.models.split(","):
            result = measure(name, args.size, batch, length, args.steps, args.compile and name == "ours")
            print(json.dumps(result), flush=True)
            torch.cuda.empty_cache()
            if args.out:
                with open(args.out, "a") as file:
                    file.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
