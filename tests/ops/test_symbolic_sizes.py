"""Compiled operators whose sizes are symbols, heads and widths included, as torch.compile makes them once they have changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_row import CASES, Case
from torch import Tensor

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


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_a_graph_of_symbols_gives_the_same_bits(name: str) -> None:
    torch._dynamo.reset()
    operator = getattr(ops, name)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager", dynamic=True)
    with use(**{name: "portable"}):
        expected, found = (results(run, SMALL.get(name, CASES[name]).build(device=DEVICE)) for run in (operator, compiled))
    assert found and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def results(run: Callable[..., Any], arguments: dict[str, Any]) -> list[Tensor]:
    """Outputs, then the state or gradients."""
    if "state" not in arguments:
        for path, tensor in compare.named_tensors(arguments).items():
            tensor.requires_grad_(tensor.is_floating_point() and path not in ("cos", "sin"))
    return compare.called(run, arguments).tensors
