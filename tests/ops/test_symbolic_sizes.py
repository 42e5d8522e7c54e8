"""Compiled operators whose sizes are symbols, heads and widths included, as torch.compile makes them once they have changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_row import CASES, Case
from torch import Tensor
from torch.fx.experimental import _config as symbolic

from gdn import ops
from gdn.core.dispatch import use
from gdn.ops.qkv.problems import Problem as Qkv
from gdn.ops.short_conv.problems import Problem as Conv
from gdn.testing import compare

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {
    "causal_conv1d": Case(Conv(name="", T=30, D=12, bias=True, state=True, lengths=(13, 0, 17))),
    "convolved_qkv": Case(Qkv(name="", T=20, H=3, K=8, VD=20, lengths=(13, 0, 7))),
}
"""Instead of cases that take the interpreter half a minute."""


def longer(problem: Any) -> Any:
    """Another problem of the kind: more tokens, other documents."""
    for inner in ("rule", "tokens"):
        if dataclasses.is_dataclass(getattr(problem, inner, None)):
            return dataclasses.replace(problem, **{inner: longer(getattr(problem, inner))})
    if getattr(problem, "lengths", None):
        return dataclasses.replace(problem, T=sum(problem.lengths) + 13, lengths=(*problem.lengths, 13))
    if hasattr(problem, "shape"):
        return dataclasses.replace(problem, shape=(*(n + 3 for n in problem.shape[:-1]), problem.shape[-1]))
    if hasattr(problem, "vocab"):
        return dataclasses.replace(problem, tokens=(3, 17))
    return dataclasses.replace(problem, T=problem.T + 1) if hasattr(problem, "T") else problem


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_a_graph_of_symbols_serves_other_sizes(name: str) -> None:
    torch._dynamo.reset()
    operator = getattr(ops, name)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager", dynamic=True)
    first = SMALL.get(name, CASES[name])
    with use(**{name: "portable"}), symbolic.patch(use_duck_shape=False):
        for case in (first, first._replace(problem=longer(first.problem))):
            with torch._dynamo.config.patch(error_on_recompile=case is not first):
                expected, found = (results(run, case.build(device=DEVICE)) for run in (operator, compiled))
            assert found and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def results(run: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs, then the state or gradients."""
    if "state" not in arguments:
        for path, tensor in compare.named_tensors(arguments).items():
            tensor.requires_grad_(tensor.is_floating_point() and path not in ("cos", "sin"))
    return compare.called(run, arguments).tensors
