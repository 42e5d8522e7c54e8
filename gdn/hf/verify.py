"""Whether a conversion kept everything: equal logits, and equal bytes on the way back."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn.hf.convert import convert, load

STOCK = ("qwen3_5_text", "qwen3_next", "olmo_hybrid", "gdn")
"""Families whose models transformers itself opens (with this package's class for the last)."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    opened_by: str
    logits_error: float
    """Largest difference of logits over the largest logit."""
    changed: tuple[str, ...]
    """Tensors of the source that are not the same bytes after the way back; empty where there is no way back, or nothing changed."""
    compared: int
    """Tensors compared; 0 where the source's family cannot express what the target's can."""


@torch.no_grad()
def verify(source: str | Path, target: str | Path, source_family: str, target_family: str, *, length: int = 64) -> Verification:
    """Read both checkpoints, compare logits of the same random tokens, and convert back to compare bytes.

    Args:
        source, target: what `convert` read and wrote.
        source_family, target_family: their families.
        length: tokens to compare.
    """
    mine = load(source).eval()
    tokens = torch.randint(mine.config.vocab, (2, length), generator=torch.Generator().manual_seed(0))
    expected = mine(tokens).logits
    assert expected is not None
    opened_by, found = _logits(target, target_family, tokens)
    error = (found.double() - expected.double()).abs().max() / expected.double().abs().max()
    with tempfile.TemporaryDirectory() as folder:
        convert(target, Path(folder) / "back", source_family)
        before, after = _tensors(Path(source)), _tensors(Path(folder) / "back")
        changed = tuple(sorted(n for n in before if n not in after or not _same(before[n], after[n])))
    return Verification(opened_by, float(error), changed, len(before))


def _logits(folder: str | Path, family: str, tokens: Tensor) -> tuple[str, Tensor]:
    if family not in STOCK:
        model: Any = load(folder).eval()
        return "gdn", model(tokens).logits
    from transformers import AutoModelForCausalLM

    import gdn.hf  # noqa: F401  registers the class of "gdn" folders

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    return type(model).__name__, model(tokens, use_cache=False).logits


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    inside = folder if any(folder.glob("*.safetensors")) else folder / "model"
    return {name: tensor for path in sorted(inside.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
