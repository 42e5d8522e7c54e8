"""Launches written down once, and buffers in one allocation: what later calls hand to the compiled kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gdn.core import portable_schedule
from gdn.core.portable_schedule import Schedule
from gdn.core.portable_workspace import Workspace
from gdn.ops.delta_rule import portable
from gdn.ops.delta_rule.problems import Problem

F32, BF16, BYTES = torch.float32, torch.bfloat16, torch.uint8


class Compiled:
    """Stands for a compiled kernel and notes what it is run with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, name: str, runs: list[tuple[Any, ...]]) -> None:
        self.name, self.runs = name, runs

    def run(self, *args: Any) -> None:
        assert args[1:9] == (1, 1, "stream", "function", "metadata", None, None, None)
        self.runs.append((self.name, args[0], *args[9:]))


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], list[Any]]:
    """What first runs give to `launch`, as addresses, and what later runs give to the compiled kernels."""
    first: list[Any] = []
    later: list[Any] = []

    def launch(kernel: Any, grid: tuple[int], *args: Any, **options: Any) -> Compiled:
        first.append((kernel.fn.__name__, *grid, *(x.data_ptr() if isinstance(x, Tensor) else x for x in args)))
        return Compiled(kernel.fn.__name__, later)

    monkeypatch.setattr(portable_schedule, "launch", launch)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: "stream", raising=False)
    return first, later


class Kernel:
    """Stands for a kernel before it is compiled."""

    def __init__(self, *parameters: str) -> None:
        self.arg_names = list(parameters)

    @staticmethod
    def fn() -> None:
        pass


def is_address(number: Any) -> bool:
    return isinstance(number, int) and number > 2**20


def test_buffers_are_aligned_and_lie_apart() -> None:
    workspace = Workspace(
        {"a": ((3, 5), F32), "none": ((0, 7), F32), "b": ((1,), BYTES)}, {"c": ((70,), BF16)}, {"d": ((9,), F32), "e": ((), F32)}
    )
    space = workspace.allocate(torch.empty(0))
    views, at = workspace.views(space), workspace.addresses(space)
    assert space.shape == (workspace.size,) == (512 + 512,)
    assert [(n, tuple(x.shape), x.dtype) for n, x in views.items()] == [(n, *each) for n, each in workspace.buffers.items()]
    assert all(views[name].data_ptr() == at[name] for name in views if name != "none")
    assert {name: place - space.data_ptr() for name, place in at.items()} == {"a": 0, "none": 256, "b": 256, "c": 512, "d": 512, "e": 768}


def test_two_buffers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two buffers are called a"):
        Workspace({"a": ((1,), F32)}, {"a": ((2,), F32)})


def test_later_runs_hand_over_addresses(launched: tuple[list[Any], list[Any]]) -> None:
    first, later = launched
    schedule = Schedule(T=7, HV=2)
    schedule.add(Kernel("x", "inner", "absent", "T", "B", "HV"), 3, warps=4, names={"inner": "hidden"}, B=16)
    schedule.add(Kernel("hidden", "x", "HV", "T"), 5, warps=4, T=8)
    workspace = Workspace({"begin": ((1,), F32), "hidden": ((2,), F32)})
    for _ in range(3):
        x, space = torch.zeros(4), workspace.allocate(torch.empty(0))
        hidden = space.data_ptr() + 256
        first.clear()
        later.clear()
        schedule.run({"x": x, "absent": None}, (workspace, space))
        done = later or [tuple(0 if n == 4 and a is None else a for n, a in enumerate(call)) for call in first]
        assert done == [("fn", 3, x.data_ptr(), hidden, 0, 7, 16, 2), ("fn", 5, hidden, x.data_ptr(), 2, 8)]
    assert later and not first


@pytest.mark.parametrize(
    ("parameters", "values", "message"),
    [
        (("x", "y", "T"), {"T": 1, "B": 2}, "fn has no parameter B"),
        (("x", "T", "y"), {"T": 1}, "expected two or more buffers before all values, got the buffers x, y"),
        (("x", "T"), {"T": 1}, "expected two or more buffers before all values, got the buffers x"),
    ],
)
def test_arguments_that_do_not_fit_a_kernel_are_named(parameters: tuple[str, ...], values: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Schedule().add(Kernel(*parameters), 1, warps=4, **values)


@pytest.mark.parametrize("segment", [None, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_the_delta_rule_gives_the_same_arguments_in_every_call(
    launched: tuple[list[Any], list[Any]], monkeypatch: pytest.MonkeyPatch, segment: int | None, packed: bool
) -> None:
    """Addresses of tensors that are there before the call, and all values, kernel by kernel."""
    first, later = launched
    if segment is not None:
        monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: segment)
    monkeypatch.setattr(portable, "slab_chunks", lambda *sizes: 1)
    portable.plan.cache_clear()
    problem = Problem(name="", T=330, H=1, HV=2, K=16, V=32, initial=True, lengths=(130, 200) if packed else None)
    inputs = problem.build(dtype=BF16) | {"scale": 0.5, "packing": None} | ({} if not packed else {"packing": problem.build()["packing"]})
    names = ("q", "k", "v", "g", "beta", "scale", "initial_state", "packing")
    there = {x.data_ptr() for x in inputs.values() if isinstance(x, Tensor)}

    def call() -> None:
        o, final = portable.gated_delta_rule(*(inputs[name] for name in names))
        torch.autograd.grad((o, final), [inputs[n] for n in names[:5]], (torch.zeros_like(o), torch.zeros_like(final)))

    call()
    assert first and not later
    before, kernels = list(first), len(first)
    first.clear()
    call()
    portable.plan.cache_clear()
    assert not first and len(later) == kernels
    for a, b in zip(before, later, strict=True):
        assert a[:2] == b[:2] and len(a) == len(b)
        for x, y in zip(a[2:], b[2:], strict=True):
            fresh = x not in there and y not in there and (x == 0 or is_address(x)) and is_address(y)  # an empty tensor is at 0
            assert x == y or x is None or fresh
