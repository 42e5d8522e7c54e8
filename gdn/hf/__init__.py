"""Hugging Face: one configuration and one model class for every mixer, checkpoints both ways, adapters.

import gdn.hf                                            # AutoConfig, AutoModel and AutoModelForCausalLM know "gdn" from here on
model = AutoModelForCausalLM.from_pretrained(folder)
model.generate(ids, assistant_model=small)               # any mixer, rollback is exact
"""

from __future__ import annotations

import importlib
from typing import Any

import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gdn.hf.configuration import GdnConfig
from gdn.hf.modeling import GdnForCausalLM, GdnModel, GdnPreTrainedModel

AutoConfig.register(GdnConfig.model_type, GdnConfig, exist_ok=True)
AutoModel.register(GdnConfig, GdnModel, exist_ok=True)
AutoModelForCausalLM.register(GdnConfig, GdnForCausalLM, exist_ok=True)
# Only by this list does `transformers.Trainer` know that labels are to be shifted when it smooths them, and a pipeline what it is given.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[GdnConfig.model_type] = GdnForCausalLM.__name__
# `transformers serve` looks a class up by its name in the module transformers, of which `transformers.processing_utils` makes a second one:
# both get it from their type.
setattr(type(transformers), GdnForCausalLM.__name__, GdnForCausalLM)

_WHERE = {
    "GdnCache": "cache",
    "GdnStaticCache": "cache",
    "add_remote_code": "remote_code",
}

__all__ = ["GdnCache", "GdnConfig", "GdnForCausalLM", "GdnModel", "GdnPreTrainedModel", "GdnStaticCache", "add_remote_code"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gdn.hf.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
