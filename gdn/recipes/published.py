"""The paper's runs: FineWeb-Edu, rows of 4096 tokens, half a million tokens an update (arXiv 2412.06464, section 4 and its code).

The official code packs rows without document boundaries and decays every parameter; here boundaries are kept and gates, norms and biases
are not decayed. The tokenizer is a `tokenizer.json` with 32 000 tokens (Llama 2 in the paper), given as `--data.tokenizer`.
"""

from __future__ import annotations

from gdn.data import DataConfig
from gdn.models.sizes import size
from gdn.train import AdamW, Schedule, Trainer

TOKENS_PER_UPDATE = 524_288
LENGTH = 4096


def gdn_0_4b() -> Trainer.Config:
    """The official 0.4B model on 15 billion tokens of FineWeb-Edu."""
    return _published("gdn_0.4b", tokens=15_000_000_000)


def gdn_1_3b() -> Trainer.Config:
    """The official 1.3B model on 100 billion tokens of FineWeb-Edu."""
    return _published("gdn_1.3b", tokens=100_000_000_000)


def _published(name: str, *, tokens: int) -> Trainer.Config:
    steps, batch = tokens // TOKENS_PER_UPDATE, 8
    return Trainer.Config(
        model=size(name),
        data=DataConfig(source="hf:HuggingFaceFW/fineweb-edu", tokenizer="tokenizer.json", length=LENGTH, batch=batch),
        optim=AdamW(lr=4e-4),
        schedule=Schedule(warmup=steps // 100),
        steps=steps,
        accumulate=TOKENS_PER_UPDATE // (batch * LENGTH),
        precision="bf16",
        compile=True,
        validate_every=1000,
        directory=f"runs/{name}",
    )
