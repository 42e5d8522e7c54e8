"""Devices by name, and names that are refused."""

from __future__ import annotations

import pytest
import torch

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
