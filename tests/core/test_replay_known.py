"""Calls that are like one before: what the quick look lets pass has the same signature, and its tensors come in the same order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdn.core import replay_known
from gdn.core.replay_known import FEW, MISS, Known, Table, signature


@dataclass
class Parts:
    parts: tuple[Any, ...]

    def replay_parts(self) -> tuple[Any, ...]:
        return self.parts


class OtherParts(Parts):
    pass


@pytest.fixture(autouse=True)
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Table]:
    monkeypatch.setattr(replay_known, "FIRST_DEVICE", -1)
    yield Table()
    replay_known._TABLES.pop()


def known_of(args: Sequence[Any], named: dict[str, Any]) -> tuple[Any, list[Tensor]]:
    found = signature((len(args), *args, *named, *named.values()))
    assert found is not None
    return found


def learn(table: Table, *args: Any, **named: Any) -> None:
    """Have the table know such a call, of which it returns the tensors."""
    key, _ = known_of(args, named)
    if key not in table:
        table.keep(key, Known(lambda tensors: list(tensors)), table.emptied)
    table.hasten(table[key], args, named, table.emptied)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or (8,), generator=torch.Generator().manual_seed(seed))


def call(seed: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Objects before tensors and after, by place and by name, one in another."""
    a, b, c, d, e, f, g = (numbers(10 * seed + i) for i in range(7))
    parts = Parts((c, 3, Parts((d,)), 0.5))
    return (a, None, parts, b, "mean"), {"packing": Parts((e, f)), "state": g, "scale": 2.0, "dtype": torch.float16}


def test_tensors_come_as_in_a_signature(table: Table) -> None:
    learn(table, *call()[0], **call()[1])
    for seed in range(1, 3):
        args, named = call(seed)
        tensors = known_of(args, named)[1]
        assert len(tensors) == 7
        found = table.replay(args, named)
        assert [x.data_ptr() for x in found] == [x.data_ptr() for x in tensors]


def replaced(place: int, value: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda args, named: ((*args[:place], value(args[place]), *args[place + 1 :]), named)


def renamed(name: str, value: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda args, named: (args, named | {name: value(named[name])})


OTHERS: dict[str, Callable[..., Any]] = {
    "shape": replaced(0, lambda x: numbers(1, 9)),
    "rank": replaced(0, lambda x: numbers(1, 8, 1)),
    "strides": replaced(0, lambda x: numbers(1, 16)[::2]),
    "alignment": replaced(3, lambda x: numbers(1, 9)[1:]),
    "dtype": replaced(0, lambda x: x.to(torch.int32)),
    "gradient": replaced(3, lambda x: x.requires_grad_()),
    "a value for a tensor": replaced(0, lambda x: None),
    "a tensor for a value": replaced(1, lambda x: numbers(1)),
    "text": replaced(4, lambda x: "sum"),
    "another kind of object": replaced(2, lambda x: OtherParts(x.parts)),
    "a value in an object": replaced(2, lambda x: Parts((x.parts[0], 4, *x.parts[2:]))),
    "a tensor in an object": replaced(2, lambda x: Parts((x.parts[0].double(), *x.parts[1:]))),
    "a deeper tensor": replaced(2, lambda x: Parts((*x.parts[:2], Parts((numbers(1, 3),)), 0.5))),
    "more in an object": replaced(2, lambda x: Parts((*x.parts, None))),
    "less in an object": replaced(2, lambda x: Parts(x.parts[:3])),
    "a tensor in a named object": renamed("packing", lambda x: Parts((x.parts[0][:4], x.parts[1]))),
    "a named tensor": renamed("state", lambda x: x[:7]),
    "a named value": renamed("scale", lambda x: 2.5),
    "the type of a named value": renamed("scale", lambda x: 2),
    "a named dtype": renamed("dtype", lambda x: torch.bfloat16),
    "not a number": renamed("scale", lambda x: float("nan")),
    "one more": lambda args, named: ((*args, None), named),
    "one less": lambda args, named: (args[:-1], named),
    "one more by name": lambda args, named: (args, named | {"eps": 1.0}),
    "one less by name": lambda args, named: (args, {n: named[n] for n in ("packing", "state", "scale")}),
    "another name": lambda args, named: (args, {n + "s" if n == "state" else n: x for n, x in named.items()}),
    "another order of names": lambda args, named: (args, dict(reversed(named.items()))),
    "none by name": lambda args, named: (args, {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_call_that_differs_is_missed(other: str, table: Table) -> None:
    args, named = call()
    learn(table, *args, **named)
    args, named = OTHERS[other](*call(1))
    assert known_of(args, named)[0] not in table
    assert table.replay(args, named) is MISS


def test_true_is_not_one(table: Table) -> None:
    x = numbers(0)
    learn(table, x, 1)
    assert table.replay((x, 1), {}) is not MISS
    assert table.replay((x, True), {}) is MISS and table.replay((x, 1.0), {}) is MISS


def test_the_only_tensor_may_lie_at_an_odd_address(table: Table) -> None:
    learn(table, numbers(0, 9)[1:], numbers(1))
    assert table.replay((numbers(2, 9)[1:], numbers(3)), {}) is not MISS
    assert table.replay((numbers(2), numbers(3)), {}) is MISS
    assert table.replay((numbers(2, 9)[1:], numbers(3, 9)[1:]), {}) is MISS


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu"), lambda: torch.utils._python_dispatch.TorchDispatchMode()]
)
def test_modes_are_other_calls(mode: Callable[[], Any], table: Table) -> None:
    args, named = call()
    learn(table, *args, **named)
    with mode():
        assert table.replay(args, named) is MISS
    assert table.replay(args, named) is not MISS


def test_transforms_and_tangents_are_other_calls(table: Table) -> None:
    x = numbers(0)
    learn(table, x)
    seen: list[bool] = []
    torch.func.vmap(lambda y: seen.append(table.replay((x,), {}) is MISS) or y)(numbers(1, 2, 8))
    with torch.autograd.forward_ad.dual_level():
        seen.append(table.replay((x,), {}) is MISS)
    assert seen == [True, True]


class Wrapped(Tensor):
    pass


def test_subclasses_are_other_calls(table: Table) -> None:
    x = numbers(0)
    learn(table, x)
    assert table.replay((nn.Parameter(x, requires_grad=False),), {}) is MISS
    assert table.replay((x.as_subclass(Wrapped),), {}) is MISS


def test_the_last_few_of_a_size_are_known(table: Table) -> None:
    values = range(1, FEW + 2)
    for n in values:
        learn(table, numbers(n), n)
    assert [table.replay((numbers(n), n), {}) is MISS for n in values] == [True, *[False] * FEW]
    learn(table, numbers(1), 1)
    assert [table.replay((numbers(n), n), {}) is MISS for n in values] == [False, True, *[False] * (FEW - 1)]


def test_all_sizes_are_known(table: Table) -> None:
    """Of the first argument, which need not be a tensor, nor be given by place."""
    sizes = range(1, 3 * FEW)
    for n in sizes:
        learn(table, numbers(n, n))
    learn(table, 1, numbers(0))
    learn(table, x=numbers(0))
    assert not any(table.replay((numbers(n, n),), {}) is MISS for n in sizes)
    assert table.replay((1, numbers(1)), {}) is not MISS and table.replay((), {"x": numbers(1)}) is not MISS
    replay_known.forget()
    assert all(table.replay((numbers(n, n),), {}) is MISS for n in sizes)


def test_nothing_is_known_when_all_is_forgotten(table: Table) -> None:
    x = numbers(0)
    learn(table, x)
    known, before = next(iter(table.values())), table.emptied
    replay_known.forget()
    assert table.replay((x,), {}) is MISS
    table.hasten(known, (x,), {}, before)  # by a thread that had found it before
    assert table.replay((x,), {}) is MISS
    learn(table, x)
    assert table.replay((x,), {}) is not MISS


def test_a_look_is_not_taken_when_all_is_forgotten_meanwhile(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another thread that leaves `use`, while the look is written."""
    x, look = numbers(0), replay_known.quick_look
    monkeypatch.setattr(replay_known, "quick_look", lambda *arguments: (replay_known.forget(), look(*arguments))[1])
    learn(table, x)
    assert table.replay((x,), {}) is MISS


def test_what_torch_tells_apart_is_known_side_by_side(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it has one signature; and looks are written once, however often calls of one kind follow those of another."""
    written: list[bool] = []
    look = replay_known.quick_look
    monkeypatch.setattr(replay_known, "quick_look", lambda *arguments: (written.append(True), look(*arguments))[1])
    x = numbers(0)
    kinds = (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16))
    with torch.no_grad():
        for _ in range(3):
            for mode in kinds:
                with mode():
                    if table.replay((x,), {}) is MISS:
                        learn(table, x)
                    assert table.replay((x,), {}) is not MISS
        assert len(table) == 1 and len(written) == len(kinds)
        for n in range(FEW):
            learn(table, x, n)
        for mode in kinds:
            with mode():
                assert table.replay((x,), {}) is MISS
                learn(table, x)
                assert table.replay((x,), {}) is not MISS
        assert len(written) == len(kinds) + FEW


def test_a_stride_of_one_number_matters_as_in_a_signature(table: Table) -> None:
    """Not in a contiguous tensor."""
    row, column = numbers(0, 1, 8), numbers(0, 8, 3)[:, :1]
    learn(table, row, column)
    for other, known in (((numbers(1, 2, 3, 8)[:1, 0], column), True), ((row, column.as_strided((8, 1), (3, 2))), False)):
        assert row.stride() != other[0].stride() or column.stride() != other[1].stride()
        assert (known_of(other, {})[0] in table) == known
        assert (table.replay(other, {}) is not MISS) == known


def test_nested_tensors_are_other_calls(table: Table) -> None:
    """At which torch's comparison ends the process."""
    with pytest.warns(UserWarning, match="prototype"):
        nested = torch.nested.nested_tensor([numbers(0), numbers(1)])
    x, w = numbers(0, 2, 8), numbers(1, 2, 8)
    learn(table, x, w=w)
    for args, named in (((nested,), {"w": w}), ((x,), {"w": nested})):
        assert table.replay(args, named) is MISS


@pytest.mark.parametrize("missing", ["guards", "arguments"])
def test_torch_may_have_no_such_comparison(missing: str, table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "guards":
        monkeypatch.delattr(torch._C, "_dynamo")
    else:
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", lambda *tensors: None)
    learn(table, numbers(0))
    assert table.replay((numbers(0),), {}) is MISS
