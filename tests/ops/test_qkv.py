"""The convolution of queries, keys and values against its reference, through its parts and in Triton (the interpreter without a GPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.ops import convolved_qkv
from gdn.ops.qkv import portable
from gdn.ops.qkv.problems import PROBLEMS, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Check = Callable[..., None]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


@each_problem
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_its_parts_match_the_reference(problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(convolved_qkv, "composed", problem.build(dtype=dtype))


@each_problem
@pytest.mark.usefixtures("poisoned_memory")
def test_triton_matches_the_reference(problem: Problem, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(convolved_qkv, "portable", problem.build(dtype=torch.float32, device=DEVICE))


@pytest.mark.parametrize("problem", PROBLEMS[:2], ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_triton_matches_the_reference_in_16_bits(problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(convolved_qkv, "portable", problem.build(dtype=dtype, device=DEVICE))


def test_triton_in_many_short_pieces(monkeypatch: pytest.MonkeyPatch, as_good_as_the_reference: Check) -> None:
    monkeypatch.setattr(portable, "tokens_of_a_piece", lambda *sizes: 4)
    for problem in PROBLEMS[:3]:
        as_good_as_the_reference(convolved_qkv, "portable", problem.build(dtype=torch.float32, device=DEVICE))


def test_a_slice_of_wider_rows(as_good_as_the_reference: Check) -> None:
    arguments = PROBLEMS[0].build(dtype=torch.float32, device=DEVICE)
    wide = torch.cat([arguments["x"], arguments["x"]], dim=-1)[..., 56:]
    as_good_as_the_reference(convolved_qkv, "portable", {**arguments, "x": wide})


@pytest.mark.parametrize("unused", range(3))
def test_results_that_nobody_uses(unused: int) -> None:
    arguments = PROBLEMS[0].build(dtype=torch.float32, device=DEVICE)
    found = []
    for impl in ("composed", "portable"):
        x = arguments["x"].clone().requires_grad_()
        with use(convolved_qkv=impl):
            results = convolved_qkv(**{**arguments, "x": x})
        used = [t.square().flatten(2) * torch.arange(1, 1 + t[0, 0].numel(), device=DEVICE) for i, t in enumerate(results) if i != unused]
        found.append(torch.autograd.grad(torch.cat(used, dim=-1).sum(), x)[0])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_keeps_its_arguments_alone() -> None:
    arguments = PROBLEMS[0].build(dtype=torch.float32, device=DEVICE)
    x = arguments["x"].requires_grad_()
    kept: list[Tensor] = []
    with use(convolved_qkv="portable"), torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        convolved_qkv(**arguments)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), arguments["weight"].data_ptr()}


@pytest.mark.parametrize("impl", ["composed", "portable"])
def test_compiles_as_one_graph(impl: str, as_good_as_the_reference: Check) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(convolved_qkv, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(convolved_qkv, impl, PROBLEMS[1].build(dtype=torch.float32, device=DEVICE), run=compiled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 4}, "x: expected room for queries and keys of 4 heads of 8"),
        ({"weight": torch.zeros(55, 4)}, "weight: expected"),
        ({"weight": torch.zeros(56, 0)}, "weight: expected at least one tap"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        convolved_qkv(**{**PROBLEMS[0].build(dtype=torch.float32), **change})
