"""The short convolution: against its reference, torch's Conv1d and itself split in pieces."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.ops import causal_conv1d, causal_conv1d_step
from gdn.ops.short_conv.problems import PROBLEMS, Problem

EXACT = {"rtol": 1e-12, "atol": 1e-12}
problems = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


@problems
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_the_reference(problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Callable[..., None]) -> None:
    as_good_as_the_reference(causal_conv1d, "torch", problem.build(dtype=dtype))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_matches_conv1d(impl: str) -> None:
    x, weight, bias = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 11, 6), (6, 4), (6,)))
    expected = F.conv1d(x.transpose(1, 2), weight[:, None], bias, padding=3, groups=6)[..., :11].transpose(1, 2)
    with use(causal_conv1d=impl):
        torch.testing.assert_close(causal_conv1d(x, weight, bias=bias)[0], expected, **EXACT)
        torch.testing.assert_close(causal_conv1d(x, weight, bias=bias, activation="silu")[0], F.silu(expected), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_weights_in_float32_under_bfloat16_inputs_are_not_rounded(dtype: torch.dtype) -> None:
    weight = torch.tensor([[1.0 + 2**-12, 0.0]], dtype=dtype)
    y, _ = causal_conv1d(torch.tensor([[[1.0], [1.0]]]).bfloat16(), torch.cat([weight, -weight.flip(1).bfloat16().to(dtype)]).sum(0)[None])
    assert y.dtype == torch.bfloat16
    assert y[0, 1, 0] == 2**-12


@pytest.mark.parametrize("lengths", [None, (5, 0, 1, 2, 9)])
@pytest.mark.parametrize("silu", [False, True])
def test_gradients_by_finite_differences(lengths: tuple[int, ...] | None, silu: bool) -> None:
    problem = Problem(name="", B=1 if lengths else 2, T=17, D=3, bias=True, silu=silu, state=True, lengths=lengths)
    arguments = problem.build(dtype=torch.float64)
    names = [n for n, v in arguments.items() if isinstance(v, Tensor)]
    rest = {n: v for n, v in arguments.items() if n not in names}
    leaves = [arguments[n].requires_grad_() for n in names]
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(**dict(zip(names, t)), **rest), leaves)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 12),
    taps=st.integers(1, 6),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    silu=st.booleans(),
    few=st.integers(0, 3),
)
def test_any_split_with_the_state_handed_over_equals_the_whole(length: int, taps: int, cuts: list[int], silu: bool, few: int) -> None:
    """Pieces of at most `few` tokens go through the step."""
    torch.manual_seed(0)
    x, weight = torch.randn(2, length, 3, dtype=torch.float64), torch.randn(3, taps, dtype=torch.float64)
    state = torch.randn(2, taps - 1, 3, dtype=torch.float64)
    options: dict[str, Any] = {"activation": "silu" if silu else None}
    whole, last = causal_conv1d(x, weight, initial_state=state, **options)
    pieces = []
    for piece in x.tensor_split(sorted(min(c, length) for c in cuts), dim=1):
        if piece.shape[1] <= few:
            y = causal_conv1d_step(piece, weight, state, **options)
        else:
            y, state = causal_conv1d(piece, weight, initial_state=state, **options)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, **EXACT)
    assert torch.equal(state, last)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_packed_documents_equal_separate_ones(impl: str) -> None:
    lengths = [3, 0, 1, 8, 2]
    x, weight = torch.randn(1, 14, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    state = torch.randn(5, 3, 4, dtype=torch.float64)
    with use(causal_conv1d=impl):
        y, last = causal_conv1d(x, weight, initial_state=state, packing=Packing.from_lengths(lengths))
        one_by_one = [causal_conv1d(d, weight, initial_state=state[i : i + 1]) for i, d in enumerate(x.split(lengths, dim=1))]
    torch.testing.assert_close(y, torch.cat([d for d, _ in one_by_one], dim=1), **EXACT)
    assert torch.equal(last, torch.cat([s for _, s in one_by_one]))
    assert torch.equal(last[1], state[1]), "an empty document keeps its state"
    assert torch.equal(last[2], torch.cat([state[2, 1:], x[0, 3:4]])), "a short document keeps the tail of its state"


@pytest.mark.parametrize("lengths", [None, (10, 0, 27)])
def test_saves_nothing_but_its_inputs(lengths: tuple[int, ...] | None) -> None:
    arguments = Problem(name="", T=37, D=8, state=True, bias=True, lengths=lengths).build(dtype=torch.float32)
    kept: list[Tensor] = []
    floats = {v.data_ptr() for n, v in arguments.items() if isinstance(v, Tensor)}
    arguments["x"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        causal_conv1d(**arguments)
    assert kept
    assert all(t.data_ptr() in floats for t in kept if t.dtype.is_floating_point)


@pytest.mark.parametrize("lengths", [None, (10, 0, 27)])
def test_compiles_as_one_graph(lengths: tuple[int, ...] | None, as_good_as_the_reference: Callable[..., None]) -> None:
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    arguments = Problem(name="", T=37, D=8, state=True, bias=True, lengths=lengths).build(dtype=torch.float32)
    as_good_as_the_reference(causal_conv1d, "torch", arguments, run=compiled)


@pytest.mark.parametrize("taps", [1, 4])
def test_results_lie_in_memory_as_the_compiler_is_told(taps: int) -> None:
    x = torch.randn(2, 12, 7).transpose(1, 2)
    for result in causal_conv1d(x, torch.randn(12, taps)):
        assert result.is_contiguous()


def test_autocast_changes_nothing() -> None:
    arguments = Problem(name="", T=37, D=8).build(dtype=torch.float32)
    expected = causal_conv1d(**arguments)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(causal_conv1d(**arguments)[0], expected)


def step_arguments(dtype: torch.dtype, *, slots: list[int] | None, tokens: int = 2, taps: int = 4) -> dict[str, Any]:
    torch.manual_seed(0)
    rows = 3 if slots is None else 5
    return {
        "x": torch.randn(3, tokens, 6, dtype=torch.float64).to(dtype),
        "weight": torch.randn(6, taps, dtype=torch.float64).to(dtype),
        "state": torch.randn(rows, taps - 1, 6, dtype=torch.float64).to(dtype),
        "bias": torch.randn(6, dtype=torch.float64).to(dtype),
        "activation": "silu",
        "slots": None if slots is None else torch.tensor(slots),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slots", [None, [4, 0, 2], [3, -1, 0], [-1, -1, -1]], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 9])
def test_step_matches_the_reference(
    dtype: torch.dtype, slots: list[int] | None, tokens: int, as_good_as_the_reference: Callable[..., None]
) -> None:
    for taps in (1, 2, 4):
        as_good_as_the_reference(causal_conv1d_step, "torch", step_arguments(dtype, slots=slots, tokens=tokens, taps=taps))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_step_with_slots_touches_only_those_rows(impl: str) -> None:
    arguments = step_arguments(torch.float64, slots=[3, -1, 0])
    before = arguments["state"].clone()
    with use(causal_conv1d_step=impl):
        y = causal_conv1d_step(**arguments)
    changed = (arguments["state"] != before).flatten(1).any(1).tolist()
    assert changed == [True, False, False, True, False]
    assert not y[1].any()
    expected, last = causal_conv1d(
        arguments["x"][[0, 2]], arguments["weight"], bias=arguments["bias"], activation="silu", initial_state=before[[3, 0]]
    )
    torch.testing.assert_close(y[[0, 2]], expected, **EXACT)
    assert torch.equal(arguments["state"][[3, 0]], last)


@pytest.mark.parametrize("slots", [None, [4, -1, 2]], ids=str)
def test_step_compiles_as_one_graph(slots: list[int] | None, as_good_as_the_reference: Callable[..., None]) -> None:
    compiled = torch.compile(causal_conv1d_step, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(causal_conv1d_step, "torch", step_arguments(torch.float32, slots=slots), run=compiled)


X, WEIGHT = torch.zeros(2, 5, 4), torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[0]}, r"x: expected 3 dimensions \[B, T, D\], got \[5, 4\]"),
        ({"weight": torch.zeros(3, 3)}, r"weight: expected \[D=4, W\], got \[3, 3\]"),
        ({"weight": torch.zeros(4, 0)}, "weight: expected .* at least one tap"),
        ({"bias": torch.zeros(3)}, r"bias: expected \[D=4\], got \[3\]"),
        ({"activation": "gelu"}, "activation: expected None or \"silu\", got 'gelu'"),
        ({"x": X.long()}, "x: expected a floating dtype, got torch.int64"),
        ({"weight": WEIGHT.to("meta")}, "weight: expected on cpu like x, got meta"),
        ({"initial_state": torch.zeros(2, 3, 4)}, r"initial_state: expected \[N=2, W-1=2, D=4\], got \[2, 3, 4\]"),
        ({"initial_state": torch.zeros(2, 2, 4), "packing": Packing.from_lengths([5, 2, 3])}, r"initial_state: expected \[N=3"),
        ({"packing": Packing.from_lengths([5, 4])}, "packing: describes 9 tokens, but the input has 2 x 5"),
        ({"packing": Packing.from_lengths([4, 6])}, "packing: a document crosses the end of a row"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        causal_conv1d(**{"x": X, "weight": WEIGHT, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"state": torch.zeros(2, 3, 4)}, r"state: expected \[N=2, W-1=2, D=4\], got \[2, 3, 4\]"),
        ({"state": torch.zeros(3, 2, 4)}, "state: expected 2 rows, one for each sequence, got 3"),
        ({"state": torch.zeros(1, 2, 4).expand(2, 2, 4)}, "state: expected memory of its own for each element, got one expanded"),
        ({"slots": torch.tensor([0, 2])}, "slots: expected rows below 2, got 2"),
        ({"slots": torch.tensor([1, 1])}, "slots: expected each row at most once"),
        ({"slots": torch.tensor([1.0, 0.0])}, "slots: expected int32 or int64, got torch.float32"),
        ({"slots": torch.tensor([1])}, r"slots: expected \[B=2\], got \[1\]"),
        ({"weight": WEIGHT.clone().requires_grad_()}, "weight: expected a tensor without gradient"),
    ],
)
def test_wrong_arguments_of_the_step_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        causal_conv1d_step(**{"x": X, "weight": WEIGHT, "state": torch.zeros(2, 2, 4), **arguments})
