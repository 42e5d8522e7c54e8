"""`gdn convert --check` measures and prints what a conversion kept, and fails where it did not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdn.cli import main
from gdn.hf.verify import verify
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.models.store import save_model


def test_a_conversion_is_measured_and_a_wrong_one_is_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = GatedDeltaNet.Config(heads=2, head_dim=8, beta_bias=False)
    torch.manual_seed(0)
    run, qwen, ours = tmp_path / "run", tmp_path / "qwen", tmp_path / "ours"
    save_model(LM(LM.Config(vocab=33, width=24, layers=2, mlp=40, pattern=(layer,), norm_offset=1.0)), run)
    assert main(["convert", str(run), str(qwen), "--to", "qwen3_5_text", "--check"]) == 0
    printed = capsys.readouterr().out
    assert "run -> qwen3_5_text: " in printed
    assert "opened by Qwen3_5ForCausalLM" in printed
    assert "the same bytes" in printed
    around_one = tmp_path / "around one"
    save_model(LM(LM.Config(vocab=33, width=24, layers=2, mlp=40, pattern=(layer,))), around_one)
    assert main(["convert", str(around_one), str(tmp_path / "qwen2"), "--to", "qwen3_5_text", "--check"]) == 0
    assert "the same bytes but for 5 norms, which are stored around another constant and mean the same" in capsys.readouterr().out
    assert main(["convert", str(qwen), str(ours), "--to", "gdn", "--check"]) == 0
    assert "opened by GdnForCausalLM" in capsys.readouterr().out
    file = qwen / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.1.linear_attn.A_log"] += 1
    save_file(weights, file, metadata={"format": "pt"})
    found = verify(run, qwen, "run", "qwen3_5_text")
    assert found.logits_error > 1e-4
    assert found.changed == ("blocks.1.mixer.A_log",)
    assert main(["convert", str(run), str(tmp_path / "nv"), "--to", "nvlabs"]) == 1
    assert "cannot express" in capsys.readouterr().err
