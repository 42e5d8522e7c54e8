"""What test_remote_code.py does in a process that knows nothing of this package."""

from __future__ import annotations

import sys
from pathlib import Path

import torch


def open_and_read(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    assert not any(name.partition(".")[0] == "gdn" for name in sys.modules)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", trust_remote_code=True)
    torch.save(model(torch.load(folder / "x")).logits, folder / "y")
