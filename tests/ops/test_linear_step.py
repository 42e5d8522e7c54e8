"""The decoding steps of linear attention against their reference and against the operators over a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn import ops
from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.ops.linear_recurrence.problems import Gates
from gdn.ops.linear_step.problems import PROBLEMS, Problem

OPS: dict[Gates, str] = {
    "head": "linear_attention",
    "key": "gated_linear_attention",
    "value": "value_gated_linear_attention",
}
EXACT = {"rtol": 1e-11, "atol": 1e-12}
impls = pytest.mark.parametrize("impl", ["torch", "reference"])
of_each_kind = pytest.mark.parametrize("gates", OPS)


def step(gates: Gates) -> Callable[..., Tensor]:
    return getattr(ops, f"{OPS[gates]}_step")


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@of_each_kind
def test_matches_the_reference(gates: Gates, problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Callable[..., None]) -> None:
    storage = None if dtype == torch.float64 else problem.storage  # narrow storage is for narrow inputs
    arguments = problem.build(gates, dtype=dtype)
    if storage is None and problem.storage is not None:
        arguments["state"] = arguments["state"].to(dtype)
    as_good_as_the_reference(step(gates), "torch", arguments)


@impls
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("scale", [None, 0.7])
@of_each_kind
def test_stepping_equals_the_operator_over_the_sequence(gates: Gates, impl: str, tokens: int, scale: float | None) -> None:
    arguments = Problem(name="", B=2, T=9, H=2, HV=4, K=8, V=6).build(gates)
    state, _ = arguments.pop("state"), arguments.pop("slots")
    with use(**{OPS[gates]: "reference", f"{OPS[gates]}_step": impl}):
        expected, last = getattr(ops, OPS[gates])(**arguments, scale=scale, initial_state=state)
        pieces = zip(*(t.split(tokens, dim=1) for t in arguments.values()))
        o = torch.cat([step(gates)(*piece, state, scale=scale) for piece in pieces], dim=1)
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


@impls
@pytest.mark.parametrize("width", [8, 256])
@of_each_kind
def test_slots_touch_only_their_rows(gates: Gates, impl: str, width: int) -> None:
    problem = Problem(name="", B=3, T=1, H=1, HV=2, K=width, V=width, slots=(3, -1, 0), pool=5)
    arguments = problem.build(gates, dtype=torch.float32)
    before = arguments["state"].clone()
    with use(**{f"{OPS[gates]}_step": impl}):
        o = step(gates)(**arguments)
        chosen = {name: arguments[name][[0, 2]] for name in ("q", "k", "v", "g")}
        rows = before[[3, 0]]
        expected = step(gates)(**chosen, state=rows)
    assert (arguments["state"] != before).flatten(1).any(1).tolist() == [True, False, False, True, False]
    assert not o[1].any()
    torch.testing.assert_close(o[[0, 2]], expected)
    torch.testing.assert_close(arguments["state"][[3, 0]], rows)


@impls
@of_each_kind
def test_memory_that_is_a_strided_view_is_updated_where_it_is(gates: Gates, impl: str) -> None:
    arguments = Problem(name="", B=2, H=1, HV=3, K=8, V=4).build(gates)
    layers = torch.randn(2, 2, 3, 8, 4, dtype=torch.float64)
    expected = layers.clone()
    with use(**{f"{OPS[gates]}_step": impl}):
        o = step(gates)(**{**arguments, "state": layers[:, 1]})
        dense = expected[:, 1].contiguous()
        torch.testing.assert_close(o, step(gates)(**{**arguments, "state": dense}), **EXACT)
    expected[:, 1] = dense
    torch.testing.assert_close(layers, expected, **EXACT)


@pytest.mark.parametrize(
    ("gates", "shape", "cleared"),
    [("head", (1, 1, 2), (0, 0)), ("key", (1, 1, 1, 4), (0, slice(None), 0)), ("value", (1, 1, 2, 3), (0, 0, slice(None), 0))],
)
@impls
def test_a_log_decay_of_minus_infinity_clears_and_zero_keeps(
    gates: Gates, impl: str, shape: tuple[int, ...], cleared: tuple[int | slice, ...]
) -> None:
    q, state, g = torch.zeros(1, 1, 1, 4), torch.randn(1, 2, 4, 3), torch.zeros(shape)
    g[(0, 0, 0, 0)[: g.ndim]] = -math.inf
    expected = state.clone()
    expected[cleared] = 0
    with use(**{f"{OPS[gates]}_step": impl}):
        step(gates)(q, q, torch.randn(1, 1, 2, 3), g, state)
    assert torch.equal(state, expected)


@pytest.mark.parametrize("problem", [PROBLEMS[1], PROBLEMS[4], PROBLEMS[6]], ids=lambda p: p.name)
@of_each_kind
def test_compiles_as_one_graph(gates: Gates, problem: Problem, as_good_as_the_reference: Callable[..., None]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(step(gates), fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(step(gates), "torch", problem.build(gates, dtype=torch.float32), run=compiled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 1, 2, 5)}, r"k: expected \[B=2, T=1, H=2, K=5\], got \[2, 1, 2, 4\]"),
        ({"q": torch.zeros(2, 1, 3, 4), "k": torch.zeros(2, 1, 3, 4)}, "v: expected a multiple of 3 value heads .*, got 4"),
        ({"v": torch.zeros(2, 1, 4, 3).double()}, "v: expected torch.float32 like q, got torch.float64"),
        ({"g": torch.zeros(2, 1, 2)}, r"g: expected \[B=2, T=1, HV=4\], got \[2, 1, 2\]"),
        ({"g": torch.full((2, 1, 4), 0.5)}, "g: expected a log decay, so at most 0 everywhere, got 0.5"),
        ({"state": torch.zeros(2, 4, 4, 2)}, r"state: expected \[N=2, HV=4, K=4, V=3\], got \[2, 4, 4, 2\]"),
        ({"state": torch.zeros(3, 4, 4, 3)}, "state: expected 2 rows"),
        ({"state": torch.zeros(1, 4, 4, 3).expand(2, 4, 4, 3)}, "state: expected memory of its own for each element, got one expanded"),
        ({"state": torch.zeros(2, 4, 4, 3).double()}, "state: expected torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
        ({"slots": torch.tensor([1, 1])}, "slots: expected each row at most once"),
        ({"k": torch.zeros(2, 1, 2, 4, requires_grad=True)}, "k: expected a tensor without gradient"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Tensor], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 1, 2, 4),
        "k": torch.zeros(2, 1, 2, 4),
        "v": torch.zeros(2, 1, 4, 3),
        "g": torch.zeros(2, 1, 4),
        "state": torch.zeros(2, 4, 4, 3),
    }
    with pytest.raises(ArgumentError, match=message):
        ops.linear_attention_step(**{**arguments, **changes})
