"""Run in a process of its own by test_portable.py: translate every kernel that the rows launch to Triton's intermediate code, for sm_80.

The interpreter accepts Python that the compiler refuses (a name of another type after a branch, say). The rows run on tensors without
meaning on the CPU; where they would launch, the kernel is translated for exactly these arguments. Prints one line a kernel.
"""

from __future__ import annotations

import importlib
import json
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend

from gdn.ops import attention, delta_fused, delta_step, gates, loss, norm, projection, qkv, rotary, short_conv, state_space
from gdn.ops.attention.problems import Problem as Attention
from gdn.ops.delta_channel import problems as channels
from gdn.ops.delta_channel.portable import channel_delta_rule
from gdn.ops.delta_fused.problems import Problem as Core
from gdn.ops.delta_rule.problems import Problem as Rule
from gdn.ops.delta_step.problems import Problem as Step
from gdn.ops.gates.problems import Problem as Gate
from gdn.ops.linear_recurrence import portable_plan
from gdn.ops.linear_recurrence.portable import linear_attention
from gdn.ops.linear_recurrence.portable_gated import gated_linear_attention
from gdn.ops.linear_recurrence.portable_value_gated import value_gated_linear_attention
from gdn.ops.linear_recurrence.problems import Gates
from gdn.ops.linear_recurrence.problems import Problem as Linear
from gdn.ops.linear_step.problems import Problem as LinearStep
from gdn.ops.loss.problems import Problem as Loss
from gdn.ops.norm.problems import Problem as Norm
from gdn.ops.projection import portable_few
from gdn.ops.projection.problems import PROBLEMS as PROJECTIONS
from gdn.ops.qkv.problems import PROBLEMS as QKV
from gdn.ops.rotary.problems import PROBLEMS as ROTARY
from gdn.ops.sequences import portable as sequences
from gdn.ops.short_conv.problems import Problem as Conv
from gdn.ops.state_space.problems import PROBLEMS as STATE_SPACE

TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
TARGET = GPUTarget("cuda", 80, 32)
BACKEND = make_backend(TARGET)
_DONE: set[Any] = set()


def translate(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 1, registers: int | None = None, key: Any = None
) -> None:
    """In place of `gdn.core.portable_launch.launch`. A limit of registers is not the translator's."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    for i, (parameter, value) in enumerate(zip(kernel.params, args, strict=True)):
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, Tensor):
            signature[parameter.name] = f"*{TYPES[value.dtype]}"
            value.fill_(0)
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
    name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
    if (name, tuple(signature.values()), tuple(constants.values()), warps, stages) in _DONE:
        return
    _DONE.add((name, tuple(signature.values()), tuple(constants.values()), warps, stages))
    options = BACKEND.parse_options({"num_warps": warps, "num_stages": stages})
    context = ir.context()
    ir.load_dialects(context)
    BACKEND.load_dialects(context)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    source.make_ir(TARGET, options, BACKEND.get_codegen_implementation(options), BACKEND.get_module_map(), context)
    print(json.dumps([name]), flush=True)


def train(outputs: Any, arguments: dict[str, Any]) -> None:
    outputs = [outputs] if isinstance(outputs, Tensor) else [o for o in outputs if o.numel()]
    leaves = [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]
    torch.autograd.grad(outputs, leaves, [torch.zeros_like(o) for o in outputs], allow_unused=True)


def arguments_of(built: dict[str, Any]) -> dict[str, Any]:
    return {n: t.requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in built.items()}


def main() -> None:
    rows = {}
    for package in (attention, delta_fused, delta_step, gates, loss, norm, projection, qkv, rotary, short_conv, state_space):
        module = importlib.import_module(f"{package.__name__}.portable")
        module.launch = translate
        rows[package] = module
    portable_few.launch = translate
    dtype = torch.bfloat16
    for tokens in (1, 3):
        sizes = {"name": "", "B": 2, "T": tokens, "H": 1, "HV": 2, "K": 24, "V": 40, "slots": (1, 0), "pool": 2}
        x = Step(**sizes).build(dtype=dtype)
        rows[delta_step].gated_delta_step(**x, scale=0.5)
        rows[delta_step].gated_delta_step(**{**x, "slots": None}, scale=0.5)
        rows[delta_step].channel_delta_step(**Step(**sizes).build_channel(dtype=dtype), scale=0.5)
        rows[delta_step].gated_delta_product_step(**Step(**sizes).build_product(dtype=dtype), scale=0.5)
        rows[delta_step].linear_attention_step(**LinearStep(**sizes).build("head", dtype=dtype), scale=0.5)
        rows[delta_step].gated_linear_attention_step(**LinearStep(**sizes).build("key", dtype=dtype), scale=0.5)
        rows[delta_step].value_gated_linear_attention_step(**LinearStep(**sizes).build("value", dtype=dtype), scale=0.5)
    for conv in (
        Conv(name="", B=2, T=9, D=40, bias=True, state=True),
        Conv(name="", T=9, D=40, state=True, lengths=(4, 5)),
        Conv(name="", T=9, D=40, W=1, silu=False, lengths=(4, 5)),
    ):
        x = arguments_of(conv.build(dtype=dtype))
        train(rows[short_conv].causal_conv1d(**x), x)
    x = conv.build(dtype=dtype)
    for slots in (None, torch.tensor([0])):
        state = torch.zeros(1, 3, 40, dtype=dtype)
        rows[short_conv].causal_conv1d_step(x["x"], torch.zeros(40, 4, dtype=dtype), state, None, "silu", slots)
    x = arguments_of(Norm(name="", shape=(7, 24)).build(dtype=dtype))
    train(rows[norm].l2norm(x["x"], 1e-6), x)
    train(rows[norm].rms_norm(x["x"], x["weight"], 1e-6), x)
    y = arguments_of(Norm(name="", shape=(7, 24)).build_add(dtype=dtype))
    train(rows[norm].add_rms_norm(**y, eps=1e-6), y)
    for silu in (True, False):
        train(rows[norm].gated_rms_norm(**x, eps=1e-6, silu=silu), x)
    for matrix in PROJECTIONS[:2]:
        x = arguments_of(matrix.build_swiglu(dtype=dtype))
        train(rows[projection].swiglu_linear(**x), x)
        x = arguments_of(matrix.build_norm(dtype=dtype))
        train(rows[projection].gated_rms_norm_linear(**x, eps=1e-5, silu=True), x)
        with torch.no_grad():
            rows[projection].gated_rms_norm_linear(**x, eps=1e-5, silu=True)
    for problem in QKV[:4]:
        x = arguments_of(problem.build(dtype=dtype))
        train(rows[qkv].convolved_qkv(**x), x)
    x = arguments_of(Gate(name="", T=5, HV=3).build_decay(dtype=dtype))
    train(rows[gates].decay_gate(**x), x)
    x = arguments_of(Gate(name="", T=5, HV=3).build_write(dtype=dtype))
    train(rows[gates].write_gate(**x), x)
    for turns in ROTARY[:2]:
        x = turns.build(dtype=dtype)
        train(rows[rotary].rotary_embedding(**x), x)
    for parts in STATE_SPACE[:2]:
        x = parts.build_scale(dtype=dtype)
        train(rows[state_space].scale_heads(**x), x)
        x = parts.build_norm(dtype=dtype)
        train(rows[state_space].skip_gated_rms_norm(**x), x)
    for reduction in ("mean", "none"):
        x = arguments_of(Loss(name="", tokens=(9,), D=8, vocab=30).build(dtype=dtype))
        train(rows[loss].linear_cross_entropy(**x, ignore_index=-100, reduction=reduction), x)
    x = arguments_of(Core(name="", T=5, H=1, HV=2, K=8, V=8).build(dtype=dtype))
    parameters = x["gates"]
    prepared = rows[delta_fused]._PREPARE(x["q"], x["k"], x["a"], x["b"], parameters.A_log, parameters.dt_bias, 1.0)
    train(prepared, x)
    for attend in (
        Attention(name="", T=9, H=2, window=3),
        Attention(name="", T=9, H=2, window=3, lengths=(4, 5)),
        Attention(name="", T=9, window=3, past=2, start=(3,)),
    ):
        x = arguments_of(attend.build(slopes=True, dtype=dtype))
        packing = x.pop("packing", None)
        train(rows[attention].windowed_sigmoid_attention(**{"start": None, **x}, scale=0.5, packing=packing), x)
    sequences.launch = translate
    portable_plan.segment_chunks = lambda *sizes: 1
    kinds: list[tuple[Gates, Any]] = [("head", linear_attention), ("key", gated_linear_attention), ("value", value_gated_linear_attention)]
    for kind, row in kinds:
        x = arguments_of(Linear(name="", T=5, HV=2, K=8, V=8, lengths=(3, 2), initial=True).build(kind, dtype=dtype))
        train(row(**x, scale=0.5), x)
    x = arguments_of(channels.Problem(rule=Rule(name="", T=5, HV=2, K=8, V=8, initial=True)).build(dtype=dtype))
    train(channel_delta_rule(**x, scale=0.5, packing=None), x)


if __name__ == "__main__":
    main()
