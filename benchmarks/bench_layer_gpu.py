"""One layer of every mixer, forward and backward, beside FLA's layer of the same widths. `python benchmarks/bench_layer_gpu.py --help`

For each mixer: ours as it is called, FLA's (when `fla` can be imported), ours compiled. "step" is forward and backward with gradients of the
input and of every parameter, "forward" is without gradients; medians of single calls in eager mode and, with `--graph`, as a CUDA graph. Peak
memory is what a step takes beyond weights and input. Parameter counts stand beside each other: equal ones say that the widths are.

Errors are those of the output (y), of the gradient of the input (dx) and of the worst gradient of a parameter (dw): relative in norm, against
our layer in float64 on the reference rows with the same weights, FLA's too. They are of the first 256 tokens of the last sequence, in a step
at the shape that is timed, so that nothing is compiled or tuned for them; TransMamba is all attention there.

Every command prints what it cannot run and goes on. FLA compiles hundreds of configurations to tune a new layer; `--compilers` of them at once
(benchmarks/tuning.py), then it times them, which takes a minute. For an H200: `--budget 540 --out results.jsonl`.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")  # FLA's own kernels, not those of a package that it calls
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import clock
import rows
import torch
import torch.nn.functional as F
import tuning
from torch import Tensor, nn

from gdn import mixers
from gdn.hf.families import family
from gdn.mixers.base import MixerConfig
from gdn.models.lm import LM
from gdn.ops import ops, use
from gdn.testing import compare

Layer = Callable[[Tensor], Tensor]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHORT = 256
"""Tokens that errors are of."""


@dataclass(frozen=True)
class Pair:
    """A mixer of ours and FLA's layer of the same widths, for a width of the residual stream."""

    ours: Callable[[int], MixerConfig]
    module: str = ""
    name: str = ""
    """FLA's class, in `fla.layers.<module>`; none where FLA has no such layer."""
    arguments: Callable[[int], dict[str, Any]] = lambda width: {}


def heads(width: int, of: int = 128) -> int:
    return max(1, width // of)


def three_quarters(width: int) -> int:
    """Heads of 128 whose keys take three quarters of the width, as in the paper's models: 6 at a width of 1024."""
    return max(1, width * 3 // 512)


PAIRS: dict[str, Pair] = {
    "gated_deltanet": Pair(
        lambda d: mixers.GatedDeltaNet.Config(heads=three_quarters(d), head_dim=128, expand_v=2.0, beta_bias=False),
        "gated_deltanet", "GatedDeltaNet", lambda d: {"num_heads": three_quarters(d), "head_dim": 128, "expand_v": 2.0},
    ),
    "kimi_delta": Pair(
        lambda d: mixers.KimiDelta.Config(heads=heads(d), head_dim=128),
        "kda", "KimiDeltaAttention", lambda d: {"num_heads": heads(d), "head_dim": 128},
    ),
    "deltanet": Pair(lambda d: mixers.DeltaNet.Config(heads=heads(d), head_dim=128), "delta_net", "DeltaNet", lambda d: {"num_heads": heads(d)}),
    "mamba2": Pair(lambda d: mixers.Mamba2.Config(), "mamba2", "Mamba2"),
    "gla": Pair(lambda d: mixers.GLA.Config(heads=heads(d, 256)), "gla", "GatedLinearAttention", lambda d: {"num_heads": heads(d, 256)}),
    "deltaproduct": Pair(
        lambda d: mixers.DeltaProduct.Config(
            householders=2, gate=True, allow_neg_eigval=True, heads=three_quarters(d), head_dim=128, expand_v=2.0
        ),
        "gated_deltaproduct", "GatedDeltaProduct",
        lambda d: {"num_householder": 2, "allow_neg_eigval": True, "num_heads": three_quarters(d), "head_dim": 128, "expand_v": 2.0},
    ),
    "retnet": Pair(lambda d: mixers.RetNet.Config(heads=heads(d)), "multiscale_retention", "MultiScaleRetention", lambda d: {"num_heads": heads(d)}),
    "hgrn2": Pair(lambda d: mixers.HGRN2.Config(lower_bound=False), "hgrn2", "HGRN2Attention", lambda d: {"expand_ratio": 128}),
    "gsa": Pair(lambda d: mixers.GSA.Config(heads=heads(d, 256)), "gsa", "GatedSlotAttention", lambda d: {"num_heads": heads(d, 256), "num_slots": 64}),
    "attention": Pair(lambda d: mixers.Attention.Config(heads=heads(d, 64)), "attn", "Attention", lambda d: {"num_heads": heads(d, 64)}),
    "swat": Pair(lambda d: mixers.Swat.Config(heads=heads(d, 64))),
    "transmamba": Pair(lambda d: mixers.TransMamba.Config(heads=heads(d, 64))),
}  # fmt: skip
"""In the order in which they are measured."""

IMPLS = ("ours", "fla", "ours compiled")
FORMATS = {name: name for name in ("gated_deltanet", "gla", "gsa", "retnet", "hgrn2", "mamba2")}
FORMATS |= {"deltanet": "delta_net", "deltaproduct": "gated_deltaproduct", "kimi_delta": "kda", "attention": "gated_deltanet"}
"""The checkpoint format that says how a mixer's weights are laid out in FLA's layer."""


def ours(pair: Pair, width: int, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[nn.Module, Layer]:
    with torch.device(device):
        module = pair.ours(width).build(width).to(dtype)
    run = torch.compile(module, fullgraph=True) if compiled else module
    return module, lambda x: run(x)[0]


def fla(pair: Pair, width: int, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, Layer]:
    layers = importlib.import_module(f"fla.layers.{pair.module}")
    if pair.name == "Attention" and layers.flash_attn_func is None:
        layers.flash_attn_func = flash_attention
    with torch.device(device):
        module = getattr(layers, pair.name)(hidden_size=width, layer_idx=0, **pair.arguments(width)).to(dtype)
    if pair.name == "Mamba2" and not rows.installed("causal-conv1d"):
        module.eval()  # or it would call the joint kernel of mamba-ssm, which needs that package, instead of its own convolution
    return module, lambda x: module(x)[0]


def as_theirs(name: str, width: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of our layer, or their gradients, named and laid out as in FLA's."""
    model = LM.Config(vocab=8, width=width, layers=1, mlp=0, pattern=(PAIRS[name].ours(width),))
    mine, found = {f"blocks.0.mixer.{key}": value for key, value in tensors.items()}, {}
    for rule in family(FORMATS[name]).rules(model):
        if all(key in mine for key in rule.ours):
            # after "model.layers.0.attn." or "backbone.layers.0.mixer."
            found |= zip((key.split(".", 4)[-1] for key in rule.theirs), rule.write([mine.pop(key) for key in rule.ours]))
    if mine:
        raise ValueError(f"the format {FORMATS[name]} has no place for {', '.join(mine)}")
    return found


def results(module: nn.Module, layer: Layer, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the input and of the parameters by name."""
    names, leaves = zip(*((name, p) for name, p in module.named_parameters() if p.requires_grad))
    y = layer(x)
    dx, *dw = torch.autograd.grad(y, [x, *leaves], dy, materialize_grads=True)
    return y.detach(), dx, dict(zip(names, dw))


def errors(name: str, impl: str, module: nn.Module, layer: Layer, args: argparse.Namespace) -> dict[str, float]:
    """Largest relative errors of the output and of gradients. FLA's layer is given our weights.

    No layer looks ahead or at another sequence: where nothing is asked of the other tokens, a step at the full shape does what one on the
    short part alone does.
    """
    pair, dtype, device = PAIRS[name], DTYPES[args.dtype], torch.device(args.device)
    truth, exact = ours(pair, args.width, device, dtype, False)
    for weight in truth.parameters():
        weight.data = weight.data.to(dtype)  # decays too, which FLA's layer does not keep in float32
    truth.double()
    if impl == "fla":
        module.load_state_dict(as_theirs(name, args.width, truth.state_dict()))
    else:
        truth.load_state_dict(module.state_dict())
    x = torch.randn(*args.shape, args.width, device=device, dtype=dtype, requires_grad=True)
    short, dy = x[-1:, :SHORT].detach().double().requires_grad_(), torch.zeros_like(x)
    dy[-1:, :SHORT] = torch.randn_like(dy[-1:, :SHORT])
    y, dx, dw = results(module, layer, x, dy)
    with use(**dict.fromkeys(ops(), "reference")):
        true_y, true_dx, true_dw = results(truth, exact, short, dy[-1:, :SHORT].double())
    if impl == "fla":
        true_dw = as_theirs(name, args.width, true_dw)
    return {
        "y": compare.error(y[-1:, :SHORT].double(), true_y),
        "dx": compare.error(dx[-1:, :SHORT].double(), true_dx),
        "dw": max(compare.error(dw[key].double(), true) for key, true in true_dw.items()),
    }


def flash_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """What FLA's layer calls flash-attn for, where that is not installed: torch's flash kernel."""
    assert causal and window_size == (-1, -1)
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True).transpose(1, 2)


def footnote(pair: Pair) -> dict[str, str]:
    """What FLA's layer falls back to without packages that it wants."""
    if pair.name == "Mamba2" and not rows.installed("mamba-ssm"):
        return {"note": "without mamba-ssm FLA's layer is plain torch"}
    if pair.name == "Mamba2" and not rows.installed("causal-conv1d"):
        return {"note": "FLA's own convolution, for want of causal-conv1d, and mamba-ssm's chunked scan"}
    if pair.name == "Attention" and not rows.installed("flash-attn"):
        return {"note": "torch's flash attention in place of flash-attn"}
    return {}


def measure(name: str, impl: str, args: argparse.Namespace) -> dict[str, Any]:
    pair, dtype, device = PAIRS[name], DTYPES[args.dtype], torch.device(args.device)
    batch, length = args.shape
    begin = time.perf_counter()
    torch.manual_seed(0)
    if impl == "fla":
        module, layer = fla(pair, args.width, device, dtype)
    else:
        module, layer = ours(pair, args.width, device, dtype, impl == "ours compiled")
    x = torch.randn(batch, length, args.width, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]

    def step() -> tuple[Tensor | None, ...]:
        return torch.autograd.grad(layer(x), leaves, dy, allow_unused=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return layer(x)

    step()
    clock.synchronize(device)
    found = {"parameters": sum(p.numel() for p in module.parameters()), "first_step_s": round(time.perf_counter() - begin, 2)}
    found |= {key: value for key, value in clock.measure(step, device, repeats=args.repeats, graph=args.graph).items() if key != "first_s"}
    found["tokens_per_s"] = round(batch * length / found["eager_ms"] * 1e3)
    forward()
    found["forward_ms"] = clock.median_ms(forward, device, args.repeats)
    found |= rows.compared(lambda: errors(name, impl, module, layer, args))
    return found | (footnote(pair) if impl == "fla" else {})


def table(results: list[dict[str, Any]]) -> str:
    """Milliseconds of a step side by side, and the largest errors."""
    heads = ("ours ms", "compiled", "FLA ms", "FLA/ours", "compiled")
    lines = [
        f"{'mixer':16s} {'parameters':>22s} {' '.join(f'{head:>9s}' for head in heads)} {'MiB':>13s} {'errors ours/compiled/FLA':>25s}"
    ]
    for name in dict.fromkeys(r["mixer"] for r in results):
        mine, compiled, peer = (
            {r["impl"]: r for r in results if r["mixer"] == name}.get(impl, {}) for impl in ("ours", "ours compiled", "fla")
        )
        times = [r.get("eager_ms") for r in (mine, compiled, peer)]
        ratios = [peer["eager_ms"] / t if t and "eager_ms" in peer else None for t in times[:2]]
        parameters = f"{mine.get('parameters', '-')}/{peer.get('parameters', '-')}"
        memory = f"{mine.get('peak_MiB', '-')}/{peer.get('peak_MiB', '-')}"
        numbers = [*(f"{t:9.3f}" if t else f"{'-':>9s}" for t in times), *(f"{r:9.2f}" if r else f"{'-':>9s}" for r in ratios)]
        worst = "/".join(f"{max(r['errors'].values()):.1e}" if r.get("errors") else "-" for r in (mine, compiled, peer))
        lines.append(f"{name:16s} {parameters:>22s} {' '.join(numbers)} {memory:>13s} {worst:>25s}")
    return "\n".join(lines)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", type=rows.chosen(list(PAIRS)), default=list(PAIRS), help="comma list of " + ", ".join(PAIRS))
    parser.add_argument("--impls", type=rows.chosen(IMPLS), default=list(IMPLS), help='comma list of "ours", "fla", "ours compiled"')
    parser.add_argument("--width", type=int, default=1024, help="channels of the residual stream (default %(default)s)")
    parser.add_argument("--shape", type=rows.batch_by_length, default=(8, 4096), help="batch x length (default 8x4096)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--graph", action="store_true", help="time a step as a CUDA graph too")
    parser.add_argument("--repeats", type=int, default=20, help="calls that a median is of (default %(default)s)")
    parser.add_argument("--device", default="cuda")
    tuning.add_arguments(parser)
    rows.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use; --device cpu runs tiny shapes to try the script out")
    if args.width % 128:
        parser.error(f"--width: expected a multiple of 128, got {args.width}")
    return args


def measured(name: str, impl: str, args: argparse.Namespace) -> dict[str, Any]:
    return tuning.ahead(functools.partial(measure, name, impl, args), args, tunes=impl == "fla")


def plan(args: argparse.Namespace) -> list[rows.Row]:
    batch, length = args.shape
    return [
        rows.Row(
            {"mixer": name, "width": args.width, "shape": f"{batch}x{length}", "dtype": args.dtype}, impl,
            lambda name=name, impl=impl: measured(name, impl, args),
        )
        for name in args.mixers for impl in args.impls
        if impl != "fla" or PAIRS[name].name
    ]  # fmt: skip


def main() -> None:
    args = parse()
    print(table(rows.run("layer", plan(args), args, args.device)))


if __name__ == "__main__":
    main()
