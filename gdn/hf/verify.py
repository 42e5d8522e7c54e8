"""Whether a conversion kept everything: equal logits, and equal bytes on the way back."""

from __future__ import annotations

import importlib
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn.core.device import has_package
from gdn.hf.convert import convert, load

STOCK = ("qwen3_5_text", "qwen3_next", "olmo_hybrid", "gdn")
"""Families whose models transformers itself opens (with this package's class for the last)."""

FLA = ("gated_deltanet", "delta_net", "gated_deltaproduct", "kda", "gla", "gsa", "retnet", "hgrn2", "mamba2")
"""Families that flash-linear-attention opens, on a GPU, where it is installed."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found."""

    opened_by: str
    logits_error: float
    """Largest difference of logits over the largest logit."""
    changed: tuple[str, ...]
    """Tensors of the source that are not the same bytes after the way back, but for `moved`."""
    moved: int
    """Norm weights that are stored around another constant after the way back, and mean the same to the last bit."""
    compared: int
    """Tensors compared."""


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
        shift = _norm_offset(Path(folder) / "back") - _norm_offset(Path(source))
        before, after = _tensors(Path(source)), _tensors(Path(folder) / "back")
    different = [n for n in sorted(before) if n not in after or not _same(before[n], after[n])]
    changed = [n for n in different if not (shift and n in after and n.endswith("norm.weight") and _same(before[n], after[n] + shift))]
    return Verification(opened_by, float(error), tuple(changed), len(different) - len(changed), len(before))


def _logits(folder: str | Path, family: str, tokens: Tensor) -> tuple[str, Tensor]:
    theirs = family in FLA and has_package("fla") and torch.cuda.is_available()
    if family not in STOCK and not theirs:
        model: Any = load(folder).eval()
        return "gdn", model(tokens).logits
    from transformers import AutoModelForCausalLM

    importlib.import_module("fla.models" if theirs else "gdn.hf")  # registers the classes that are not transformers' own
    device = "cuda" if theirs else "cpu"
    opened: Any = AutoModelForCausalLM.from_pretrained(folder)
    model = opened.eval().to(device)
    return type(model).__name__, model(tokens.to(device), use_cache=False).logits.cpu()


def _norm_offset(folder: Path) -> float:
    """What this package's own folders say that norm weights are stored around; other families have one constant for all."""
    config = (folder if (folder / "model.safetensors").is_file() else folder / "model") / "config.json"
    values = json.loads(config.read_text()) if config.is_file() else {}
    return float(values.get("lm", values).get("norm_offset", 0.0))


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    inside = folder if any(folder.glob("*.safetensors")) else folder / "model"
    return {name: tensor for path in sorted(inside.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)
