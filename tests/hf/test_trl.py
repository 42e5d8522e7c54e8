"""TRL's SFTTrainer: packed rows stay apart, the loss falls, and a run that stopped goes on as if it had not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from small import causal, tokens
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from gdn.hf.adapters import lora_targets


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(17)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")


def trainer(folder: Path, steps: int, model: Any = None, adapters: Any = None) -> SFTTrainer:
    texts = [tokens(1, n, seed=i)[0] for i, n in enumerate((5, 9, 14, 3, 20, 7, 11, 2, 13, 8) * 3)]
    rows = Dataset.from_dict({"text": [" ".join(f"w{t}" for t in text.tolist()) for text in texts]})
    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=steps,
        max_length=24,
        packing=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=1,
    )
    return SFTTrainer(model or causal("hybrid").train(), arguments, train_dataset=rows, processing_class=tokenizer(), peft_config=adapters)


def test_it_trains_on_packed_rows_and_resumes(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", 6)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(map(math.isfinite, losses)) and losses[-1] < losses[0] - 0.1
    trainer(tmp_path / "resumed", 3).train()
    again = trainer(tmp_path / "resumed", 6)
    again.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_of_a_packed_batch_is_that_of_its_documents(tmp_path: Path, tied: bool) -> None:
    model = causal("hybrid", tie_word_embeddings=tied)
    run = trainer(tmp_path, 1, model)
    model.eval()
    batch = dict(next(iter(run.get_train_dataloader())))
    row, starts = batch["input_ids"], (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert row.shape[0] == 1 and len(starts) == 4
    summed, count = 0.0, 0
    with torch.no_grad():
        for begin, end in zip(starts, [*starts[1:], row.shape[1]]):
            logits = model(row[:, begin:end]).logits[0, :-1]
            summed += F.cross_entropy(logits, row[0, begin + 1 : end], reduction="sum").item()
            count += end - begin - 1
        assert run.compute_loss(model, batch).item() == pytest.approx(summed / count, rel=1e-5)


def test_adapters_train_on_packed_rows(tmp_path: Path) -> None:
    model = causal("hybrid").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, 3, model, peft.LoraConfig(r=2, target_modules=lora_targets(model)))
    run.train()
    assert all(math.isfinite(entry["loss"]) for entry in run.state.log_history if "loss" in entry)
    moved = [p.abs().max().item() > 0 for name, p in run.model.named_parameters() if "lora_B" in name]
    assert len(moved) > 10 and all(moved)
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
