"""Small models as transformers sees them."""

from __future__ import annotations

from typing import Any

import torch

from gdn.hf import GdnConfig, GdnForCausalLM

MIXERS: dict[str, list[dict[str, Any]]] = {
    "gated_deltanet": [{"type": "gated_deltanet", "heads": 2, "head_dim": 8}],
    "hybrid": [
        {"type": "gated_deltanet", "heads": 2, "head_dim": 8, "value_heads": 4, "expand_v": 1.0, "allow_neg_eigval": True},
        {"type": "attention", "heads": 4, "kv_heads": 2, "head_dim": 8, "rope_fraction": 0.5, "qk_norm": True, "output_gate": True},
        {"type": "attention", "heads": 2, "head_dim": 4, "window": 7},
    ],
    "others": [
        {"type": "deltanet", "heads": 2, "head_dim": 8},
        {"type": "swat", "heads": 2, "head_dim": 8, "window": 6},
        {"type": "transmamba", "heads": 2, "head_dim": 8, "transpoint": 10},
    ],
}


def config(mixers: str = "gated_deltanet", **changes: Any) -> GdnConfig:
    sizes = {"vocab_size": 17, "hidden_size": 24, "num_hidden_layers": 3, "intermediate_size": 32}
    return GdnConfig(**{**sizes, "lm": {"pattern": MIXERS[mixers]}, **changes})


def causal(mixers: str = "gated_deltanet", seed: int = 0, **changes: Any) -> GdnForCausalLM:
    torch.manual_seed(seed)
    return GdnForCausalLM(config(mixers, **changes)).eval()


def tokens(batch: int = 2, length: int = 30, seed: int = 5) -> torch.Tensor:
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(seed))
