"""The decoding step against its reference and against the rule over a sequence."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.ops import gated_delta_rule, gated_delta_step
from gdn.ops.delta_step.problems import PROBLEMS, Problem

EXACT = {"rtol": 1e-11, "atol": 1e-12}
impls = pytest.mark.parametrize("impl", ["torch", "reference"])


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference(problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Callable[..., None]) -> None:
    if problem.storage is not None and dtype == torch.float64:
        pytest.skip("narrow storage is for narrow inputs")
    as_good_as_the_reference(gated_delta_step, "torch", problem.build(dtype=dtype))


@impls
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_stepping_equals_the_rule_over_the_sequence(impl: str, tokens: int, scale: float | None) -> None:
    arguments = Problem(name="", B=2, T=9, H=2, HV=4, K=8, V=6).build(dtype=torch.float64)
    state, _ = arguments.pop("state"), arguments.pop("slots")
    with use(gated_delta_rule="reference", gated_delta_step=impl):
        expected, last = gated_delta_rule(**arguments, scale=scale, initial_state=state)
        pieces = zip(*(t.split(tokens, dim=1) for t in arguments.values()))
        o = torch.cat([gated_delta_step(*piece, state, scale=scale) for piece in pieces], dim=1)
    torch.testing.assert_close(o, expected, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


@impls
@pytest.mark.parametrize("width", [8, 256])
def test_slots_touch_only_their_rows(impl: str, width: int) -> None:
    arguments = Problem(name="", B=3, T=2, H=1, HV=2, K=width, V=width, slots=(3, -1, 0), pool=5).build(dtype=torch.float32)
    before = arguments["state"].clone()
    with use(gated_delta_step=impl):
        o = gated_delta_step(**arguments)
        chosen = {name: arguments[name][[0, 2]] for name in ("q", "k", "v", "g", "beta")}
        rows = before[[3, 0]]
        expected = gated_delta_step(**chosen, state=rows)
    assert (arguments["state"] != before).flatten(1).any(1).tolist() == [True, False, False, True, False]
    assert not o[1].any()
    torch.testing.assert_close(o[[0, 2]], expected)
    torch.testing.assert_close(arguments["state"][[3, 0]], rows)


@impls
def test_memory_that_is_a_strided_view_is_updated_where_it_is(impl: str) -> None:
    arguments = Problem(name="", B=2, H=1, HV=3, K=8, V=4).build(dtype=torch.float64)
    layers = torch.randn(2, 2, 3, 8, 4, dtype=torch.float64)
    expected = layers.clone()
    with use(gated_delta_step=impl):
        o = gated_delta_step(**{**arguments, "state": layers[:, 1]})
        dense = expected[:, 1].contiguous()
        torch.testing.assert_close(o, gated_delta_step(**{**arguments, "state": dense}), **EXACT)
    expected[:, 1] = dense
    torch.testing.assert_close(layers, expected, **EXACT)


@impls
def test_a_log_decay_of_minus_infinity_clears_and_zero_keeps(impl: str) -> None:
    q = torch.zeros(1, 1, 1, 4)
    state = torch.randn(1, 2, 4, 4)
    before = state.clone()
    g = torch.tensor([[[-math.inf, 0.0]]])
    with use(gated_delta_step=impl):
        gated_delta_step(q, q, torch.randn(1, 1, 2, 4), g, torch.ones(1, 1, 2), state)
    assert not state[0, 0].any()
    assert torch.equal(state[0, 1], before[0, 1])


def test_narrow_memory_is_rounded_once_a_call() -> None:
    """Three writes of 2^-9 to a memory of 1: rounded to bfloat16 after each they would all be lost."""
    one = torch.ones(1, 3, 1, 1)
    state = torch.ones(1, 1, 1, 1).bfloat16()
    values = 1 + 2.0**-9 * torch.tensor([2.0, 3.0, 4.0]).reshape(1, 3, 1, 1)
    gated_delta_step(one, one, values, torch.zeros(1, 3, 1), torch.full((1, 3, 1), 0.5), state)
    assert state.item() == 1 + 2**-7


@pytest.mark.parametrize("problem", [PROBLEMS[2], PROBLEMS[6], PROBLEMS[8]], ids=lambda p: p.name)
def test_compiles_as_one_graph(problem: Problem, as_good_as_the_reference: Callable[..., None]) -> None:
    compiled = torch.compile(gated_delta_step, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(gated_delta_step, "torch", problem.build(dtype=torch.float32), run=compiled)


def test_autocast_changes_nothing() -> None:
    arguments = PROBLEMS[2].build(dtype=torch.float32)
    expected = gated_delta_step(**{**arguments, "state": arguments["state"].clone()})
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gated_delta_step(**arguments), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 1, 2, 5)}, r"k: expected \[B=2, T=1, H=2, K=5\], got \[2, 1, 2, 4\]"),
        ({"q": torch.zeros(2, 1, 3, 4), "k": torch.zeros(2, 1, 3, 4)}, "v: expected a multiple of 3 value heads .*, got 4"),
        ({"v": torch.zeros(2, 1, 4, 3).double()}, "v: expected torch.float32 like q, got torch.float64"),
        ({"g": torch.zeros(2, 1, 2)}, r"g: expected \[B=2, T=1, HV=4\], got \[2, 1, 2\]"),
        ({"g": torch.full((2, 1, 4), 0.5)}, "g: expected a log decay, so at most 0 everywhere, got 0.5"),
        ({"beta": torch.zeros(2, 1, 4, dtype=torch.int32)}, "beta: expected a floating dtype"),
        ({"state": torch.zeros(2, 4, 4, 2)}, r"state: expected \[N=2, HV=4, K=4, V=3\], got \[2, 4, 4, 2\]"),
        ({"state": torch.zeros(3, 4, 4, 3)}, "state: expected 2 rows"),
        ({"state": torch.zeros(1, 4, 4, 3).expand(2, 4, 4, 3)}, "state: expected memory of its own for each element, got one expanded"),
        ({"state": torch.zeros(2, 4, 4, 3).double()}, "state: expected torch.float32, torch.bfloat16 or torch.float16, got torch.float64"),
        ({"state": torch.zeros(2, 4, 4, 3, device="meta")}, "state: expected on cpu like q, got meta"),
        ({"slots": torch.tensor([0, 2])}, "slots: expected rows below 2, got 2"),
        ({"slots": [0, 1]}, "slots: expected a tensor, got list"),
        ({"slots": torch.tensor([1, 1])}, "slots: expected each row at most once"),
        ({"k": torch.zeros(2, 1, 2, 4, requires_grad=True)}, "k: expected a tensor without gradient"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(2, 1, 2, 4),
        "k": torch.zeros(2, 1, 2, 4),
        "v": torch.zeros(2, 1, 4, 3),
        "g": torch.zeros(2, 1, 4),
        "beta": torch.zeros(2, 1, 4),
        "state": torch.zeros(2, 4, 4, 3),
    }
    with pytest.raises(ArgumentError, match=message):
        gated_delta_step(**{**arguments, **changes})
    arguments["k"].requires_grad_()
    with torch.no_grad():
        gated_delta_step(**arguments)
