"""The core against its reference; that the composed row goes through the tables; gradients to everything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.core.dispatch import ops, use
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.ops import GateParameters, decay_gate, delta_core, gated_delta_rule, l2norm, write_gate
from gdn.ops.delta_fused.problems import PROBLEMS, Problem


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_matches_the_reference(problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Callable[..., None]) -> None:
    as_good_as_the_reference(delta_core, "composed", problem.build(dtype=dtype))


@pytest.mark.parametrize("impl", ["composed", "reference"])
def test_is_the_composition_of_the_operators(impl: str) -> None:
    arguments = PROBLEMS[1].build()
    gates = arguments["gates"]
    expected = gated_delta_rule(
        l2norm(arguments["q"]),
        l2norm(arguments["k"]),
        arguments["v"],
        decay_gate(arguments["a"], gates.A_log, gates.dt_bias),
        write_gate(arguments["b"], top=2.0),
        initial_state=arguments["initial_state"],
    )
    with use(delta_core=impl):
        torch.testing.assert_close(delta_core(**arguments), expected)


def test_forced_rows_of_the_parts_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    parts = ("l2norm", "decay_gate", "write_gate", "gated_delta_rule")
    for name in parts:
        original = ops()[name].function("reference")
        monkeypatch.setitem(ops()[name]._functions, "reference", lambda *a, n=name, f=original: (called.append(n), f(*a))[1])
    with use(delta_core="composed", **dict.fromkeys(parts, "reference")):
        delta_core(**PROBLEMS[0].build())
    assert sorted(called) == sorted([*parts, "l2norm"])


def test_gradients_by_finite_differences() -> None:
    arguments = Problem(name="", T=5, H=1, HV=2, K=3, V=2, top=2.0, state=True, lengths=(2, 0, 3)).build()
    gates, packing, state = arguments.pop("gates"), arguments.pop("packing"), arguments.pop("initial_state")
    tensors = [t.requires_grad_() for t in (*arguments.values(), gates.A_log, gates.dt_bias, state)]

    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, state: Tensor) -> Any:
        return delta_core(q, k, v, a, b, GateParameters(A_log, dt_bias, 2.0), initial_state=state, packing=packing)

    assert torch.autograd.gradcheck(call, tensors, fast_mode=True)


@pytest.mark.parametrize("impl", ["composed", "reference"])
def test_padding_leaves_no_trace(impl: str) -> None:
    arguments = PROBLEMS[3].build()
    whole = {n: v[:, 7:] if n in ("q", "k", "v", "a", "b") else v for n, v in arguments.items()}
    with use(delta_core=impl):
        (o, state), (expected, last) = delta_core(**arguments), delta_core(**whole)
    assert not o[:, :7].abs().isnan().any()
    torch.testing.assert_close(o[:, 7:], expected)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("problem", [PROBLEMS[0], PROBLEMS[2]], ids=lambda p: p.name)
def test_compiles_as_one_graph(problem: Problem, as_good_as_the_reference: Callable[..., None]) -> None:
    def call(gates: GateParameters, **arguments: Any) -> Any:
        return delta_core(gates=GateParameters(gates.A_log, gates.dt_bias, gates.top), **arguments)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(delta_core, "composed", problem.build(dtype=torch.float32), run=compiled)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"k": torch.zeros(1, 3, 2, 5)}, r"k: expected \[B=1, T=3, H=2, K=4\], got \[1, 3, 2, 5\]"),
        ({"k": torch.zeros(1, 3, 2, 4).double()}, "k: expected torch.float32 like q, got torch.float64"),
        ({"a": torch.zeros(1, 3, 2)}, r"a: expected \[B=1, T=3, HV=4\], got \[1, 3, 2\]"),
        ({"b": torch.zeros(1, 3, 4).bool()}, "b: expected a floating dtype, got torch.bool"),
        ({"gates": GateParameters(torch.zeros(3), torch.zeros(4))}, r"A_log: expected \[HV=4\], got \[3\]"),
        ({"gates": GateParameters(torch.zeros(4), torch.zeros(4).double())}, "dt_bias: expected torch.float32 like A_log"),
        ({"gates": GateParameters(torch.zeros(4).bfloat16(), torch.zeros(4).bfloat16())}, "A_log: expected float32"),
        ({"gates": GateParameters(torch.zeros(4), torch.zeros(4), 3.0)}, "top: expected above 0 and at most 2, got 3.0"),
        ({"gates": GateParameters(torch.zeros(4, device="meta"), torch.zeros(4))}, "A_log: expected on cpu like q, got meta"),
        ({"initial_state": torch.zeros(2, 4, 4, 3)}, r"initial_state: expected \[N=1, HV=4, K=4, V=3\], got \[2, 4, 4, 3\]"),
        ({"initial_state": torch.zeros(1, 4, 4, 3).bfloat16()}, "initial_state: expected torch.float32, got torch.bfloat16"),
        ({"packing": Packing.from_lengths([2])}, "packing: describes 2 tokens"),
        ({"gates": (torch.zeros(4), torch.zeros(4))}, r"gates: expected GateParameters\(A_log, dt_bias, top\), got tuple"),
    ],
)
def test_wrong_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 3, 2, 4),
        "k": torch.zeros(1, 3, 2, 4),
        "v": torch.zeros(1, 3, 4, 3),
        "a": torch.zeros(1, 3, 4),
        "b": torch.zeros(1, 3, 4),
        "gates": GateParameters(torch.zeros(4), torch.zeros(4)),
    }
    for impl in ("composed", "reference"):
        with pytest.raises(ArgumentError, match=message), use(delta_core=impl):
            delta_core(**{**arguments, **changes})
    with pytest.raises(ArgumentError, match="v: expected a multiple of 3 value heads"):
        delta_core(**{**arguments, "q": torch.zeros(1, 3, 3, 4), "k": torch.zeros(1, 3, 3, 4)})
