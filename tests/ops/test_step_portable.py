"""The Triton row that all decoding steps share, against their references: on a GPU where there is one, in Triton's interpreter otherwise.

Fresh memory is poisoned with NaN and so is what surrounds each argument, as in test_portable.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from every_row import Case, written
from torch import Tensor

from gdn import ops
from gdn.core import checks
from gdn.core.dispatch import use
from gdn.ops.delta_step import problems as delta
from gdn.ops.linear_recurrence.problems import Gates
from gdn.ops.linear_step import problems as linear

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Check = Callable[..., None]
Problem = delta.Problem | linear.Problem

DELTA = {"gated_delta_step": "build", "channel_delta_step": "build_channel", "gated_delta_product_step": "build_product"}
LINEAR: dict[str, Gates] = {
    "linear_attention_step": "head",
    "gated_linear_attention_step": "key",
    "value_gated_linear_attention_step": "value",
}
each = pytest.mark.parametrize("name", [*DELTA, *LINEAR])

MORE: tuple[dict[str, Any], ...] = (
    {"name": "eight tokens", "B": 2, "T": 8, "H": 2, "HV": 4, "K": 12, "V": 20, "slots": (2, 0), "pool": 3},
    {"name": "wide heads", "T": 2, "H": 1, "HV": 2, "K": 200, "V": 400},
    {"name": "wide bfloat16 heads", "T": 3, "H": 1, "HV": 2, "K": 96, "V": 72, "storage": torch.bfloat16},
    {"name": "largest keys", "T": 1, "H": 1, "HV": 1, "K": 512, "V": 17},
    {"name": "grouped 16-bit memories", "B": 2, "T": 3, "H": 2, "HV": 4, "K": 16, "V": 8, "storage": torch.float16},
)


def sized(op: str, *, name: str = "", **sizes: Any) -> Problem:
    return delta.Problem(name=name, **sizes) if op in DELTA else linear.Problem(name=name, **sizes)


def build(name: str, problem: Problem, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    if isinstance(problem, delta.Problem):
        return getattr(problem, DELTA[name])(dtype=dtype, device=DEVICE)
    return problem.build(LINEAR[name], dtype=dtype, device=DEVICE)


def cases() -> list[Any]:
    """All in three data types on a GPU; in the slow interpreter float32 for all but the large, and the first few in 16 bits."""
    found = []
    for name in (*DELTA, *LINEAR):
        listed = delta.PROBLEMS if name in DELTA else linear.PROBLEMS
        for i, problem in enumerate([*listed, *[sized(name, **sizes) for sizes in MORE]]):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                if DEVICE == "cuda" or (not problem.name.startswith("large ") if dtype == torch.float32 else i < 2):
                    found.append(pytest.param(name, problem, dtype, id=f"{name}-{problem.name}-{str(dtype)[6:]}"))
    return found


@pytest.mark.parametrize(("name", "problem", "dtype"), cases())
def test_step(name: str, problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(getattr(ops, name), "portable", build(name, problem, dtype))


@pytest.mark.parametrize(
    ("sizes", "columns", "warps"),
    [
        ({"B": 9}, 32, 1),
        ({"B": 8}, 16, 1),  # no more than 256 programs of 32 columns
        ({"B": 9, "T": 2}, 16, 1),
        ({"B": 9, "writes": 2}, 16, 1),
        ({"B": 9, "K": 512}, 32, 4),
        ({"B": 9, "K": 512, "T": 2}, 16, 2),
        ({"B": 100, "K": 12, "V": 20}, 32, 1),
        ({"B": 100, "V": 8}, 16, 1),
    ],
)
def test_columns_and_warps_of_a_program(sizes: dict[str, Any], columns: int, warps: int) -> None:
    """As measured, notes/decoding_step.md: 128 numbers a thread at most, half as many where a sequence has several writes."""
    problem = delta.Problem(**{"name": "", "T": 1, "H": 8, "HV": 8, "K": 128, "V": 128, "writes": 1, **sizes})
    (step,) = written("gated_delta_product_step", DEVICE, Case(problem, "build_product"))
    assert (step.args[-1], step.warps) == (columns, warps)


@pytest.mark.parametrize("writes", [1, 3, 5])
@pytest.mark.parametrize("tokens", [1, 2])
def test_any_number_of_writes(writes: int, tokens: int, as_good_as_the_reference: Check) -> None:
    problem = delta.Problem(name="", B=2, T=tokens, H=1, HV=3, K=12, V=20, writes=writes)
    as_good_as_the_reference(ops.gated_delta_product_step, "portable", problem.build_product(dtype=torch.float32, device=DEVICE))


def apart(x: Tensor) -> Tensor:
    """The same numbers as every second one of others."""
    return torch.stack([x, torch.full_like(x, -1)], -1)[..., 0]


def slice_of_heads(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, 7)], dim=-2)[..., : x.shape[-2], :]


def slice_of_writes(x: Tensor) -> Tensor:
    return torch.cat([x, torch.full_like(x, 7)], dim=2)[:, :, : x.shape[2]] if x.ndim == 5 else x


@each
@pytest.mark.parametrize("view", [slice_of_heads, slice_of_writes, apart])
def test_strided_views_are_read_and_the_state_updated_in_its_place(name: str, view: Callable[[Tensor], Tensor]) -> None:
    arguments = build(name, sized(name, B=2, T=2, H=1, HV=2, K=8, V=8))
    views = {n: view(arguments[n]) for n in ("q", "k", "v")} | {n: apart(arguments[n]) for n in ("g", "beta") if n in arguments}
    layers = torch.randn(2, 3, 2, 8, 8, device=DEVICE)
    for state in (layers[:, 1], layers[:, 2].mT):
        expected = {**arguments, "state": state.contiguous()}
        before = layers.clone()
        with use(**{name: "reference"}):
            o = getattr(ops, name)(**expected)
        with use(**{name: "portable"}):
            torch.testing.assert_close(getattr(ops, name)(**{**arguments, **views, "state": state}), o)
        torch.testing.assert_close(state, expected["state"])
        assert torch.equal(layers[:, 0], before[:, 0])


@pytest.mark.parametrize("tokens", [1, 3])
def test_one_write_that_is_a_slice_of_several(tokens: int) -> None:
    """Where there is one write its stride means nothing."""
    arguments = delta.Problem(name="", B=2, T=tokens, H=1, HV=2, K=8, V=8, writes=1).build_product(dtype=torch.float32, device=DEVICE)
    expected, state = {**arguments, "state": arguments["state"].clone()}, arguments["state"]
    with use(gated_delta_product_step="reference"):
        o = ops.gated_delta_product_step(**expected)
    for name in ("k", "v"):
        x = arguments[name]
        arguments[name] = x.as_strided(x.shape, (*x.stride()[:2], 1, *x.stride()[3:]))
    with use(gated_delta_product_step="portable"):
        torch.testing.assert_close(ops.gated_delta_product_step(**arguments), o)
    torch.testing.assert_close(state, expected["state"])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_lies_behind_the_pool_is_left_alone(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot too large, which nobody looks at on a GPU: the memory there is another tensor's."""
    monkeypatch.setattr(checks, "slots", lambda *arguments: None)
    arguments = build(name, sized(name, B=3, T=2, H=1, HV=2, K=8, V=8, slots=(3, -1, 1), pool=5), dtype)
    state, before = arguments["state"], arguments["state"].clone()
    with use(**{name: "portable"}):
        o = getattr(ops, name)(**{**arguments, "state": state[:3]})
    assert o[0].isnan().all() and not o[1].any() and o[2].isfinite().all()
    assert [bool((a == b).all()) for a, b in zip(state, before)] == [True, False, True, True, True]


@each
def test_minus_infinity_clears_and_nan_comes_through(name: str) -> None:
    arguments = build(name, sized(name, H=1, HV=2, K=4, V=4))
    arguments["k"].zero_()
    g = arguments["g"]
    heads = g.shape[2]  # a head of keys is that of both values
    g[:, :, 0] = -float("inf")
    with use(**{name: "portable"}):
        getattr(ops, name)(**arguments)
        assert not arguments["state"][0, 0].any() and bool(arguments["state"][0, 1].any()) == (heads == 2)
        g[:, :, -1] = float("nan")
        o = getattr(ops, name)(**arguments)
    assert o[0, 0, 1].isnan().all() and arguments["state"][0, 1].isnan().all()


@each
def test_compiles_as_one_graph(name: str, as_good_as_the_reference: Check) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
    problem = sized(name, B=3, T=2, H=1, HV=2, K=8, V=8, slots=(3, -1, 0), pool=5)
    as_good_as_the_reference(getattr(ops, name), "portable", build(name, problem), run=compiled)
