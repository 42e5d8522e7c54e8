"""Models and tokenizers for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import torch

from gdn.data import ByteTokenizer, train_bpe
from gdn.data.tokenizer import Tokenizer
from gdn.mixers.attention import Attention
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.models.store import save_model

LINEAR = (GatedDeltaNet.Config(heads=2, head_dim=8),)
HYBRID = (*LINEAR, Attention.Config(heads=2, head_dim=4, window=5), Attention.Config(heads=2, head_dim=4))
PATTERNS = {"linear": LINEAR, "hybrid": HYBRID}

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen and so it goes on and on "


def tokenizer(kind: str, folder: Path) -> Tokenizer:
    return ByteTokenizer() if kind == "bytes" else train_bpe([WORDS * 20], 300, folder / "bpe")


def model(pattern: str = "linear", vocab: int = 300, seed: int = 0) -> LM:
    """Far from uniform, so that scores differ."""
    torch.manual_seed(seed)
    made = LM(LM.Config(vocab=vocab, width=24, layers=3, mlp=32, pattern=PATTERNS[pattern], tie_embeddings=False)).eval()
    with torch.no_grad():
        made.head.weight.mul_(30)
    return made


def run(folder: Path, pattern: str = "linear", kind: str = "bytes") -> Path:
    """A run folder; its weights are float64, so that every way of reading gives the same digits."""
    save_model(model(pattern).double(), folder / "run" / "model")
    tokenizer(kind, folder).save(folder / "run" / "model")
    return folder / "run"
