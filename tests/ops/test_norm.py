"""The norms against their references, torch's own and finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.ops import add_rms_norm, gated_rms_norm, l2norm, rms_norm
from gdn.ops.norm.problems import PROBLEMS, Problem

NORMS = {l2norm: ("x",), rms_norm: ("x", "weight"), add_rms_norm: ("x", "residual", "weight"), gated_rms_norm: ("x", "gate", "weight")}
"""Each operator, and the tensors it takes."""

norms = pytest.mark.parametrize("norm", NORMS, ids=lambda f: f.__name__)


def arguments_of(norm: Callable[..., Any], problem: Problem, dtype: torch.dtype) -> dict[str, Any]:
    arguments = problem.build_add(dtype=dtype) if norm is add_rms_norm else problem.build(dtype=dtype)
    return {name: arguments[name] for name in NORMS[norm]}


@norms
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_matches_the_reference(
    norm: Callable[..., Any], problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Callable[..., None]
) -> None:
    as_good_as_the_reference(norm, "torch", arguments_of(norm, problem, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_gate_through_a_sigmoid_matches_the_reference(dtype: torch.dtype, as_good_as_the_reference: Callable[..., None]) -> None:
    as_good_as_the_reference(gated_rms_norm, "torch", {**PROBLEMS[0].build(dtype=dtype), "activation": "sigmoid"})


@norms
def test_weights_and_gates_of_another_dtype(norm: Callable[..., Any], as_good_as_the_reference: Callable[..., None]) -> None:
    arguments = arguments_of(norm, PROBLEMS[0], torch.float32)
    narrow = {name: arguments[name].bfloat16() for name in ("x", "residual") if name in arguments}
    as_good_as_the_reference(norm, "torch", {**arguments, **narrow})


@norms
def test_gradients_by_finite_differences(norm: Callable[..., Any]) -> None:
    arguments = arguments_of(norm, Problem(name="", shape=(2, 3, 5)), torch.float64)
    assert torch.autograd.gradcheck(norm, [t.requires_grad_() for t in arguments.values()])


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_sum_or_a_norm_that_nobody_uses(used: int, compiled: bool) -> None:
    leaves = [t.requires_grad_() for t in PROBLEMS[0].build_add().values()]
    torch._dynamo.reset()
    run = torch.compile(add_rms_norm, fullgraph=True, backend="aot_eager") if compiled else add_rms_norm
    found = torch.autograd.grad(run(*leaves)[used].square().sum(), leaves, materialize_grads=True)
    x, residual, weight = leaves
    expected = (F.rms_norm(x + residual, (40,), weight, 1e-5), x + residual)[used]
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), leaves, materialize_grads=True))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_matches_torch(impl: str) -> None:
    x, gate, weight = Problem(name="", shape=(4, 7, 12)).build(dtype=torch.float64).values()
    expected = F.rms_norm(x, (12,), weight, 1e-3)
    with use(l2norm=impl, rms_norm=impl, gated_rms_norm=impl):
        torch.testing.assert_close(l2norm(x, eps=1e-30), F.normalize(x, dim=-1))
        torch.testing.assert_close(rms_norm(x, weight, eps=1e-3), expected)
        torch.testing.assert_close(gated_rms_norm(x, gate, weight, eps=1e-3), expected * F.silu(gate))
        through_sigmoid = gated_rms_norm(x, gate, weight, activation="sigmoid", eps=1e-3)
        torch.testing.assert_close(through_sigmoid, expected * gate.sigmoid())


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_zero_vector_gives_zeros_and_a_finite_gradient(impl: str, dtype: torch.dtype) -> None:
    x = torch.zeros(2, 8, dtype=dtype, requires_grad=True)
    with use(l2norm=impl):
        y = l2norm(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    torch.testing.assert_close(dx, torch.full_like(dx, 1000))


@norms
def test_keeps_its_inputs_and_one_number_a_vector(norm: Callable[..., Any]) -> None:
    arguments = arguments_of(norm, Problem(name="", shape=(3, 9, 40)), torch.bfloat16)
    arguments["x"].requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        results = norm(**arguments)
    inputs = {t.data_ptr() for t in arguments.values()}
    if norm is add_rms_norm:  # the sum, which others keep too, instead of its parts
        assert not {arguments[name].data_ptr() for name in ("x", "residual")} & {t.data_ptr() for t in kept}
        inputs.add(results[1].data_ptr())
    assert sum(t.numel() for t in kept if t.data_ptr() not in inputs) == 27


@norms
def test_reads_strided_views_and_writes_dense_results(norm: Callable[..., Any], as_good_as_the_reference: Callable[..., None]) -> None:
    arguments = arguments_of(norm, PROBLEMS[0], torch.float32)
    arguments["x"] = torch.cat([arguments["x"]] * 2, dim=-1)[..., :40]
    assert not arguments["x"].is_contiguous()
    results = norm(**arguments)
    assert all(y.is_contiguous() for y in ([results] if isinstance(results, Tensor) else results))
    as_good_as_the_reference(norm, "torch", arguments)


@norms
def test_compiles_as_one_graph(norm: Callable[..., Any], as_good_as_the_reference: Callable[..., None]) -> None:
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(norm, "torch", arguments_of(norm, PROBLEMS[0], torch.float32), run=compiled)


X, WEIGHT = torch.zeros(2, 5), torch.ones(5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: l2norm(torch.tensor(1.0)), r"x: expected \[..., D\], got a scalar"),
        (lambda: l2norm(X.long()), "x: expected a floating dtype, got torch.int64"),
        (lambda: l2norm(X, eps=0.0), "eps: expected above 0, got 0.0"),
        (lambda: rms_norm(X, WEIGHT[:4]), r"weight: expected \[D=5\], got \[4\]"),
        (lambda: rms_norm(X, WEIGHT.to("meta")), "weight: expected on cpu like x, got meta"),
        (lambda: rms_norm(X, WEIGHT, eps=-1.0), "eps: expected above 0"),
        (lambda: add_rms_norm(X, X[:1], WEIGHT), r"residual: expected \[2, 5\] like x, got \[1, 5\]"),
        (lambda: add_rms_norm(X, X.bfloat16(), WEIGHT), "residual: expected torch.float32 like x, got torch.bfloat16"),
        (lambda: add_rms_norm(X, X, WEIGHT, eps=0.0), "eps: expected above 0, got 0.0"),
        (lambda: gated_rms_norm(X, X[:1], WEIGHT), r"gate: expected \[2, 5\] like x, got \[1, 5\]"),
        (lambda: gated_rms_norm(X, X.bool(), WEIGHT), "gate: expected a floating dtype, got torch.bool"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_another_activation_is_named() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ArgumentError, match='activation: expected "silu" or "sigmoid", got \'relu\''):
        gated_rms_norm(x, x, x[0], activation="relu")  # type: ignore[arg-type]
