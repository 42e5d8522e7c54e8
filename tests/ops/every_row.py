"""Arguments for every operator that has a Triton row: several chunks or blocks, and documents where there can be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gdn import ops
from gdn.core.dispatch import use
from gdn.core.foresight import THREAD
from gdn.core.portable_launch import Launch
from gdn.ops.attention.problems import Problem as Attention
from gdn.ops.delta_channel.problems import Problem as ChannelRule
from gdn.ops.delta_fused.problems import Problem as Core
from gdn.ops.delta_product.problems import Problem as Product
from gdn.ops.delta_rule import portable as rule_row
from gdn.ops.delta_rule.problems import Problem as Rule
from gdn.ops.delta_step.problems import Problem as Step
from gdn.ops.gates.problems import Problem as Gate
from gdn.ops.linear_recurrence import portable_plan as linear_row
from gdn.ops.linear_recurrence.problems import Problem as Linear
from gdn.ops.linear_step.problems import Problem as LinearStep
from gdn.ops.loss.problems import Problem as Loss
from gdn.ops.norm.problems import Problem as Norm
from gdn.ops.projection.problems import Problem as Projection
from gdn.ops.qkv.problems import Problem as Qkv
from gdn.ops.rotary.problems import Problem as Rotary
from gdn.ops.short_conv.problems import Problem as Conv
from gdn.ops.state_space.problems import Problem as StateSpace
from gdn.testing import compare

Arguments = dict[str, Any]


class Case(NamedTuple):
    """Arguments of an operator: a problem, how they are made of it, and which; None for all."""

    problem: Any
    make: str = "build"
    first: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None
    more: tuple[tuple[str, Any], ...] = ()
    narrow: bool = False
    """In bfloat16, as tensor cores take; else in float32, which shows more."""

    def build(self, dtype: torch.dtype | None = None, device: str = "cpu") -> Arguments:
        found = getattr(self.problem, self.make)(*self.first, dtype=dtype or self.dtype, device=device, **dict(self.more))
        return {name: value for name, value in found.items() if self.only is None or name in self.only}

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.narrow else torch.float32


class ConvolutionStep:
    """A step of the convolution with slots and a bias."""

    def build(self, *, dtype: torch.dtype, device: str) -> Arguments:
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (3, 2, 130), "weight": (130, 4), "state": (5, 3, 130), "bias": (130,)}
        tensors = {name: torch.randn(shape, generator=generator).to(device, dtype) for name, shape in shapes.items()}
        return {**tensors, "activation": "silu", "slots": torch.tensor([4, -1, 2], device=device)}


PACKED: dict[str, Any] = {"name": "", "T": 200, "H": 1, "HV": 2, "K": 64, "V": 64, "lengths": (130, 0, 70)}
RULE, LINEAR = Rule(**PACKED, initial=True), Linear(**PACKED, initial=True)


def several_writes(n: int) -> Case:
    """Of each token. A chunk has 32 reads for two and three, and 16 for more."""
    return Case(Product(tokens=RULE.with_(T=100, lengths=(70, 0, 30)), n=n), narrow=True)


POOL: dict[str, Any] = {"name": "", "B": 3, "T": 2, "H": 1, "HV": 2, "K": 384, "V": 130, "slots": (2, -1, 0), "pool": 3}
STEP, LINEAR_STEP = Step(**POOL), LinearStep(**POOL)
WIDE, HEADS = Norm(name="", shape=(40, 1025)), StateSpace(name="", T=70, H=3, P=100)
GATES, BLOCKS = Gate(name="", B=2, T=500, HV=3), Projection(name="", shape=(7, 4, 130), M=6)
CASES: dict[str, Case] = {
    "gated_delta_rule": Case(RULE, narrow=True),
    "channel_delta_rule": Case(ChannelRule(rule=RULE), narrow=True),
    "gated_delta_product": several_writes(2),
    "delta_core": Case(Core(**PACKED, state=True), narrow=True),
    "linear_attention": Case(LINEAR, first=("head",), narrow=True),
    "gated_linear_attention": Case(LINEAR, first=("key",), narrow=True),
    "value_gated_linear_attention": Case(LINEAR, first=("value",), narrow=True),
    "gated_delta_step": Case(STEP),
    "channel_delta_step": Case(STEP, "build_channel"),
    "gated_delta_product_step": Case(STEP, "build_product"),
    "linear_attention_step": Case(LINEAR_STEP, first=("head",)),
    "gated_linear_attention_step": Case(LINEAR_STEP, first=("key",)),
    "value_gated_linear_attention_step": Case(LINEAR_STEP, first=("value",)),
    "causal_conv1d": Case(Conv(name="", T=300, D=130, bias=True, state=True, lengths=(130, 0, 170))),
    "causal_conv1d_step": Case(ConvolutionStep()),
    "convolved_qkv": Case(Qkv(name="", T=200, H=3, K=130, VD=1100, lengths=(130, 0, 70))),
    "l2norm": Case(WIDE, only=("x",)),
    "rms_norm": Case(WIDE, only=("x", "weight")),
    "add_rms_norm": Case(WIDE, "build_add"),
    "gated_rms_norm": Case(WIDE),
    "skip_gated_rms_norm": Case(HEADS, "build_norm"),
    "scale_heads": Case(HEADS, "build_scale"),
    "decay_gate": Case(GATES, "build_decay"),
    "write_gate": Case(GATES, "build_write"),
    "rotary_embedding": Case(Rotary(name="", T=70, H=3, K=40, N=20)),
    "windowed_sigmoid_attention": Case(
        Attention(name="", T=200, H=4, G=2, K=64, V=64, window=100, lengths=(130, 0, 70)), more=(("slopes", True),), narrow=True
    ),
    "swiglu_linear": Case(BLOCKS, "build_swiglu"),
    "gated_rms_norm_linear": Case(BLOCKS, "build_norm"),
    "linear_cross_entropy": Case(Loss(name="", tokens=(2, 21), D=16, vocab=9000)),
}


def cut_up(replace: Callable[[Any, str, Any], Any]) -> None:
    """Cut sequences into segments of one chunk and have gates apart, by replacing functions of the rows, so that all kernels run."""
    replace(rule_row, "gates_apart", lambda tiles: True)
    for row in (rule_row, linear_row):
        replace(row, "segment_chunks", lambda *sizes: 1)
        row.plan.cache_clear()


def written(name: str, device: str = "cpu", case: Case | None = None) -> list[Launch]:
    """What forward and backward would launch. Nothing runs, so no host may look at a number."""
    arguments = (case or CASES[name]).build(device=device)
    tensors = compare.named_tensors(arguments).values()
    trained = [x for x in tensors if x.requires_grad] or [x.requires_grad_() for x in tensors if x.is_floating_point()]
    backward = "state" not in arguments
    THREAD.launches = found = []
    try:  # this thread alone writes launches down
        with use(**{name: "portable"}), torch.set_grad_enabled(backward), torch.autograd.set_multithreading_enabled(False):
            results = getattr(ops, name)(**arguments)
            if backward:
                outputs = [results] if isinstance(results, Tensor) else list(results)
                torch.autograd.grad(outputs, trained, [torch.ones_like(x) for x in outputs], allow_unused=True)
    finally:
        THREAD.launches = None
    return found
