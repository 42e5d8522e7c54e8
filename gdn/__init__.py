"""Gated Delta Networks: operators, layers, language models, training and evaluation.

    gdn.ops          operators: gated_delta_rule, causal_conv1d, linear_cross_entropy, ...
    gdn.mixers       token mixers: GatedDeltaNet
    gdn.models       LM, sizes by name, generate, save and load
    gdn.data         text to packed rows
    gdn.train        Trainer
    gdn.Packing      boundaries of packed documents
    gdn.accelerate   a loaded transformers model on our operators; gdn.restore undoes it

Names load on first use: `import gdn` touches no device, no compiler and no network.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {"Packing": "gdn.core.packing", "accelerate": "gdn.hf.accelerate", "restore": "gdn.hf.accelerate"}
_MODULES = ("data", "eval", "mixers", "models", "nn", "ops", "train")

__all__ = ["__version__", *_NAMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        globals()[name] = getattr(importlib.import_module(_NAMES[name]), name)
        return globals()[name]
    if name in _MODULES:
        return importlib.import_module(f"gdn.{name}")
    raise AttributeError(f"module 'gdn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
