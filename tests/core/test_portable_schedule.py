"""Launches by name, and buffers in one allocation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from gdn.core import portable_schedule
from gdn.core.portable_schedule import Schedule
from gdn.core.portable_workspace import Workspace

F32, BF16, BYTES = torch.float32, torch.bfloat16, torch.uint8


class Kernel:
    """Stands for a kernel before it is compiled."""

    def __init__(self, *parameters: str) -> None:
        self.arg_names = list(parameters)

    @staticmethod
    def fn() -> None:
        pass


def test_buffers_are_aligned_and_lie_apart() -> None:
    workspace = Workspace(
        {"a": ((3, 5), F32), "none": ((0, 7), F32), "b": ((1,), BYTES)}, {"c": ((70,), BF16)}, {"d": ((9,), F32), "e": ((), F32)}
    )
    space = workspace.allocate(torch.empty(0))
    views = workspace.views(space)
    assert space.shape == (workspace.size,) == (512 + 512,)
    assert [(n, tuple(x.shape), x.dtype) for n, x in views.items()] == [(n, *each) for n, each in workspace.buffers.items()]
    places = {name: view.storage_offset() * view.element_size() for name, view in views.items()}
    assert places == {"a": 0, "none": 256, "b": 256, "c": 512, "d": 512, "e": 768}


def test_two_buffers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="two buffers are called a"):
        Workspace({"a": ((1,), F32)}, {"a": ((2,), F32)})


def test_a_launch_gets_buffers_by_name_and_values_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[Any] = []
    monkeypatch.setattr(portable_schedule, "launch", lambda kernel, grid, *args, **options: launched.append((*grid, *args, options)))
    schedule = Schedule(T=7, HV=2)
    schedule.add(Kernel("x", "inner", "absent", "T", "B", "HV"), 3, warps=4, names={"inner": "hidden"}, B=16)
    schedule.add(Kernel("hidden", "x", "HV", "T"), 5, warps=8, stages=2, registers=168, T=8)
    workspace = Workspace({"begin": ((1,), F32), "hidden": ((2,), F32)})
    x, space = torch.zeros(4), workspace.allocate(torch.empty(0))
    schedule.run({"x": x, "absent": None}, (workspace, space))
    hidden = space.data_ptr() + 256
    found = [tuple(a.data_ptr() if isinstance(a, Tensor) else a for a in call) for call in launched]
    assert found == [
        (3, x.data_ptr(), hidden, None, 7, 16, 2, {"warps": 4, "stages": 1, "registers": None}),
        (5, hidden, x.data_ptr(), 2, 8, {"warps": 8, "stages": 2, "registers": 168}),
    ]


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
