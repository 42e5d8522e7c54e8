"""Argument checks: what they accept, and that messages name the argument, what came and what is expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn.core import checks
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing

A, B = torch.zeros(2, 3, 4), torch.zeros(2, 4)
LIST: Any = [0, 20]
TEXT: Any = "0.5"
NUMBER: Any = torch.tensor(0.5)
HEADS = {"H": 2, "HV": 4, "K": 8, "V": 8}
PACKING = Packing.from_lengths([20])


def test_shapes_returns_the_size_of_each_letter() -> None:
    assert checks.shapes(("a", A, "B T K"), ("b", B, "B K")) == {"B": 2, "T": 3, "K": 4}
    assert checks.shapes(("b", B, "N W-1"), **{"W-1": 4}) == {"N": 2, "W-1": 4}


def test_scale_is_what_was_given_or_follows_from_the_width() -> None:
    assert checks.scale(None, 4) == 0.5
    assert checks.scale(2, 4) == 2 and checks.scale(0.25, 0) == 0.25


def test_nothing_given_is_nothing_wrong() -> None:
    checks.same_device(("a", A), ("b", None))
    checks.same_dtype(("a", A), ("b", None), ("c", B))
    checks.floating(("a", None), ("b", B))
    checks.not_positive("g", torch.zeros(0), "a log decay")
    checks.not_positive("g", torch.tensor([-1.0, 0.0, -torch.inf]), "a log decay")
    checks.in_place(A[:1, :1].expand(1, 1, 4))
    checks.slots(None, 3, 3)
    checks.slots(torch.tensor([-1, 4, -1, 0]), 4, 5)
    checks.slots(torch.tensor([-2], dtype=torch.int32), 1, 0)
    checks.no_gradient(("a", None), ("b", B))
    checks.boundaries(None, 2, 3, A.device)
    checks.boundaries(PACKING, 1, 20, A.device)


def test_gradients_are_refused_only_where_they_are_enabled() -> None:
    x = torch.zeros(1, requires_grad=True)
    with torch.no_grad():
        checks.no_gradient(("x", x))
    with pytest.raises(ArgumentError, match=r"x: expected a tensor without gradient, .* torch.no_grad\(\)"):
        checks.no_gradient(("a", A), ("x", x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checks.shapes(("a", A, "B T")), r"a: expected 2 dimensions \[B, T\], got \[2, 3, 4\]"),
        (lambda: checks.shapes(("a", A, "B T K"), ("b", B, "B T")), r"b: expected \[B=2, T=3\], got \[2, 4\]"),
        (lambda: checks.shapes(("a", A, "B T T")), r"a: expected \[B=2, T=3, T=3\], got \[2, 3, 4\]"),
        (lambda: checks.shapes(("a", A, "B T K"), T=7), r"a: expected \[B=2, T=7, K\], got \[2, 3, 4\]"),
        (lambda: checks.shapes(("a", A, "B T K"), ("b", LIST, "B K")), r"b: expected a tensor \[B, K\], got list"),
        (lambda: checks.boundaries(LIST, 1, 20, A.device), "packing: expected a gdn.Packing, got list; make one with Packing.from_"),
        (lambda: checks.boundaries(PACKING, 1, 19, A.device), "packing: describes 20 tokens, but the input has 1 x 19"),
        (lambda: checks.same_device(("a", A), ("b", B.to("meta"))), "b: expected on cpu like a, got meta"),
        (lambda: checks.value_heads(HEADS | {"HV": 3}), r"v: expected a multiple of 2 value heads \(the heads of q\), got 3"),
        (lambda: checks.value_heads(HEADS | {"H": 0}), "q: expected at least one head, got none"),
        (lambda: checks.value_heads(HEADS | {"HV": 0}), "v: expected at least one head, got none"),
        (lambda: checks.value_heads(HEADS | {"K": 0}), "q: expected at least one channel, got none"),
        (lambda: checks.value_heads(HEADS | {"V": 0}), "v: expected at least one channel, got none"),
        (lambda: checks.scale(None, 0), "q: expected at least one channel, got none"),
        (lambda: checks.scale(NUMBER, 4), "scale: expected a number, got Tensor; what has a gradient belongs to q"),
        (lambda: checks.scale(TEXT, 4), "scale: expected a number, got str"),
        (lambda: checks.same_device(("a", A), ("b", LIST)), "b: expected a tensor, got list"),
        (lambda: checks.same_dtype(("a", A.to(torch.float8_e4m3fn))), "a: expected at least 16 bits a number, got torch.float8_e4m3fn"),
        (lambda: checks.same_dtype(("a", A), ("b", B.half())), "b: expected torch.float32 like a, got torch.float16"),
        (lambda: checks.same_dtype(("a", A.int()), ("b", B.int())), "a: expected a floating dtype, got torch.int32"),
        (lambda: checks.floating(("a", A), ("b", B.bool())), "b: expected a floating dtype, got torch.bool"),
        (lambda: checks.not_positive("g", torch.tensor([-1.0, 0.25]), "a log decay"), "g: expected a log decay, so at most 0 .*, got 0.25"),
        (lambda: checks.in_place(A[:, :1].expand(2, 3, 4)), r"state: expected memory of its own .*, got one expanded to \[2, 3, 4\]"),
        (lambda: checks.memory(A[:1].expand(2, 3, 4), A.dtype), "state: expected memory of its own"),
        (lambda: checks.slots(None, 2, 3), "state: expected 2 rows, one for each sequence, got 3; or say with slots"),
        (lambda: checks.slots(torch.tensor([0, 1]), 3, 9), r"slots: expected \[B=3\], got \[2\]"),
        (lambda: checks.slots(torch.tensor([0.0]), 1, 9), "slots: expected int32 or int64, got torch.float32"),
        (lambda: checks.slots(torch.tensor([3, 9]), 2, 9), "slots: expected rows below 9, got 9"),
        (lambda: checks.slots(torch.tensor([3, -1, 3]), 3, 9), "slots: expected each row at most once"),
    ],
)
def test_messages(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call()


def test_values_are_left_alone_under_the_compiler_and_on_other_devices() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def call(g: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        checks.not_positive("g", g, "a log decay")
        checks.slots(rows, 2, 3)
        return g + 1

    assert call(torch.tensor([2.0]), torch.tensor([7, 7])).item() == 3
    checks.not_positive("g", torch.ones(3, device="meta"), "a log decay")
    checks.slots(torch.zeros(2, dtype=torch.int64, device="meta"), 2, 1)


def test_sums_are_float32_except_for_float64() -> None:
    assert checks.accumulate_dtype(torch.float64) == torch.float64
    assert {checks.accumulate_dtype(d) for d in (torch.float32, torch.bfloat16, torch.float16)} == {torch.float32}
