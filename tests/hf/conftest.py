"""Tiny random models of the four transformers families, and quiet transformers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers.utils import logging as quiet

FAMILIES = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid")

COMMON = {
    "vocab_size": 61,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "intermediate_size": 32,
    "layer_types": ["linear_attention", "full_attention"],
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
# Every token goes to every expert: which ones it goes to would jump with rounding.
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}


def make_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A causal language model of transformers with random weights, none left at a special value, in eval mode."""
    import transformers as t

    logging.getLogger("transformers").setLevel(logging.ERROR)
    config, model, extra = {
        "qwen3_next": (t.Qwen3NextConfig, t.Qwen3NextForCausalLM, {"head_dim": 12, **EXPERTS}),
        "qwen3_5": (t.Qwen3_5TextConfig, t.Qwen3_5ForCausalLM, {"head_dim": 12}),
        "qwen3_5_moe": (t.Qwen3_5MoeTextConfig, t.Qwen3_5MoeForCausalLM, {"head_dim": 12, **EXPERTS}),
        "olmo_hybrid": (t.OlmoHybridConfig, t.OlmoHybridForCausalLM, {}),
    }[family]
    torch.manual_seed(0)
    made = model(config(**{**COMMON, **extra, **changes}))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.add_((0.2 if parameter.ndim == 1 else 0.05) * torch.randn_like(parameter))
            if name.endswith("A_log"):
                parameter.clamp_(min=-2.0)
    if "moe" in family or "next" in family:
        made.set_experts_implementation("eager")  # the default has no float64
    return made.to(dtype).eval()


@pytest.fixture(scope="session")
def models() -> Callable[..., Any]:
    return make_model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """transformers warns of its own deprecations and prints progress."""
    quiet.disable_progress_bar()
    quiet.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|accelerate|peft")
        yield
