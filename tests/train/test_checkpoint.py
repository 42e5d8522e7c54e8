from __future__ import annotations

import errno
import json
import os
import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from gdn.core.errors import CheckpointError
from gdn.models.lm import LM
from gdn.models.store import load_model
from gdn.train import checkpoint, random_state
from gdn.train.distributed import World
from gdn.train.optim import AdamW

WORLD = World(device=torch.device("cpu"))


def trained(model: LM, steps: int = 2) -> torch.optim.Optimizer:
    """Its optimizer after some steps."""
    optimizer = AdamW(lr=0.01).build(model)
    tokens = torch.arange(16).reshape(2, 8)
    for _ in range(steps):
        loss = model(tokens, targets=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def save(run: Path, step: int, model: LM, optimizer: torch.optim.Optimizer) -> Path:
    return checkpoint.save(run, step, model, optimizer, local={"step": step, "third": 1 / 3}, config={"a": 1}, world=WORLD)


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / checkpoint.FOLDER).iterdir())


def test_model_and_optimizer_come_back_bit_for_bit(tmp_path: Path, lm: LM) -> None:
    optimizer = trained(lm)
    folder = save(tmp_path, 2, lm, optimizer)
    other = LM(lm.config)
    moments = trained(other, steps=1)
    assert checkpoint.load(folder, other, moments, world=WORLD) == {"step": 2, "third": 1 / 3}
    for (name, a), (_, b) in zip(lm.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    for a, b in zip(optimizer.state.values(), moments.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
    assert [g["weight_decay"] for g in moments.param_groups] == [0.1, 0.0]
    assert json.loads((folder / checkpoint.RUN).read_text()) == {"a": 1}


def test_an_optimizer_that_has_not_stepped_can_be_filled(tmp_path: Path, lm: LM) -> None:
    folder = save(tmp_path, 2, lm, trained(lm))
    other = LM(lm.config)
    checkpoint.load(folder, other, AdamW(lr=0.01).build(other), world=WORLD)
    assert all(torch.equal(a, b) for a, b in zip(lm.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_latest_is_found_and_old_ones_go(tmp_path: Path, lm: LM) -> None:
    assert checkpoint.latest(tmp_path) is None
    optimizer = trained(lm)
    for step in (5, 10, 15):
        save(tmp_path, step, lm, optimizer)
    newest = tmp_path / "checkpoints" / "step_00000015"
    checkpoint.prune(newest, 0)
    assert len(names(tmp_path)) == 3
    checkpoint.prune(newest, 2)
    assert names(tmp_path) == ["step_00000010", "step_00000015"]
    assert checkpoint.latest(tmp_path) == newest


def test_a_flawed_checkpoint_of_a_later_step_does_not_push_out_a_good_one(tmp_path: Path, lm: LM) -> None:
    optimizer = trained(lm)
    cut(save(tmp_path, 10, lm, optimizer))
    good = save(tmp_path, 5, lm, optimizer)
    checkpoint.prune(good, 1)
    assert names(tmp_path) == [good.name]
    assert checkpoint.latest(tmp_path) == good


def cut(folder: Path) -> None:
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])


def flip(folder: Path) -> None:
    data = next(folder.glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


FAULTS = {
    "it has no manifest.json": lambda folder: (folder / checkpoint.MANIFEST).unlink(),
    "manifest.json cannot be read": lambda folder: (folder / checkpoint.MANIFEST).write_text('{"step": 1'),
    ".metadata is missing": lambda folder: (folder / ".metadata").unlink(),
    "bytes instead of": cut,
    "the checksum of __0_0.distcp is wrong": flip,
}


@pytest.mark.parametrize("flaw", FAULTS)
def test_a_flawed_checkpoint_is_passed_over_with_a_word(tmp_path: Path, lm: LM, flaw: str) -> None:
    optimizer = trained(lm)
    good, bad = save(tmp_path, 5, lm, optimizer), save(tmp_path, 10, lm, optimizer)
    FAULTS[flaw](bad)
    told: list[str] = []
    assert checkpoint.latest(tmp_path, told.append) == good
    assert len(told) == 1
    assert bad.name in told[0]
    assert flaw in told[0]


def test_a_partial_folder_is_no_checkpoint_and_is_cleared_away(tmp_path: Path, lm: LM) -> None:
    whole = save(tmp_path, 5, lm, trained(lm))
    whole.rename(whole.with_name("step_00000009.partial"))
    assert checkpoint.latest(tmp_path) is None
    checkpoint.prune(whole, 1)
    assert names(tmp_path) == []


def test_saving_a_step_again_replaces_it(tmp_path: Path, lm: LM) -> None:
    save(tmp_path, 5, lm, trained(lm))
    folder = save(tmp_path, 5, lm, trained(lm))
    assert checkpoint.defect(folder) is None
    assert names(tmp_path) == [folder.name]


def assert_refused(run: Path, lm: LM, optimizer: torch.optim.Optimizer) -> None:
    """A checkpoint of step 10 fails for want of room; that of step 5 is whole and nothing else is there."""
    with pytest.raises(CheckpointError, match=r"step_00000010: the disk is full .*Earlier checkpoints are untouched"):
        save(run, 10, lm, optimizer)
    assert names(run) == ["step_00000005"]
    assert checkpoint.defect(run / "checkpoints" / "step_00000005") is None


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, lm: LM) -> None:
    """A limit on the size of files: the write itself fails, deep inside torch."""
    optimizer = trained(lm)
    save(tmp_path, 5, lm, optimizer)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        assert_refused(tmp_path, lm, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    save(tmp_path, 10, lm, optimizer)


@pytest.mark.parametrize("function", ["fsync", "replace", "mkdir"])
def test_a_disk_that_is_full_at_any_call(tmp_path: Path, lm: LM, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    optimizer = trained(lm)
    save(tmp_path, 5, lm, optimizer)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        assert_refused(tmp_path, lm, optimizer)


def test_another_failure_is_not_called_a_full_disk(tmp_path: Path, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "fsync", denied)
    with pytest.raises(CheckpointError, match=r"cannot write .*PermissionError") as caught:
        save(tmp_path, 5, lm, trained(lm))
    assert "full" not in str(caught.value)
    assert "untouched" not in str(caught.value), "there are none"


def test_ctrl_c_inside_torch_is_still_ctrl_c(tmp_path: Path, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5, lm, trained(lm))
    assert names(tmp_path) == []


def test_another_number_of_processes_is_refused(tmp_path: Path, lm: LM) -> None:
    optimizer = trained(lm)
    folder = save(tmp_path, 5, lm, optimizer)
    with pytest.raises(CheckpointError, match=r"written by 1 process\(es\) and this run has 2"):
        checkpoint.load(folder, lm, optimizer, world=World(rank=0, size=2, device=torch.device("cpu")))


def test_an_exported_model_is_the_model(tmp_path: Path, lm: LM) -> None:
    trained(lm)
    checkpoint.export(lm, lm.config, tmp_path, world=WORLD)
    other = load_model(tmp_path)
    tokens = torch.arange(8).reshape(1, 8)
    assert torch.equal(other(tokens).logits, lm(tokens).logits)


def test_random_states_come_back_through_json() -> None:
    random_state.seed(3)
    state = json.loads(json.dumps(random_state.capture()))

    def draws() -> list[float]:
        return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), float(torch.randn(1)), float(torch.randn(1))]

    first = draws()
    random_state.restore(state)
    assert draws() == first
    random_state.seed(3)
    assert draws() == first
