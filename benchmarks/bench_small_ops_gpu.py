"""The operators around the gated delta rule on a GPU: right against float64, then timed. `python benchmarks/bench_small_ops_gpu.py --help`

Each row: the largest relative error of outputs and gradients against the float64 reference on a small problem, beside that of plain torch at
the same dtype; then medians of eager calls and of CUDA-graph replays with the L2 cache flushed, and the bytes that must move over the graph's
time as a share of the measured copy bandwidth. With `--peers` FLA's functions stand below those operators that it has, too; in both rows the
errors are then those of the first output and its gradients, since not all of FLA's functions have the others, and ours have one of all results
(`whole_error`) besides.

"host" is what an eager call takes the host by the clock: the median of twenty in a row behind a busy GPU, and apart from it the first of them,
after a wait in which the processor's caches have gone cold. Of rows with gradients the file also has the forward alone, recorded for autograd.
"bare" is what the same launches of the same compiled kernels take one after another through Triton's launcher, with no tensor looked at or
allocated: replays (gdn/core/portable_plan.py) hand all to the driver in one call instead. The rows of torch launch one kernel each, for comparison. Without peers all take two minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("FLA_FLASH_QLA", "0")  # FLA's own kernels, not those of a package that it calls
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import rows
import torch
import torch.nn.functional as F
import tuning
from torch import Tensor

from gdn import ops
from gdn.core import portable_launch
from gdn.core.dispatch import use
from gdn.core.packing import Packing
from gdn.core.replay_known import forget

bf16, f32 = torch.bfloat16, torch.float32
Call = Callable[[], Any]
LAG = 20_000_000
"""Cycles that the GPU is kept busy with while the host is measured: some 10 ms."""


@dataclasses.dataclass
class Row:
    """One measurement: a call to time, the bytes that it must move, and a small problem of the same kind to check."""

    name: str
    op: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    moved: int
    backward: bool = False
    small: Callable[[], dict[str, Any]] | None = None
    flops: int = 0
    """Of matrix products, where they take the time."""


def normal(*shape: int, dtype: torch.dtype = bf16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def size(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


STEPS = [(B, 1, storage, 0) for storage in (f32, bf16) for B in (1, 32, 256)] + [(256, 1, f32, 300), (32, 4, f32, 0)]
"""Sequences, tokens of each, what memories are stored in, and memories of a pool."""


def steps() -> list[Row]:
    found = []
    for B, T, storage, pool in STEPS:

        def make(B: int = B, T: int = T, storage: torch.dtype = storage, pool: int = pool, HV: int = 32) -> dict[str, Any]:
            H, K, V = HV // 2, 128, 128
            q, k = (torch.nn.functional.normalize(normal(B, T, H, K, dtype=f32), dim=-1).to(bf16) for _ in range(2))
            slots = torch.randperm(pool, device="cuda")[:B].int() if pool else None
            state = normal(pool or B, HV, K, V, dtype=f32).to(storage)
            g, beta = -0.1 * torch.rand(B, T, HV, device="cuda"), torch.rand(B, T, HV, device="cuda")
            return {"q": q, "k": k, "v": normal(B, T, HV, V), "g": g, "beta": beta, "state": state, "slots": slots}

        x = make()
        used = 2 * x["state"][:1].numel() * x["state"].element_size() * B
        moved = used + size(x["q"], x["k"], x["v"], x["v"], x["g"], x["beta"])
        name = f"step B={B} T={T} {str(storage)[6:]}{' slots' if pool else ''}"
        small = lambda make=make, T=T, storage=storage, pool=pool: make(3, T, storage, 5 if pool else 0, 4)  # noqa: E731
        found.append(Row(name, "gated_delta_step", ops.gated_delta_step, x, moved, small=small))
    return found


def other_steps() -> list[Row]:
    """Without the delta rule, with a decay a channel, with several writes a token."""
    found = []
    for kind, op, writes, gate in (
        ("linear", "linear_attention_step", 0, ""),
        ("gated linear", "gated_linear_attention_step", 0, "key"),
        ("value gated linear", "value_gated_linear_attention_step", 0, "value"),
        ("channel", "channel_delta_step", 0, "value"),
        ("product", "gated_delta_product_step", 2, ""),
    ):

        def make(B: int = 32, HV: int = 32, op: str = op, writes: int = writes, gate: str = gate) -> dict[str, Any]:
            H, K, V, each = HV // 2, 128, 128, (B, 1, writes) if writes else (B, 1)
            q, k = (torch.nn.functional.normalize(normal(*s, H, K, dtype=f32), dim=-1).to(bf16) for s in ((B, 1), each))
            gates = {"": (HV,), "key": (H, K), "value": (HV, V)}[gate]
            strength = {"beta": torch.rand(*each, HV, device="cuda")} if "delta" in op else {}
            g, v = -0.1 * torch.rand(B, 1, *gates, device="cuda"), normal(*each, HV, V)
            return {"q": q, "k": k, "v": v, "g": g, **strength, "state": normal(B, HV, K, V, dtype=f32)}

        x = make()
        moved = size(*x.values(), x["state"]) + 2 * size(x["q"])  # o has two heads for each of q
        name = f"{kind} step B=32{f' {writes} writes' if writes else ''}"
        small = lambda make=make: make(3, 4)  # noqa: E731
        found.append(Row(name, op, getattr(ops, op), x, moved, small=small))
    return found


def convolutions() -> list[Row]:
    found = []
    D = 8192
    for B, T, backward, documents in ((8, 4096, False, 0), (8, 4096, True, 0), (1, 32768, True, 8), (1, 4096, False, 0)):

        def make(B: int = B, T: int = T, D: int = D, documents: int = documents) -> dict[str, Any]:
            packing = Packing.from_lengths([T // documents] * documents, device="cuda") if documents else None
            return {"x": normal(B, T, D), "weight": normal(D, 4) / 2, "activation": "silu", "packing": packing}

        x = make()
        moved = size(x["x"]) * (5 if backward else 2)
        name = f"conv {B}x{T}x{D}{' packed' if documents else ''}{' fwd+bwd' if backward else ''}"
        small = lambda make=make, documents=documents: make(2 - bool(documents), 96, 48, min(documents, 4))  # noqa: E731
        found.append(Row(name, "causal_conv1d", ops.causal_conv1d, x, moved, backward, small))
    for B in (1, 32, 256):

        def step(B: int = B, D: int = D) -> dict[str, Any]:
            return {"x": normal(B, 1, D), "weight": normal(D, 4), "state": normal(B, 3, D), "activation": "silu"}

        x = step()
        moved = size(x["x"], x["x"], x["weight"], x["state"], x["state"])
        small = lambda step=step: step(3, 48)  # noqa: E731
        found.append(Row(f"conv step B={B}", "causal_conv1d_step", ops.causal_conv1d_step, x, moved, small=small))
    return found


def norms() -> list[Row]:
    found = []
    for op, shape in (("l2norm", (8, 4096, 16, 128)), ("gated_rms_norm", (8, 4096, 32, 128)), ("rms_norm", (8, 4096, 2048))):
        for backward in (False, True):

            def make(op: str = op, shape: tuple[int, ...] = shape) -> dict[str, Any]:
                arguments = {"x": normal(*shape)}
                if op == "gated_rms_norm":
                    arguments["gate"] = normal(*shape)
                if op != "l2norm":
                    arguments["weight"] = normal(shape[-1], dtype=f32)
                return arguments

            x = make()
            per_pass = {"l2norm": (2, 5), "rms_norm": (2, 5), "gated_rms_norm": (3, 8)}[op][backward]
            small = lambda make=make, op=op, shape=shape: make(op, (2, 33, shape[-1]))  # noqa: E731
            name = f"{op} {'x'.join(map(str, shape))}{' fwd+bwd' if backward else ''}"
            found.append(Row(name, op, getattr(ops, op), x, size(x["x"]) * per_pass, backward, small))
    return found


def gates() -> list[Row]:
    found = []
    for backward in (False, True):

        def decay(T: int = 4096) -> dict[str, Any]:
            rate, bias = torch.rand(32, device="cuda"), torch.rand(32, device="cuda") - 4
            return {"a": normal(8, T, 32), "A_log": rate, "dt_bias": bias}

        def write(T: int = 4096) -> dict[str, Any]:
            return {"b": normal(8, T, 32)}

        x, y = decay(), write()
        moved = size(x["a"]) * (3 + 4 * backward)
        more = " fwd+bwd" if backward else ""
        found.append(Row(f"decay gate 8x4096x32{more}", "decay_gate", ops.decay_gate, x, moved, backward, lambda decay=decay: decay(50)))
        found.append(Row(f"write gate 8x4096x32{more}", "write_gate", ops.write_gate, y, moved, backward, lambda write=write: write(50)))
    return found


def losses() -> list[Row]:
    def make(tokens: int = 16384, D: int = 2048, vocab: int = 32000) -> dict[str, Any]:
        targets = torch.randint(vocab, (tokens,), device="cuda")
        targets[::7] = -100
        return {"x": normal(tokens, D), "weight": normal(vocab, D) / D**0.5, "targets": targets}

    found = []
    for backward in (False, True):
        x, flops = make(), (6 if backward else 2) * 16384 * 2048 * 32000
        name = f"loss 16384 x 2048 x 32000{' fwd+bwd' if backward else ''}"
        found.append(Row(name, "linear_cross_entropy", ops.linear_cross_entropy, x, 0, backward, lambda: make(90, 64, 300), flops))
    return found


def fused() -> list[Row]:
    """What layers call beside the recurrences: each more than one step of a formula in a pass."""

    def qkv(T: int = 4096, H: int = 16, K: int = 128) -> dict[str, Any]:
        return {"x": normal(8, T, 4 * H * K), "weight": normal(4 * H * K, 4) / 2, "heads": H, "head_dim": K}

    def swiglu(T: int = 4096, N: int = 5632, M: int = 2048) -> dict[str, Any]:
        return {"x": normal(8, T, 2 * N), "weight": normal(M, N) / N**0.5}

    def gated(T: int = 4096, H: int = 16, D: int = 128, M: int = 2048) -> dict[str, Any]:
        x, gate = normal(8, T, H, D), normal(8, T, H, D)
        return {"x": x, "gate": gate, "norm_weight": normal(D, dtype=f32), "weight": normal(M, H * D) / (H * D) ** 0.5}

    def added(T: int = 4096, D: int = 2048) -> dict[str, Any]:
        return {"x": normal(8, T, D), "residual": normal(8, T, D), "weight": normal(D, dtype=f32)}

    def rotary(T: int = 4096, H: int = 16, K: int = 128) -> dict[str, Any]:
        angles = torch.arange(T, device="cuda")[:, None] * torch.rand(K // 2, device="cuda")
        return {"x": normal(8, T, H, K), "cos": angles.cos(), "sin": angles.sin()}

    def scaled(T: int = 4096, H: int = 32, P: int = 64) -> dict[str, Any]:
        return {"x": normal(8, T, H, P), "factor": torch.rand(8, T, H, device="cuda")}

    def skipped(T: int = 4096, H: int = 32, P: int = 64) -> dict[str, Any]:
        y, x, gate = normal(8, T, H, P), normal(8, T, H, P), normal(8, T, H * P)
        return {"y": y, "x": x, "D": normal(H, dtype=f32), "gate": gate, "weight": normal(H * P, dtype=f32)}

    tokens, kinds = 8 * 4096, (
        ("convolved qkv", ops.convolved_qkv, qkv, (20, 2, 16), (2, 5), 0),
        ("swiglu linear", ops.swiglu_linear, swiglu, (20, 48, 32), (0, 0), 2 * 5632 * 2048),
        ("gated norm linear", ops.gated_rms_norm_linear, gated, (20, 2, 16, 32), (0, 0), 2 * 2048 * 2048),
        ("add, rms_norm", ops.add_rms_norm, added, (20, 48), (4, 8), 0),
        ("rotary", ops.rotary_embedding, rotary, (20, 2, 16), (2, 4), 0),
        ("scale heads", ops.scale_heads, scaled, (20, 2, 16), (2, 5), 0),
        ("skip, gate, norm", ops.skip_gated_rms_norm, skipped, (20, 2, 16), (4, 11), 0),
    )  # fmt: skip
    found = []
    for name, op, make, few, passes, flops in kinds:
        for backward in (False, True):
            x = make()
            largest = max(size(each) for each in x.values() if isinstance(each, Tensor))
            moved = passes[backward] * largest
            small = lambda make=make, few=few: make(*few)  # noqa: E731
            full = f"{name} 8x4096{' fwd+bwd' if backward else ''}"
            found.append(Row(full, op.__name__, op, x, moved, backward, small, tokens * flops * (1 + 2 * backward)))
    return found


def few_tokens() -> list[Row]:
    """Matrices as decoding multiplies them, with what stands before: reading them is what takes the time."""
    found = []
    for B in (1, 8, 64):

        def swiglu(B: int = B, N: int = 5632, M: int = 2048) -> dict[str, Any]:
            return {"x": normal(B, 1, 2 * N), "weight": normal(M, N) / N**0.5}

        def gated(B: int = B, H: int = 16, D: int = 128, M: int = 2048) -> dict[str, Any]:
            x, gate = normal(B, 1, H, D), normal(B, 1, H, D)
            return {"x": x, "gate": gate, "norm_weight": normal(D, dtype=f32), "weight": normal(M, H * D) / (H * D) ** 0.5}

        for name, op, make in (("swiglu linear", ops.swiglu_linear, swiglu), ("gated norm linear", ops.gated_rms_norm_linear, gated)):
            x = make()
            found.append(Row(f"{name} {B} tokens" if B > 1 else f"{name} 1 token", op.__name__, op, x, size(*x.values()), small=make))
    return found


def recurrences() -> list[Row]:
    """Those beside the gated delta rule."""
    found = []
    for op, gates, writes in (
        (ops.linear_attention, "", 0), (ops.gated_linear_attention, "key", 0), (ops.value_gated_linear_attention, "value", 0),
        (ops.channel_delta_rule, "key", 1), (ops.gated_delta_product, "", 2), (ops.gated_delta_product, "", 4),
    ):  # fmt: skip
        for backward in (False, True):

            def make(B: int = 8, T: int = 4096, H: int = 16, K: int = 128, gates: str = gates, writes: int = writes) -> dict[str, Any]:
                each = (B, T, writes) if writes > 1 else (B, T)
                q, k = (torch.nn.functional.normalize(normal(*s, H, K, dtype=f32), dim=-1).to(bf16) for s in ((B, T), each))
                strength = {"beta": torch.rand(*each, H, device="cuda")} if writes else {}
                g = -0.1 * torch.rand(B, T, H, *((K,) if gates else ()), device="cuda")
                return {"q": q, "k": k, "v": normal(*each, H, K), "g": g, **strength}

            x = make()
            more = f" {writes} writes" if writes > 2 else ""
            name = f"{op.__name__.replace('_', ' ')} 8x4096{more}{' fwd+bwd' if backward else ''}"
            moved = (1 + 2 * backward) * size(*x.values(), x["q"])
            small = lambda make=make: make(1, 100, 2, 32)  # noqa: E731
            found.append(Row(name, op.__name__, op, x, moved, backward, small))
    return found


def attentions() -> list[Row]:
    """Heads as the recurrences above have them; a score of a pair and what is read with it are two products, their gradients five."""
    found = []
    for backward in (False, True):

        def make(B: int = 8, T: int = 4096, H: int = 16, K: int = 128, window: int = 1024) -> dict[str, Any]:
            q, k, v = (normal(B, T, H, K) for _ in range(3))
            return {"q": q, "k": k, "v": v, "slopes": torch.rand(H, device="cuda") / 8, "window": window}

        x = make()
        B, T, H, K = x["q"].shape
        pairs = sum(min(t + 1, x["window"]) for t in range(T))
        flops = (7 if backward else 2) * 2 * B * H * K * pairs
        name = f"windowed sigmoid attention 8x4096{' fwd+bwd' if backward else ''}"
        op = ops.windowed_sigmoid_attention
        found.append(Row(name, op.__name__, op, x, 0, backward, lambda make=make: make(1, 100, 2, 32, 40), flops))
    return found


def cores() -> list[Row]:
    found = []
    for B, T, H, HV, backward in ((8, 4096, 16, 32, False), (8, 4096, 16, 32, True), (1, 512, 2, 8, False), (1, 512, 2, 8, True)):

        def make(B: int = B, T: int = T, H: int = H, HV: int = HV, K: int = 128) -> dict[str, Any]:
            parameters = ops.GateParameters(torch.rand(HV, device="cuda"), torch.rand(HV, device="cuda") - 4)
            q, k, v, a, b = normal(B, T, H, K), normal(B, T, H, K), normal(B, T, HV, K), normal(B, T, HV), normal(B, T, HV)
            return {"q": q, "k": k, "v": v, "a": a, "b": b, "gates": parameters}

        x = make()
        moved = (1 + 2 * backward) * size(x["q"], x["k"], x["v"], x["v"])
        name = f"core {B}x{T} {H}/{HV}{' fwd+bwd' if backward else ''}"
        found.append(Row(name, "delta_core", ops.delta_core, x, moved, backward, lambda make=make: make(1, 100, 2, 4, 64)))
    return found


def rules() -> list[Row]:
    """A prompt short enough for the host to be what an eager call waits for."""
    found = []
    for backward in (False, True):

        def make(B: int = 1, T: int = 512, H: int = 2, HV: int = 8, K: int = 128) -> dict[str, Any]:
            q, k = (torch.nn.functional.normalize(normal(B, T, H, K), dim=-1) for _ in range(2))
            g, beta = -torch.rand(B, T, HV, device="cuda"), torch.rand(B, T, HV, device="cuda")
            return {"q": q, "k": k, "v": normal(B, T, HV, K), "g": g, "beta": beta}

        x = make()
        name = f"rule 1x512 2/8{' fwd+bwd' if backward else ''}"
        moved = (1 + 2 * backward) * size(x["q"], x["k"], x["v"], x["v"])
        found.append(Row(name, "gated_delta_rule", ops.gated_delta_rule, x, moved, backward, lambda make=make: make(1, 100, 2, 4, 64)))
    return found


def change(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A tensor or GateParameters with every floating tensor changed."""
    if isinstance(value, Tensor):
        return function(value) if value.dtype.is_floating_point else value
    if isinstance(value, ops.GateParameters):
        return dataclasses.replace(value, A_log=change(value.A_log, function), dt_bias=change(value.dt_bias, function))
    return value


FIXED = ("cos", "sin")
"""Arguments that have no gradient."""


def leaves_of(arguments: dict[str, Any]) -> list[Tensor]:
    found = [v for n, v in arguments.items() if isinstance(v, Tensor) and v.dtype.is_floating_point and n not in FIXED]
    for value in arguments.values():
        if isinstance(value, ops.GateParameters):
            found += [value.A_log, value.dt_bias]
    return found


def chosen(row: Row, impl: str) -> AbstractContextManager[Any]:
    """Within it a call of the row's operator runs this implementation; what stands beside it is no row of its table."""
    return nullcontext() if impl == "fla" else use(**{row.op: impl})


def results(row: Row, arguments: dict[str, Any], impl: str, *, wide: bool = False, first: bool = False) -> list[Tensor]:
    """Outputs, then the state or gradients; with `first` the first output alone and its gradients."""
    arguments = {n: change(v, lambda t: (t.double() if wide else t).detach().clone()) for n, v in arguments.items()}
    in_place = "state" in arguments
    leaves = [] if in_place else [leaf.requires_grad_() for leaf in leaves_of(arguments)]
    with chosen(row, impl), torch.set_grad_enabled(not in_place):
        outputs = row.call(**arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)[: 1 if first else None]
    if in_place:
        return outputs if first else [*outputs, arguments["state"]]
    generator = torch.Generator("cuda").manual_seed(1)
    slopes = [torch.randn(o.shape, generator=generator, device="cuda").bfloat16().to(o.dtype) for o in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, slopes)]


def error(actual: list[Tensor], truth: list[Tensor]) -> float:
    worst = 0.0
    for a, b in zip(actual, truth, strict=True):
        if not bool(a.isfinite().all()):
            return float("inf")
        worst = max(worst, float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm().clamp(min=1e-30)))
    return worst


def check(row: Row, impl: str, plain: str, *, first: bool) -> dict[str, Any]:
    """Errors of what `impl` finds, with `first` those of the first output and its gradients alone, and of what `plain` does, if there is
    such a row. Ours are compared whole all the same, and all results have the same bits."""
    assert row.small is not None
    torch.manual_seed(0)
    arguments = row.small()
    reference = dataclasses.replace(row, call=getattr(ops, row.op))

    def errors(first: bool) -> tuple[dict[str, float], bool]:
        truth = results(reference, arguments, "reference", wide=True, first=first)
        actual, again = (results(row, arguments, impl, first=first) for _ in range(2))
        found = {"error": error(actual, truth)}
        if plain:
            found["plain_error"] = error(results(row, arguments, plain, first=first), truth)
        return found, all(torch.equal(a, b) for a, b in zip(actual, again))

    found, same = errors(first)
    if first and impl != "fla":
        whole, same = errors(False)
        found["whole_error"] = whole["error"]
    return {**found, "same_bits": same}


def of_fla() -> dict[str, Callable[..., Any]]:
    """FLA's functions of our arguments, by the operator that they stand beside."""
    from fla.modules.activations import swiglu_linear
    from fla.modules.causal_conv1d.ops import causal_conv1d, causal_conv1d_update
    from fla.modules.fused_linear_cross_entropy.ops import fused_linear_cross_entropy_loss
    from fla.modules.norm.fused_norm_gate import rms_norm_gated
    from fla.modules.norm.l2norm import l2norm
    from fla.modules.norm.layernorm import rms_norm
    from fla.modules.rotary.ops import rotary_embedding
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
    from fla.ops.gated_delta_rule.gate import fused_gdn_gate

    @functools.cache
    def bounds(packing: Packing | None) -> Tensor | None:
        """The same tensor at every call: what FLA makes of it waits for the GPU, and is kept for this very tensor."""
        return None if packing is None else packing.cu_seqlens.long()

    def convolution(x: Tensor, weight: Tensor, activation: str, packing: Packing | None) -> Tensor:
        return causal_conv1d(x, weight, activation=activation, cu_seqlens=bounds(packing))[0]

    @functools.cache
    def inputs_of(state: Tensor) -> Tensor:
        """[B, D, W]: channels first, and a place for the input to come."""
        return F.pad(state.transpose(1, 2), (1, 0)).contiguous()

    def convolution_step(x: Tensor, weight: Tensor, state: Tensor, activation: str) -> Tensor:
        return causal_conv1d_update(x, inputs_of(state), weight=weight, activation=activation)[0]

    def core(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, gates: ops.GateParameters) -> Tensor:
        inside = {"use_qk_l2norm_in_kernel": True, "use_gate_in_kernel": True, "use_beta_sigmoid_in_kernel": True}
        return chunk_gated_delta_rule(q, k, v, a, b, A_log=gates.A_log, dt_bias=gates.dt_bias, **inside)[0]

    def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, slots: None) -> Any:
        return fused_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)

    @functools.cache
    def narrow(angles: Tensor) -> Tensor:
        """The dtype of x, as FLA's layer keeps them."""
        return angles.bfloat16()

    def swiglu(x: Tensor, weight: Tensor) -> Tensor:
        return swiglu_linear(*x.chunk(2, -1), weight, None)

    return {
        "gated_delta_step": step,
        "gated_delta_rule": lambda **arguments: chunk_gated_delta_rule(**arguments)[0],
        "delta_core": core,
        "decay_gate": lambda a, A_log, dt_bias: fused_gdn_gate(a, A_log, dt_bias),
        "causal_conv1d": convolution,
        "causal_conv1d_step": convolution_step,
        "l2norm": l2norm,
        "rms_norm": lambda x, weight: rms_norm(x, weight, None, eps=1e-5),
        "gated_rms_norm": lambda x, gate, weight: rms_norm_gated(x, gate, weight, None, eps=1e-5),
        "rotary_embedding": lambda x, cos, sin: rotary_embedding(x, narrow(cos), narrow(sin)),
        "swiglu_linear": swiglu,
        "linear_cross_entropy": lambda x, weight, targets: fused_linear_cross_entropy_loss(x, targets, weight),
    }


def call_of(row: Row, *, forward: bool = False) -> Call:
    """A call to time; with `forward` without the backward pass that it is recorded for."""
    if not row.backward:  # nothing requires a gradient
        return lambda: row.call(**row.arguments)
    arguments = {n: v if n in FIXED else change(v, lambda t: t.detach().requires_grad_()) for n, v in row.arguments.items()}
    leaves = leaves_of(arguments)
    slopes: list[Tensor] = []

    def training() -> Any:
        outputs = row.call(**arguments)
        first = outputs if isinstance(outputs, Tensor) else outputs[0]
        if forward:
            return first
        if not slopes:
            slopes.append(torch.randn_like(first))
        return torch.autograd.grad(first, leaves, slopes[0])

    return training


def median_ms(run: Call, flush: Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        flush.zero_()
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        run()
        b.record()
        times.append((a, b))
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in times)


def waits(call: Call) -> bool:
    """Whether a call waits for the GPU, as plain torch does where it looks at a value: a capture fails, and spoils what comes after it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as problem:
        if "synchronizing" not in str(problem):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def captured(call: Call) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def host(call: Call, calls: int = 20, repeats: int = 15) -> dict[str, float]:
    """What one of `calls` eager calls in a row takes the host while the GPU lags behind, as in a loop that keeps the GPU busy, and what the
    first of them takes after the host has waited: microseconds by the clock, medians."""
    bursts = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda._sleep(LAG)
        marks = [time.perf_counter()]
        for _ in range(calls):
            call()
            marks.append(time.perf_counter())
        bursts.append([1e6 * (end - start) for start, end in itertools.pairwise(marks)])
    torch.cuda.synchronize()
    return {"host_us": statistics.median(itertools.chain(*bursts)), "host_first_us": statistics.median(burst[0] for burst in bursts)}


def bare(call: Call) -> dict[str, float]:
    """How many kernels a call launches, and what handing those to the driver again takes the host, at the addresses of that time."""
    launched: list[tuple[Any, ...]] = []
    launch = portable_launch._launch

    def written_down(what: portable_launch.Launch, grid: tuple[int, ...], device: int) -> Any:
        compiled = launch(what, grid, device)
        start, between, packed = portable_launch.starter(compiled)
        arguments = what.name(device)[1]
        launched.append((start, (*grid, 1, 1)[:3], between, [tuple(arguments)] if packed else arguments))
        return compiled

    forget()
    portable_launch._launch = written_down
    try:
        call()
    finally:
        portable_launch._launch = launch
    stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
    ready = [functools.partial(start, *grid, stream, *between, *arguments) for start, grid, between, arguments in launched]
    return {"launches": len(ready), "bare_us": host(lambda: [start() for start in ready])["host_us"]}


def of_torch(flush: Tensor, repeats: int, wanted: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Calls of torch that launch one kernel forward, and one or two backward: those with a wanted name."""
    x, y, w = normal(8, 4096, 2048).requires_grad_(), normal(8, 4096, 2048), normal(2048).requires_grad_()
    wide, eight, narrowing, square = normal(8, 4096, 5632), normal(8, 5632), normal(2048, 5632), normal(2048, 2048)
    calls: dict[str, Call] = {
        "torch.add 8x4096x2048": lambda: torch.add(y, y),
        "torch linear 8x4096, 5632 to 2048": lambda: F.linear(wide, narrowing),
        "torch linear 8x4096, 2048 to 2048": lambda: F.linear(y, square),
        "torch linear 8 tokens, 5632 to 2048": lambda: F.linear(eight, narrowing),
        "torch silu 8x4096x2048": lambda: F.silu(y),
        "torch silu 8x4096x2048 fwd+bwd": lambda: torch.autograd.grad(F.silu(x), x, y),
        "torch rms_norm 8x4096x2048": lambda: F.rms_norm(y, (2048,), w.detach()),
        "torch rms_norm 8x4096x2048 fwd+bwd": lambda: torch.autograd.grad(F.rms_norm(x, (2048,), w), (x, w), y),
    }
    found = {}
    for name, call in calls.items():
        if not wanted(name):
            continue
        for _ in range(3):
            call()
        found[name] = {"impl": "torch", "eager_ms": median_ms(call, flush, repeats)} | host(call)
    return found


def copy_bandwidth(flush: Tensor) -> float:
    """Bytes a second of a device copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / (1e-3 * median_ms(lambda: target.copy_(source), flush, 10))


def measure(row: Row, impl: str, flush: Tensor, bandwidth: float, repeats: int) -> dict[str, Any]:
    with chosen(row, impl):
        call = call_of(row)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        first = time.perf_counter() - start
        for _ in range(2):
            call()
        found = {"impl": impl, "first_s": first, "eager_ms": median_ms(call, flush, repeats)} | host(call)
        if row.backward:
            found["host_forward_us"] = host(call_of(row, forward=True))["host_us"]
        if impl == "portable":
            found |= bare(call)
        if impl == "portable" or (impl == "fla" and not waits(call)):
            found["graph_ms"] = median_ms(captured(call), flush, repeats)
    best = found.get("graph_ms", found["eager_ms"])
    if row.moved:
        found |= {"GB_s": row.moved / best / 1e6, "of_copy": row.moved / best / 1e-3 / bandwidth}
    if row.flops:
        found["TFLOP_s"] = row.flops / best / 1e9
    return found


def sweep(only: str, flush: Tensor, bandwidth: float) -> None:
    """The steps whose name contains `only` over columns and warps of a program, to check the rule that chooses them."""
    from gdn.ops.delta_step import portable

    rule = portable.block
    for row in [r for r in steps() if "slots" not in r.name and only in r.name]:
        for columns in (16, 32, 64, 128):
            for warps in (1, 2, 4, 8):
                portable.block = lambda *_, c=columns, w=warps: (c, w)  # type: ignore[assignment]
                found = measure(row, "portable", flush, bandwidth, 10)
                print(
                    f"{row.name:28s} columns {columns:3d} warps {warps} {1e3 * found['graph_ms']:8.1f} us {found['of_copy']:6.1%}",
                    flush=True,
                )
    portable.block = rule


PLAIN = {
    **dict.fromkeys(("linear_cross_entropy", "windowed_sigmoid_attention"), "chunked"),
    **dict.fromkeys(("delta_core", "convolved_qkv"), "composed"),
    **dict.fromkeys(("gated_delta_rule", "gated_delta_product", "channel_delta_rule"), "chunked"),
    **dict.fromkeys(("linear_attention", "gated_linear_attention", "value_gated_linear_attention"), "chunked"),
}
"""The row in plain torch that an operator's errors stand beside, where it is not called "torch"."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="", help="folder for bench_small_ops.jsonl")
    parser.add_argument("--only", default="", help="rows whose name contains one of these, a comma list")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--plain", action="store_true", help="time the plain torch rows too")
    parser.add_argument(
        "--peers", action="store_true", help="FLA's functions beside those operators that it has, too; it must be installed"
    )
    tuning.add_arguments(parser)
    parser.add_argument("--sweep", action="store_true", help="time the step for all sizes of its programs, and stop")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this machine has no GPU that torch can use")
    if args.peers and not rows.installed("flash-linear-attention"):
        parser.error("--peers: flash-linear-attention is not installed")
    import triton

    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    bandwidth = copy_bandwidth(flush)
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, triton {triton.__version__}, copy {bandwidth / 1e12:.2f} TB/s")
    if args.sweep:
        sweep(args.only, flush, bandwidth)
        return
    print(
        f"{'':38s} {'error':>8s} {'plain':>8s} {'bits':>5s} {'eager us':>9s} {'graph us':>9s} {'host us':>8s} {'bare us':>8s} {'first us':>8s} {'of copy':>8s} {'first s':>8s}"
    )
    common = {"bench": "small_ops", **rows.machine(torch.device("cuda")), "copy_bytes_s": bandwidth}

    def keep(line: dict[str, Any]) -> None:
        if args.out:
            rows.append(Path(args.out) / "bench_small_ops.jsonl", common | line)

    def wanted(name: str) -> bool:
        return any(part in name for part in args.only.split(","))

    for name, found in of_torch(flush, args.repeats, wanted).items():
        keep({"row": name} | found)
        print(
            f"{name:38s} {'':23s} {1e3 * found['eager_ms']:9.1f} {'':9s} {found['host_us']:8.1f} {'':8s} {found['host_first_us']:8.1f}",
            flush=True,
        )
    peers = of_fla() if args.peers else {}
    for make in (steps, other_steps, convolutions, norms, gates, fused, few_tokens, losses, rules, cores, recurrences, attentions):
        for row in make():
            if not wanted(row.name):
                continue
            plain = PLAIN.get(row.op, "torch")
            compared = row.op in peers and comparable(row)
            try:
                checked = check(row, "portable", plain, first=compared)
                for impl in ("portable", *([plain] if args.plain else [])):
                    found = measure(row, impl, flush, bandwidth, args.repeats)
                    keep({"row": row.name} | checked | found)
                    show(row, checked, found)
            except Exception as problem:
                keep(failure(row, "portable", problem))
            if compared:
                theirs = dataclasses.replace(row, call=peers[row.op])
                try:
                    with tuning.compiled_ahead(args.compilers, args.compile_limit) as tuned:
                        checked = check(theirs, "fla", "", first=True)
                        found = measure(theirs, "fla", flush, bandwidth, args.repeats)
                    keep({"row": row.name} | checked | found | tuned.facts())
                    show(row, checked, found)
                except Exception as problem:
                    keep(failure(row, "fla", problem))
        torch.cuda.empty_cache()


def failure(row: Row, impl: str, problem: Exception) -> dict[str, Any]:
    """A line of results for what raised; the other rows go on."""
    print(f"{row.name:38s} {impl} FAILED {type(problem).__name__}: {str(problem)[:400]}", flush=True)
    return {"row": row.name, "impl": impl, "failed": f"{type(problem).__name__}: {problem}"[:2000]}


def comparable(row: Row) -> bool:
    """FLA's steps of the rule have states of float32, without slots."""
    return row.op != "gated_delta_step" or (row.arguments["state"].dtype == f32 and row.arguments["slots"] is None)


def show(row: Row, checked: dict[str, Any], found: dict[str, Any]) -> None:
    speed = f"{found['TFLOP_s']:5.0f} TF" if "TFLOP_s" in found else f"{found['of_copy']:8.1%}" if "of_copy" in found else ""
    name = row.name if found["impl"] == "portable" else f"  {found['impl']}"
    graph = f"{1e3 * found['graph_ms']:9.1f}" if "graph_ms" in found else " " * 9
    bits = "same" if checked["same_bits"] else "DIFF"
    print(
        f"{name:38s} {checked['error']:8.1e} {checked.get('plain_error', math.nan):8.1e} {bits:>5s} {1e3 * found['eager_ms']:9.1f} {graph}"
        f" {found['host_us']:8.1f} {found.get('bare_us', math.nan):8.1f} {found['host_first_us']:8.1f} {speed:>8s} {found['first_s']:8.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
