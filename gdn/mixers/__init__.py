"""Token mixers: one file each. `gdn.mixers.<name>` defines the module, its nested `Config` and its state."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Attention": "attention",
    "DeltaNet": "deltanet",
    "GatedDeltaNet": "gated_deltanet",
    "GrowingState": "base",
    "Mixer": "base",
    "MixerConfig": "base",
    "MixerState": "base",
    "Swat": "swat",
    "TransMamba": "transmamba",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gdn.mixers.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
