"""Devices by name, and names that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gdn.core import device as hardware
from gdn.core.device import named_device
from gdn.core.errors import ArgumentError


def test_names_of_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(named_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == ["cuda", "cpu", "cuda", "cuda:1"]
    with pytest.raises(ArgumentError, match=r'got "cuda:2".* finds 2 CUDA device'):
        named_device("cuda:2")


def test_a_device_that_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert str(named_device("auto")) == "cpu"
    with pytest.raises(ArgumentError, match=r'got "cuda".* finds 0 CUDA device'):
        named_device("cuda")


@pytest.mark.parametrize("name", ["tpu", "", "cpu:0", "cuda:x", "cuda:-1"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ArgumentError, match='expected "auto", "cpu", "cuda" or "cuda:1"'):
        named_device(name)
    with pytest.raises(ArgumentError, match='Did you mean "cuda"'):
        named_device("cudda")


@pytest.mark.parametrize(
    ("capability", "kib", "room"),
    [
        ((9, 0), 227, hardware.HOPPER),
        ((8, 0), 163, hardware.AMPERE),
        ((8, 9), 99, hardware.SMALL),
        ((12, 0), 99, hardware.SMALL),
        ((10, 0), 227, hardware.AMPERE),
        ((9, 0), 64, hardware.SMALL),
    ],
)
def test_room_of_a_program(capability: tuple[int, int], kib: int, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An RTX 4090 and a 5090 are small; a B200 has as much as an H200, but other tensor cores; an AMD GPU calls itself 9.0."""
    properties = SimpleNamespace(shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=kib * 1024)
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", capability),
        ("get_device_properties", properties),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *index, value=value: value)
    for function in (hardware.room, hardware.capability):
        monkeypatch.setattr(hardware, function.__name__, function.__wrapped__)
    assert hardware.room(0) == room


def test_room_without_a_gpu_is_what_the_rules_were_measured_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(hardware, "room", hardware.room.__wrapped__)
    assert hardware.room(0) == hardware.HOPPER
