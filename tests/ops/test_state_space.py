"""The parts of a state-space layer against their definitions, in torch and in Triton (its interpreter where there is no GPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn.core.dispatch import Op, use
from gdn.core.errors import ArgumentError
from gdn.ops import scale_heads, skip_gated_rms_norm
from gdn.ops.state_space import SCALE_HEADS, SKIP_GATED_RMS_NORM
from gdn.ops.state_space.problems import PROBLEMS, Problem
from gdn.testing import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
of_each = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
OPS = [(SCALE_HEADS, "build_scale"), (SKIP_GATED_RMS_NORM, "build_norm")]
of_both = pytest.mark.parametrize(("op", "make"), OPS, ids=["scale", "norm"])


@of_each
@of_both
def test_torch_agrees_with_the_definition(op: Op, make: str, problem: Problem) -> None:
    assert compare.in_three_dtypes(op, "torch", lambda dtype: getattr(problem, make)(dtype=dtype)) == []


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@of_each
@of_both
def test_triton_agrees_with_the_definition(op: Op, make: str, problem: Problem, dtype: torch.dtype) -> None:
    truth, rounding = (compare.run(op, "reference", getattr(problem, make)(dtype=d)) for d in (torch.float64, dtype))
    actual = compare.run(op, "portable", getattr(problem, make)(dtype=dtype, device=DEVICE))
    assert compare.complaints(actual, rounding, truth, dtype) == []


@pytest.mark.usefixtures("poisoned_memory")
def test_programs_of_several_tokens_agree_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytest.importorskip("gdn.ops.state_space.portable"), "PARTS", 4)
    test_triton_agrees_with_the_definition(*OPS[1], Problem(name="", B=1, T=11, H=2, P=4, groups=2), torch.float32)


def every_other(x: torch.Tensor, dim: int) -> torch.Tensor:
    """The same numbers with others between them along a dimension, which are NaN."""
    wide = x.new_full((*x.shape[:dim], 2 * x.shape[dim], *x.shape[dim + 1 :]), torch.nan)
    index = (*(slice(None),) * dim, slice(None, None, 2))
    wide[index] = x
    return wide[index]


@pytest.mark.parametrize(("name", "dim"), [("x", 0), ("x", 1), ("x", 2), ("x", 3), ("gate", 0), ("gate", 1), ("gate", 2)])
def test_numbers_may_lie_apart(name: str, dim: int) -> None:
    """Sequences, tokens, heads or channels."""
    arguments = Problem(name="", B=2, T=5, H=3, P=4, groups=1).build_norm(dtype=torch.float32, device=DEVICE)
    arguments = {key: x.detach() if isinstance(x, torch.Tensor) else x for key, x in arguments.items()}
    with use(skip_gated_rms_norm="portable"):
        found, expected = (skip_gated_rms_norm(**{**arguments, name: x}) for x in (every_other(arguments[name], dim), arguments[name]))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("impl", ["torch", "portable"])
def test_compile_as_one_graph(impl: str) -> None:
    for function, arguments in (
        (scale_heads, PROBLEMS[0].build_scale(dtype=torch.float32, device=DEVICE)),
        (skip_gated_rms_norm, PROBLEMS[1].build_norm(dtype=torch.float32, device=DEVICE)),
    ):
        torch._dynamo.reset()
        with use(**{function.__name__: impl}):
            results = [f(**arguments) for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))]
        leaves = [t for t in arguments.values() if isinstance(t, torch.Tensor)]
        gradients = [torch.autograd.grad(y, leaves, torch.ones_like(y)) for y in results]
        assert torch.equal(*results) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"groups": 2}, "groups: expected a divisor of the 3 heads of y, got 2"),
        (lambda x: x | {"eps": 0.0}, "eps: expected above 0"),
        (lambda x: x | {"x": x["x"].double()}, "x: "),
        (lambda x: x | {"weight": x["weight"][1:]}, "weight: "),
    ],
)
def test_wrong_arguments_are_named(change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        skip_gated_rms_norm(**change(PROBLEMS[0].build_norm(dtype=torch.float32)))


def test_a_narrow_factor_is_refused() -> None:
    arguments = PROBLEMS[0].build_scale(dtype=torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"factor: expected torch\.float32, got torch\.bfloat16"):
        scale_heads(arguments["x"], arguments["factor"].bfloat16())
