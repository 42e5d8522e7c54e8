"""A folder with its own code opens in a process that never imported gdn.hf."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from small import causal, tokens

from gdn.core.errors import CheckpointError
from gdn.hf import add_remote_code

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])
"""


def test_another_process_opens_the_folder_by_its_own_code(tmp_path) -> None:
    model, x = causal(), tokens()
    model.save_pretrained(tmp_path / "model")
    add_remote_code(tmp_path / "model")
    torch.save(x, tmp_path / "x")
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model"), str(tmp_path / "x"), str(tmp_path / "y")]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "y"), model(x).logits)


def test_other_folders_are_refused(tmp_path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        add_remote_code(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="expected the model_type"):
        add_remote_code(tmp_path)
