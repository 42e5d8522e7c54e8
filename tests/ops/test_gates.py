"""The gates against their references, at the ends of their ranges and by finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.ops import decay_gate, write_gate
from gdn.ops.gates.problems import PROBLEMS, Problem

impls = pytest.mark.parametrize("impl", ["torch", "reference"])


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_the_reference(problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Callable[..., None]) -> None:
    as_good_as_the_reference(decay_gate, "torch", problem.build_decay(dtype=dtype))
    as_good_as_the_reference(write_gate, "torch", problem.build_write(dtype=dtype))


@impls
def test_by_hand(impl: str) -> None:
    with use(decay_gate=impl, write_gate=impl):
        g = decay_gate(torch.tensor([[[2.0]]]).double(), torch.tensor([0.5]).double(), torch.tensor([-1.0]).double())
        beta = write_gate(torch.tensor([[[1.0]]]).double(), top=2.0)
    assert g.item() == pytest.approx(-math.exp(0.5) * math.log1p(math.exp(1.0)), rel=1e-15)
    assert beta.item() == pytest.approx(2 / (1 + math.exp(-1.0)), rel=1e-15)


def test_gradients_by_finite_differences() -> None:
    a, A_log, dt_bias = (t.requires_grad_() for t in PROBLEMS[0].build_decay(dtype=torch.float64).values())
    assert torch.autograd.gradcheck(decay_gate, (a, A_log, dt_bias))
    assert torch.autograd.gradcheck(lambda b: write_gate(b, top=2.0), (a,))


@impls
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extremes_stay_finite_and_exact(impl: str, dtype: torch.dtype) -> None:
    a = torch.tensor([-math.inf, -1e4, -50.0, 0.0, 30.0, 1e4], dtype=dtype).reshape(1, -1, 1).requires_grad_()
    A_log, dt_bias = torch.zeros(1, dtype=dtype, requires_grad=True), torch.zeros(1, dtype=dtype, requires_grad=True)
    with use(decay_gate=impl, write_gate=impl):
        g, beta = decay_gate(a, A_log, dt_bias), write_gate(a)
    expected = torch.tensor([0.0, 0.0, -math.exp(-50), -math.log(2), -30 - math.exp(-30), -1e4], dtype=dtype)
    torch.testing.assert_close(g.flatten(), expected, rtol=4 * torch.finfo(dtype).eps, atol=0)
    assert beta.flatten()[[0, 1, -1]].tolist() == [0, 0, 1]
    for gradient in torch.autograd.grad((g + beta).sum(), (a, A_log, dt_bias)):
        assert gradient.isfinite().all()


@impls
def test_a_rate_of_zero_never_forgets(impl: str) -> None:
    a, A_log, dt_bias = torch.randn(1, 5, 2), torch.tensor([-math.inf, 0.0]), torch.zeros(2)
    leaves = [t.requires_grad_() for t in (a, A_log, dt_bias)]
    with use(decay_gate=impl):
        g = decay_gate(a, A_log, dt_bias)
    assert not g[..., 0].any()
    for gradient in torch.autograd.grad(g.sum(), leaves):
        assert gradient.isfinite().all()
        assert not gradient[..., 0].any()


@impls
def test_results_are_float32_whatever_the_input(impl: str) -> None:
    a = torch.tensor([[[3.0]]]).bfloat16()
    with use(decay_gate=impl, write_gate=impl):
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                g, beta = decay_gate(a, torch.full((1,), 0.3), torch.full((1,), 0.01)), write_gate(a)
            assert g.dtype == beta.dtype == torch.float32
            assert g.item() == pytest.approx(-math.exp(0.3) * math.log1p(math.exp(3.01)), rel=1e-6)


def test_compiles_as_one_graph(as_good_as_the_reference: Callable[..., None]) -> None:
    for gate, arguments in (
        (decay_gate, PROBLEMS[0].build_decay(dtype=torch.float32)),
        (write_gate, PROBLEMS[0].build_write(dtype=torch.float32)),
    ):
        compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
        as_good_as_the_reference(gate, "torch", arguments, run=compiled)


A = torch.zeros(1, 4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"a": A[0]}, r"a: expected 3 dimensions \[B, T, HV\], got \[4, 2\]"),
        ({"a": A.int()}, "a: expected a floating dtype, got torch.int32"),
        ({"A_log": torch.zeros(3)}, r"A_log: expected \[HV=2\], got \[3\]"),
        ({"dt_bias": torch.zeros(1)}, r"dt_bias: expected \[HV=2\], got \[1\]"),
        ({"A_log": torch.zeros(2).bfloat16(), "dt_bias": torch.zeros(2).bfloat16()}, "A_log: expected float32 .*, got torch.bfloat16"),
        ({"dt_bias": torch.zeros(2).double()}, "dt_bias: expected torch.float32 like A_log, got torch.float64"),
        ({"A_log": torch.zeros(2, device="meta")}, "A_log: expected on cpu like a, got meta"),
    ],
)
def test_wrong_arguments_of_the_decay_are_named(arguments: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        decay_gate(**{"a": A, "A_log": torch.zeros(2), "dt_bias": torch.zeros(2), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": A[0]}, r"b: expected 3 dimensions \[B, T, HV\]"),
        ({"b": A.long()}, "b: expected a floating dtype, got torch.int64"),
        ({"b": A, "top": 0.0}, "top: expected above 0 and at most 2, got 0.0"),
        ({"b": A, "top": 2.5}, "top: expected above 0 and at most 2, got 2.5"),
    ],
)
def test_wrong_arguments_of_the_writing_strength_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        write_gate(**arguments)
