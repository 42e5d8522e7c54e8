"""Numbers and tensors that are none: operators refuse them by name. Numbers of other libraries are taken."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gdn.ops
from gdn.core.errors import ArgumentError
from gdn.ops import GateParameters

X, WEIGHT, HEADS, GATE = torch.ones(1, 3, 4), torch.ones(4), torch.ones(1, 3, 2, 2), -torch.ones(1, 3, 2)


def delta_core(top: float) -> tuple[Tensor, Tensor]:
    gates = GateParameters(torch.zeros(2), torch.zeros(2), top)
    return gdn.ops.delta_core(HEADS, HEADS, HEADS, GATE, GATE, gates)


NORMS: dict[str, functools.partial[Any]] = {
    "l2norm": functools.partial(gdn.ops.l2norm, x=X),
    "rms_norm": functools.partial(gdn.ops.rms_norm, x=X, weight=WEIGHT),
    "add_rms_norm": functools.partial(gdn.ops.add_rms_norm, x=X, residual=X, weight=WEIGHT),
    "gated_rms_norm": functools.partial(gdn.ops.gated_rms_norm, x=X, gate=X, weight=WEIGHT),
    "gated_rms_norm_linear": functools.partial(
        gdn.ops.gated_rms_norm_linear, x=HEADS, gate=HEADS, norm_weight=torch.ones(2), weight=torch.ones(3, 4)
    ),
    "skip_gated_rms_norm": functools.partial(
        gdn.ops.skip_gated_rms_norm, y=HEADS, x=HEADS, D=torch.ones(2), gate=torch.ones(1, 3, 4), weight=WEIGHT
    ),
}
SCALED: dict[str, Callable[..., Any]] = {
    "gated_delta_rule": functools.partial(gdn.ops.gated_delta_rule, HEADS, HEADS, HEADS, GATE, -GATE),
    "linear_attention": functools.partial(gdn.ops.linear_attention, HEADS, HEADS, HEADS, GATE),
    "causal_attention": functools.partial(gdn.ops.causal_attention, HEADS, HEADS, HEADS),
}
TENSORS = NORMS | {
    "swiglu_linear": functools.partial(gdn.ops.swiglu_linear, x=X, weight=torch.ones(3, 2)),
    "parallel_linear": functools.partial(gdn.ops.parallel_linear, x=X, first=torch.ones(3, 4)),
    "rotary_embedding": functools.partial(gdn.ops.rotary_embedding, x=HEADS, cos=torch.ones(3, 1), sin=torch.ones(3, 1)),
    "linear_cross_entropy": functools.partial(
        gdn.ops.linear_cross_entropy, x=X, weight=torch.ones(5, 4), targets=torch.zeros(1, 3, dtype=torch.int64)
    ),
}
NUMBERS = [
    *[(call, "eps") for call in NORMS.values()],
    *[(call, "scale") for call in SCALED.values()],
    (functools.partial(gdn.ops.write_gate, GATE), "top"),
    (delta_core, "top"),
]
INTEGERS = [
    (functools.partial(gdn.ops.linear_cross_entropy, X, torch.ones(5, 4), torch.zeros(1, 3, dtype=torch.int64)), "ignore_index"),
    (functools.partial(gdn.ops.convolved_qkv, X, torch.ones(4, 2), head_dim=1), "heads"),
    (functools.partial(gdn.ops.convolved_qkv, X, torch.ones(4, 2), heads=1), "head_dim"),
    (NORMS["skip_gated_rms_norm"], "groups"),
    (SCALED["causal_attention"], "window"),
    (functools.partial(gdn.ops.windowed_sigmoid_attention, HEADS, HEADS, HEADS, torch.zeros(2)), "window"),
]


@pytest.mark.parametrize(("call", "name"), NUMBERS)
@pytest.mark.parametrize("value", ["1", True, torch.tensor(1.0), [1.0], math.nan, math.inf, 10**400])
def test_no_number_is_refused(call: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=rf"^{name}: expected a (finite )?number, got"):
        call(**{name: value})


@pytest.mark.parametrize(("call", "name"), INTEGERS)
@pytest.mark.parametrize("value", ["1", True, torch.tensor(1), [1], 1.0, math.nan])
def test_no_integer_is_refused(call: Callable[..., Any], name: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=f"^{name}: expected an integer, got {type(value).__name__}"):
        call(**{name: value})
    with pytest.raises(ArgumentError, match=f"^{name}: expected at most 9223372036854775807, got 1000"):
        call(**{name: 10**30})


@pytest.mark.parametrize(("call", "name"), [*NUMBERS, *INTEGERS])
def test_numbers_of_other_libraries_are_taken(call: Callable[..., Any], name: str) -> None:
    kinds = [np.int64, np.int32] if (call, name) in INTEGERS else [np.int64, np.float32, np.float64]
    for kind in kinds:
        torch.testing.assert_close(call(**{name: kind(1)}), call(**{name: 1}), rtol=0, atol=0)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("value", [None, "1", 2.5, [1.0]])
def test_arguments_that_are_no_tensors_are_refused(name: str, value: object) -> None:
    for argument in TENSORS[name].keywords:
        with pytest.raises(ArgumentError, match=rf"^{argument}: expected a tensor.*, got {type(value).__name__}"):
            TENSORS[name](**{argument: value})


def test_every_number_of_every_operator_is_tried() -> None:
    tried = {name for _, name in (*NUMBERS, *INTEGERS)}
    for operator in gdn.ops.__all__:
        hints = inspect.signature(getattr(gdn.ops, operator)).parameters if operator.islower() else {}
        numbers = {name for name, p in hints.items() if str(p.annotation) in ("int", "float", "int | None", "float | None")}
        assert numbers <= tried, operator
