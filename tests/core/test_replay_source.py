"""Straight-line replays: what is handed to a launcher, in which order things happen, and that one text serves all numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.core.replay_source import Run, Source, replaying


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: f"stream of {device}", raising=False)


def source_of(handed: list[Any], factor: float, shape: tuple[int, ...], *, packed: bool = False, device: int = 1) -> Run:
    source = Source(torch.device("cpu", device), given=2)
    source.allocate(2, shape, torch.empty(shape).stride(), torch.float32)
    source.allocate(3, (2, 3), (1, 2), torch.float32)
    arguments = [source.address(0), source.constant(factor), source.address(2), source.address(2, 8)]
    source.launch(lambda *given: handed.append(given), (7, 1, 1), ("function", None), arguments, packed)
    source.operator(4, torch.add, ["x0", source.constant(2)], {"alpha": source.constant(3)})
    source.operator(None, torch.Tensor.zero_, ["x1"], {})
    source.launch(lambda *given: handed.append(given), (1, 2, 3), (), [source.address(4)], packed)
    return replaying(source.finish([4, None, 2, 3]), given=2)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("own", [True, False], ids=["allocator of compiled graphs", "empty_strided"])
def test_everything_is_handed_on(packed: bool, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not own:
        monkeypatch.delattr(torch._C, "_dynamo")
    handed: list[Any] = []
    x, y = torch.ones(4), torch.ones(4)
    made, none, fresh, turned = source_of(handed, 2.5, (4, 5), packed=packed)([x, y])
    assert isinstance(made, Tensor) and isinstance(fresh, Tensor) and isinstance(turned, Tensor) and none is None
    assert torch.equal(made, torch.full((4,), 7.0)) and torch.equal(y, torch.zeros(4))
    assert fresh.shape == (4, 5) and fresh.is_contiguous() and turned.shape == (2, 3) and turned.stride() == (1, 2)
    first, second = (x.data_ptr(), 2.5, fresh.data_ptr(), fresh.data_ptr() + 8), (made.data_ptr(),)
    if packed:
        first, second = (first,), (second,)
    assert handed == [(7, 1, 1, "stream of 1", "function", None, *first), (1, 2, 3, "stream of 1", *second)]


def test_another_device_is_made_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]

    @contextlib.contextmanager
    def device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1])
    handed: list[Any] = []
    source_of(handed, 2.5, (4,), device=3)([torch.ones(4), torch.ones(4)])
    assert [each[3] for each in handed] == ["stream of 3"] * 2 and current == [1]


def test_one_text_serves_all_numbers() -> None:
    one, other = source_of([], 2.5, (4, 5)), source_of([], 3.5, (6,))
    assert one.__code__ is other.__code__ is not source_of([], 2.5, (4,), packed=True).__code__
