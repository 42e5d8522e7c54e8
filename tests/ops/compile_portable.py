"""Run in a process of its own by test_targets.py: compile kernels of rows with large tiles for some GPU, until shared memory is given out.

Arguments: compute capability, `hardware.room`, and calls of `CALLS`. Prints JSON, a line for each kernel: call, name, KiB of shared memory.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from gdn.core import device as hardware
from gdn.core.foresight import THREAD
from gdn.core.portable_launch import Launch, integer_kind, through_registers
from gdn.ops.attention import portable as rows
from gdn.ops.delta_channel.portable import channel_delta_rule
from gdn.ops.delta_product.portable import gated_delta_product
from gdn.ops.delta_rule.portable import gated_delta_rule
from gdn.ops.delta_step import portable as steps
from gdn.ops.linear_recurrence.portable import linear_attention
from gdn.ops.linear_recurrence.portable_value_gated import value_gated_linear_attention
from gdn.ops.projection import portable_few as few

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
Call = tuple[Callable[..., Any], dict[str, Tensor], dict[str, Any]]


def recurrence(row: Callable[..., Any], K: int, V: int, *, T: int = 2048, writes: int = 0) -> Call:
    """A row over one sequence with two heads, one of queries and keys where decays belong to heads."""
    decays = {channel_delta_rule: (K,), value_gated_linear_attention: (V,)}.get(row, ())
    heads, rule = 2 if decays else 1, row in (gated_delta_rule, gated_delta_product, channel_delta_rule)
    turned = row is value_gated_linear_attention
    each = (1, T, writes) if writes else (1, T)
    tensors = {
        "q": torch.empty(1, T, heads, K, dtype=torch.bfloat16),
        "k": torch.empty(*each, heads, K, dtype=torch.bfloat16),
        "v": torch.empty(*each, 2, V, dtype=torch.bfloat16),
        "g": torch.empty(1, T, 2, *decays),
        **({"beta": torch.empty(*each, 2)} if rule else {}),
        "initial_state": torch.empty(1, 2, *((V, K) if turned else (K, V))),
    }
    return row, tensors, {"scale": 0.5, "packing": None}


def step(row: Callable[..., Any], K: int, V: int, *, T: int = 1, writes: int = 0) -> Call:
    """Sequences with four heads of values and two of queries and keys."""
    decays = {steps.gated_linear_attention_step: (2, K), steps.value_gated_linear_attention_step: (4, V), steps.channel_delta_step: (4, K)}
    each = (2, T, writes) if writes else (2, T)
    tensors = {
        "q": torch.empty(2, T, 2, K, dtype=torch.bfloat16),
        "k": torch.empty(*each, 2, K, dtype=torch.bfloat16),
        "v": torch.empty(*each, 4, V, dtype=torch.bfloat16),
        "g": torch.empty(2, T, *decays.get(row, (4,))),
        **({"beta": torch.empty(*each, 4)} if "beta" in signature(row).parameters else {}),
        "state": torch.empty(9, 4, K, V),
        "slots": torch.empty(2, dtype=torch.int32),
    }
    return row, tensors, {"scale": 0.5}


def attention(D: int) -> Call:
    tensors = {name: torch.empty(1, 256, heads, D, dtype=torch.bfloat16) for name, heads in (("q", 2), ("k", 1), ("v", 1))}
    return (
        rows.windowed_sigmoid_attention,
        {**tensors, "slopes": torch.empty(2)},
        {"window": 100, "scale": 0.5, "start": None, "packing": None},
    )


def few_tokens(x: Tensor, gate: Tensor, norm_weight: Tensor, weight: Tensor, h: Tensor) -> None:
    """Each kernel of the row, with every tile that it has."""
    few.swiglu_linear(h[:2].repeat(1, 2), weight)
    few.gated_rms_norm_linear(x, gate, norm_weight, weight, 1e-5, True)
    for count in (16, 32, 64):
        few.linear(h[:count], weight)


def matrix() -> Call:
    shapes = {"x": (2, 4, 128), "gate": (2, 4, 128), "norm_weight": (128,), "weight": (96, 512), "h": (64, 512)}
    return few_tokens, {name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, {}


CALLS: dict[str, Callable[[], Call]] = {
    "rule 128": lambda: recurrence(gated_delta_rule, 128, 128),
    "crowded rule 128": lambda: recurrence(gated_delta_rule, 128, 256, T=128),
    "rule 200": lambda: recurrence(gated_delta_rule, 200, 400),
    "rule 256": lambda: recurrence(gated_delta_rule, 256, 512),
    "two writes 128": lambda: recurrence(gated_delta_product, 128, 128, T=1024, writes=2),
    "three writes 256": lambda: recurrence(gated_delta_product, 256, 512, T=700, writes=3),
    "four writes 200": lambda: recurrence(gated_delta_product, 200, 400, T=512, writes=4),
    "crowded four writes 128": lambda: recurrence(gated_delta_product, 128, 256, T=32, writes=4),
    "channel rule 128": lambda: recurrence(channel_delta_rule, 128, 128, T=128),
    "channel rule 256": lambda: recurrence(channel_delta_rule, 256, 512, T=128),
    "linear 256": lambda: recurrence(linear_attention, 256, 512),
    "value gated 256": lambda: recurrence(value_gated_linear_attention, 256, 256),
    "step 512": lambda: step(steps.gated_delta_step, 512, 512),
    "four steps 128": lambda: step(steps.gated_delta_step, 128, 128, T=4),
    "channel step 512": lambda: step(steps.channel_delta_step, 512, 512),
    "product step 512": lambda: step(steps.gated_delta_product_step, 512, 512, T=4, writes=4),
    "linear step 512": lambda: step(steps.linear_attention_step, 512, 512),
    "gated linear step 200": lambda: step(steps.gated_linear_attention_step, 200, 400),
    "value gated linear step 96": lambda: step(steps.value_gated_linear_attention_step, 96, 96),
    "few tokens": matrix,
    "sigmoid 128": lambda: attention(128),
    "sigmoid 256": lambda: attention(256),
    "long sigmoid 256": lambda: attention(256),
}


def launches(row: Callable[..., Any], tensors: dict[str, Tensor], rest: dict[str, Any]) -> list[Launch]:
    """What forward and backward would launch; a step has no backward, nor have few tokens."""
    THREAD.launches = found = []
    if "state" in tensors or row is few_tokens:
        row(**tensors, **rest)
        THREAD.launches = None
        return found
    leaves = {name: x.requires_grad_() for name, x in tensors.items()}
    results = row(**leaves, **rest)
    results = [results] if isinstance(results, Tensor) else [x for x in results if x.numel()]
    torch.autograd.grad(results, list(leaves.values()), [torch.zeros_like(x) for x in results])
    THREAD.launches = None
    return found


def source(what: Launch) -> ASTSource:
    """What Triton would compile: tensors are aligned, and integers it knows as `portable_launch` says."""
    signature, constants, known = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(what.kernel.params, what.args, strict=True)):
        kind = integer_kind(value) if isinstance(value, int) and not parameter.do_not_specialize else 0
        if parameter.is_constexpr or value is None or kind == 1:
            signature[parameter.name], constants[i,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], known[i,] = f"*{TYPES[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if kind == 16:
                known[i,] = [["tt.divisibility", 16]]
    return ASTSource(fn=what.kernel, signature=signature, constexprs=constants, attrs=known)


def shared_bytes(what: Launch, code: ASTSource, capability: int) -> int:
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": what.warps, "num_stages": what.stages, "maxnreg": what.registers})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = code.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    stages: dict[str, Any] = {}
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    backend.add_stages(stages, options, code.language)
    for name in ("ttir", "ttgir", "llir"):
        module = stages[name](module, metadata)
    return metadata["shared"]


def main(capability: int, room: int, *calls: str) -> None:
    hardware.capability = lambda index=0: capability
    hardware.room = lambda index=0: room
    hardware.multiprocessors = lambda index=0: 1 if crowded else 132
    for call in calls:
        crowded = call.startswith("crowded")
        rows.LONG_ROW = 0 if call.startswith("long") else 1 << 31
        seen = set()
        for what in launches(*CALLS[call]()):
            code = source(what)
            if (one := (code.hash(), what.warps)) not in seen:
                seen.add(one)
                with through_registers(0):
                    print(json.dumps([call, what.kernel.fn.__name__, shared_bytes(what, code, capability) / 1024]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
