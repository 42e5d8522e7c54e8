"""A folder with its own code opens in a process that never imported gdn.hf."""

from __future__ import annotations

import json
from pathlib import Path

import fresh
import opening
import pytest
import torch
from small import causal, tokens

from gdn.core.errors import CheckpointError
from gdn.hf import add_remote_code


def test_another_process_opens_the_folder_by_its_own_code(tmp_path: Path) -> None:
    model, x = causal(), tokens()
    model.save_pretrained(tmp_path / "model")
    add_remote_code(tmp_path / "model")
    torch.save(x, tmp_path / "x")
    ended = fresh.run(opening.open_and_read, tmp_path)
    assert ended.status == 0, ended.output
    assert torch.equal(torch.load(tmp_path / "y"), model(x).logits)


def test_other_folders_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        add_remote_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="expected the model_type"):
        add_remote_code(tmp_path)
