"""The rotary embedding against complex numbers, in torch and in Triton (its interpreter where there is no GPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.ops import rotary_embedding
from gdn.ops.rotary import OP
from gdn.ops.rotary.problems import PROBLEMS, Problem
from gdn.testing import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
of_each = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


@of_each
def test_torch_agrees_with_complex_numbers(problem: Problem) -> None:
    assert compare.in_three_dtypes(OP, "torch", lambda dtype: problem.build(dtype=dtype)) == []


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@of_each
def test_triton_agrees_with_complex_numbers(problem: Problem, dtype: torch.dtype) -> None:
    truth, rounding = (compare.run(OP, "reference", problem.build(dtype=d)) for d in (torch.float64, dtype))
    actual = compare.run(OP, "portable", problem.build(dtype=dtype, device=DEVICE))
    assert compare.complaints(actual, rounding, truth, dtype) == []


@pytest.mark.parametrize("impl", ["torch", "portable"])
def test_compiles_as_one_graph(impl: str) -> None:
    arguments = PROBLEMS[1].build(dtype=torch.float32, device=DEVICE)
    torch._dynamo.reset()
    with use(rotary_embedding=impl):
        expected, compiled = (
            rotary_embedding(**arguments),
            torch.compile(rotary_embedding, fullgraph=True, backend="aot_eager")(**arguments),
        )
    assert torch.equal(compiled, expected)
    gradients = [torch.autograd.grad(y, arguments["x"], torch.ones_like(y))[0] for y in (expected, compiled)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x | {"cos": torch.zeros(13, 5), "sin": torch.zeros(13, 5)}, "cos: expected angles for at most half of the 8 channels"),
        (lambda x: x | {"sin": x["sin"].bfloat16()}, "sin: expected torch.float32, got torch.bfloat16"),
        (lambda x: x | {"cos": x["cos"].clone().requires_grad_()}, "cos: expected angles without a gradient"),
        (lambda x: x | {"cos": x["cos"][1:]}, "cos: "),
    ],
)
def test_wrong_arguments_are_named(change: Callable[[dict[str, Any]], dict[str, Any]], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        rotary_embedding(**change(PROBLEMS[0].build(dtype=torch.float32)))
