"""A training step of a whole language model on a GPU, beside FLA's Gated DeltaNet and a Transformer++. `python benchmarks/bench_train_gpu.py --help`

One step is forward, loss, backward and AdamW, with bfloat16 parameters (gates float32) and random tokens. For each model and shape: seconds
from building the model to the end of the first step (everything compiled on the way), median milliseconds of a step (with `--graph` also as one
CUDA graph), tokens per second, peak memory, and the share of the data sheet's dense bfloat16 rate that is used: `mfu` by the operations of the
model at that length (three times the forward pass, recurrence and attention scores included), `mfu_6n` by 6 a parameter and token.

Errors are those of the loss and of all gradients together, relative (in norm), against our model in float64 with the same weights, FLA's too.
They are taken after the timed steps, from one whose loss is that of the first 512 tokens of the last sequence alone: its shape is the one that
is timed, so nothing is compiled or tuned for them, and float64 needs no more than these tokens. All models have matrices drawn anew from
N(0, 0.02^2) for them, since they depend on the weights more than on the code (notes/errors_at_the_start.md).

The default shapes are those of the paper's throughput figure. FLA compiles and tunes for three minutes in its first step, for less than
two and a half where sixteen processes compile (`--compilers`; its row says so, 0 gives the step as a user has it); all defaults take four to
five minutes with fourteen. The Transformer++ is our model with full attention through torch's flash kernel. "blocks" is compiled one block at a
time (`LM.compile_blocks`), "compiled" as one graph.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clock
import rows
import torch
import tuning
from torch import Tensor, nn

from gdn.hf.families import family
from gdn.mixers import Attention, GatedDeltaNet
from gdn.models import LM
from gdn.models.sizes import SIZES

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of tokens and their targets, `[B, T]`; a target of -100 counts for nothing."""
SHORT = 512
"""Tokens that errors are of."""
DENSE_BF16 = {"H200": 989e12, "H100 80GB HBM3": 989e12, "H100 SXM": 989e12, "H100 PCIe": 756e12, "A100": 312e12, "B200": 2250e12}
"""Floating-point operations a second in NVIDIA's data sheets, without sparsity."""

OURS: dict[str, LM.Config] = {
    "like_fla": LM.Config(
        vocab=32000, width=2048, layers=21, mlp=5632, tie_embeddings=False,
        pattern=(GatedDeltaNet.Config(heads=16, head_dim=128, expand_v=1.0),),
    ),
    "gdn_1.3b": SIZES["gdn_1.3b"],
    "tiny": LM.Config(vocab=256, width=64, layers=2, mlp=128, pattern=(GatedDeltaNet.Config(heads=2, head_dim=16),)),
}  # fmt: skip
FLA: dict[str, dict[str, Any]] = {
    "like_fla": {
        "hidden_size": 2048, "num_hidden_layers": 21, "num_heads": 16, "head_dim": 128, "expand_v": 1.0, "intermediate_size": 5632,
        "tie_word_embeddings": False,
    },
    "gdn_1.3b": {
        "hidden_size": 2400, "num_hidden_layers": 16, "num_heads": 9, "head_dim": 200, "expand_v": 2.0, "intermediate_size": 5888,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
_TRANSFORMER = SIZES["transformer_1.3b"].with_(pattern=(Attention.Config(heads=16, head_dim=128),))
TRANSFORMER: dict[str, LM.Config] = {
    "like_fla": _TRANSFORMER,
    "gdn_1.3b": _TRANSFORMER,
    "tiny": OURS["tiny"].with_(pattern=(Attention.Config(heads=2, head_dim=32),)),
}
"""1.299 B parameters, heads of 128: the width that flash attention is fastest with."""
MODELS = ("ours blocks", "transformer blocks", "fla", "ours", "transformer", "ours compiled", "transformer compiled")
STANDARD = MODELS[:3]


def config(model: str, size: str) -> LM.Config:
    """Ours of the same shape, which counts the operations of FLA's too."""
    return (TRANSFORMER if model.startswith("transformer") else OURS)[size]


def gdn(model: str, size: str, device: str) -> tuple[nn.Module, Loss]:
    with torch.device(device):
        module = LM(config(model, size))
    module.to(torch.bfloat16)  # the gates stay float32
    run = torch.compile(module, fullgraph=True) if model.endswith("compiled") else module
    if model.endswith("blocks"):
        module.compile_blocks()
    return module, lambda tokens, targets: run(tokens, targets=targets).loss


def fla(model: str, size: str, device: str) -> tuple[nn.Module, Loss]:
    from fla.models import GatedDeltaNetConfig, GatedDeltaNetForCausalLM

    with torch.device(device):
        module = GatedDeltaNetForCausalLM(GatedDeltaNetConfig(vocab_size=32000, **FLA[size])).to(torch.bfloat16)
    return module, lambda tokens, targets: module(input_ids=tokens, labels=torch.roll(targets, 1, 1)).loss


def measure(model: str, size: str, batch: int, length: int, steps: int, device: str, graph: bool = False) -> dict[str, Any]:
    where = torch.device(device)
    started = time.perf_counter()
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    module, loss = (fla if model == "fla" else gdn)(model, size, device)
    parameters = sum(p.numel() for p in module.parameters())
    graph = graph and where.type == "cuda"
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True, capturable=graph)

    def step(tokens: Tensor) -> Tensor:
        found = loss(tokens, torch.roll(tokens, -1, 1))
        found.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return found.detach()

    times, first, value = [], 0.0, 0.0
    for number in range(steps + 1):
        tokens = torch.randint(config(model, size).vocab, (batch, length), device=where)
        clock.synchronize(where)
        begin = time.perf_counter()
        found = step(tokens)
        clock.synchronize(where)
        if number == 0:
            first = time.perf_counter() - started
        else:
            times.append(time.perf_counter() - begin)
        value = found.item()
    median = statistics.median(times)
    result = {
        "parameters": parameters, "loss": round(value, 3), "first_s": round(first, 1), "step_ms": round(median * 1e3, 1),
        "tokens_per_s": round(batch * length / median),
    }  # fmt: skip
    if where.type == "cuda":
        result["peak_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        result |= utilisation(config(model, size), length, parameters, batch * length / median, torch.cuda.get_device_name())
    if graph:
        torch.cuda.empty_cache()  # a graph's memory is its own
        result |= clock.graph_ms(functools.partial(step, tokens), where, steps, seconds=60)
    return result | rows.compared(lambda: errors(module, loss, torch.randint_like(tokens, config(model, size).vocab)))


def errors(module: Any, loss: Loss, tokens: Tensor) -> dict[str, float]:
    """Of the loss and of all gradients, where only the first tokens of the last sequence have targets: no others take part in either."""
    draw_matrices(module)
    n = min(SHORT, tokens.shape[1] - 1)
    targets = torch.full_like(tokens, -100)
    targets[-1, :n] = tokens[-1, 1 : n + 1]
    module.zero_grad(set_to_none=True)
    value = loss(tokens, targets)
    value.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    if isinstance(module, LM):
        model, weights = module.config, module.state_dict()
    else:
        model, weights = of_fla(module)
        gradients = as_ours(model, gradients)
    truth = in_float64(model, weights)
    exact = truth(tokens[-1:, :n], targets=targets[-1:, :n]).loss
    exact.backward()
    squares = [
        torch.stack([(gradients[name].double() - p.grad).square().sum(), p.grad.square().sum()]) for name, p in truth.named_parameters()
    ]
    wrong, whole = torch.stack(squares).sum(0).sqrt().tolist()
    return {"loss": float(abs(value.detach().double() - exact.detach()) / exact.detach()), "gradients": wrong / whole}


@torch.no_grad()
def draw_matrices(module: Any) -> None:
    """All matrices and filters from N(0, 0.02^2), as FLA begins."""
    for weight in module.parameters():
        if weight.dim() > 1:
            weight.normal_(std=0.02)


def in_float64(model: LM.Config, weights: Mapping[str, Tensor]) -> LM:
    """The model with these weights; no kernel of Triton serves it."""
    with torch.device("meta"):
        found = LM(model)
    found.load_state_dict({name: weight.double() for name, weight in weights.items()}, assign=True)
    return found


def of_fla(module: Any) -> tuple[LM.Config, dict[str, Tensor]]:
    """Our configuration and weights of FLA's model."""
    model = family("gated_deltanet").read_config(module.config.to_dict())
    return model, as_ours(model, module.state_dict())


def as_ours(model: LM.Config, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of FLA's model, or their gradients, named and laid out as in ours."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LM(model).state_dict().items()}
    found: dict[str, Tensor] = {}
    for rule in family("gated_deltanet").rules(model):
        parts = rule.read([theirs[name] for name in rule.theirs], [shapes[name][0] for name in rule.ours])
        found |= zip(rule.ours, parts)
    return found


def utilisation(model: LM.Config, length: int, parameters: int, tokens_per_s: float, device: str) -> dict[str, float]:
    """Shares of the device's rate; nothing where the rate is not known."""
    rate = next((rate for name, rate in DENSE_BF16.items() if name in device), None)
    if rate is None:
        return {}
    flops = 3 * model.flops_per_token(length)
    return {"mfu": round(flops * tokens_per_s / rate, 3), "mfu_6n": round(6 * parameters * tokens_per_s / rate, 3)}


def table(results: list[dict[str, Any]]) -> str:
    """Thousands of tokens a second, memory, utilisation, error of the gradients: a line for each model, a column for each shape."""
    shapes = list(dict.fromkeys(r["shape"] for r in results))
    lines = [f"{'thousand tokens/s':22s}" + "".join(f"{shape:>22s}" for shape in shapes)]
    for model in dict.fromkeys(r["impl"] for r in results):
        cells = {r["shape"]: cell(r) for r in results if r["impl"] == model}
        lines.append(f"{model:22s}" + "".join(f"{cells.get(shape, '-'):>22s}" for shape in shapes))
    return "\n".join(lines)


def cell(result: dict[str, Any]) -> str:
    if "failed" in result:
        return result["failed"][:20]
    memory = f" {result['peak_GiB']:.0f}G" if "peak_GiB" in result else ""
    share = f" {result['mfu']:.0%}" if "mfu" in result else ""
    error = f" {result['errors']['gradients']:.0e}" if "errors" in result else ""
    return f"{result['tokens_per_s'] / 1e3:.1f}{memory}{share}{error}"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", type=rows.chosen(MODELS), default=list(STANDARD), help=f"comma list of {', '.join(MODELS)} (default: the first three)"
    )
    parser.add_argument(
        "--size", default="like_fla", choices=OURS,
        help="like_fla (16 heads of 128, 21 layers, 1.3 B), gdn_1.3b (official: 9 heads of 200, values 400), or tiny, to try the script out",
    )  # fmt: skip
    parser.add_argument("--shapes", default="8x4096,16x2048,4x8192,2x16384", help="comma list of batch x length (default %(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="steps that the median is of, after one that is not (default %(default)s)")
    parser.add_argument("--graph", action="store_true", help="time the whole step as a CUDA graph too")
    parser.add_argument("--compile", action="store_true", help="compile every model of ours that is named without it")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    tuning.add_arguments(parser)
    rows.add_arguments(parser, row_limit=300)
    args = parser.parse_args(argv)
    try:
        args.shapes = [rows.batch_by_length(shape) for shape in args.shapes.split(",")]
    except argparse.ArgumentTypeError as problem:
        parser.error(f"--shapes: {problem}")
    if args.steps < 1:
        parser.error(f"--steps: expected at least 1, got {args.steps}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use; --device cpu --size tiny tries the script out")
    if args.compile:
        args.models = list(dict.fromkeys(m if m == "fla" or m.endswith(("compiled", "blocks")) else f"{m} compiled" for m in args.models))
    return args


def measured(model: str, batch: int, length: int, args: argparse.Namespace) -> dict[str, Any]:
    row = functools.partial(measure, model, args.size, batch, length, args.steps, args.device, args.graph)
    return tuning.ahead(row, args, tunes=model == "fla")


def plan(args: argparse.Namespace) -> list[rows.Row]:
    return [
        rows.Row(
            {"size": args.size, "shape": f"{batch}x{length}"},
            model,
            functools.partial(measured, model, batch, length, args),
        )
        for batch, length in args.shapes
        for model in args.models
    ]


def main() -> None:
    args = parse()
    print(table(rows.run("train", plan(args), args, args.device)))


if __name__ == "__main__":
    main()
