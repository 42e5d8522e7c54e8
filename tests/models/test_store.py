"""Models as folders: what a full disk and damaged files do."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from gdn.core.errors import CheckpointError
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.models.store import CONFIG, WEIGHTS, load_model, save_model

TINY = LM.Config(vocab=17, width=24, layers=1, mlp=32, pattern=(GatedDeltaNet.Config(heads=2, head_dim=8),))


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can become longer than `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 5000])
def test_a_full_disk_is_named_and_leaves_what_was_there(tmp_path: Path, size: int) -> None:
    model = LM(TINY)
    save_model(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    torch.nn.init.zeros_(model.norm.weight)
    with room_for(size), pytest.raises(CheckpointError, match=r"cannot write .*(too large|space)"):
        save_model(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_files_are_named(tmp_path: Path) -> None:
    save_model(LM(TINY), tmp_path)
    weights = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS} cannot be read"):
        load_model(tmp_path)
    (tmp_path / CONFIG).write_text('{"vocab": 17,')
    with pytest.raises(CheckpointError, match=rf"{CONFIG} cannot be read"):
        load_model(tmp_path)
