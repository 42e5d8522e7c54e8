"""Language models: one class for every mixer."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "LM": "lm",
    "LMOutput": "lm",
    "LMState": "lm",
    "size": "sizes",
    "SIZES": "sizes",
    "generate": "sampling",
    "Sampling": "sampling",
    "load_model": "store",
    "save_model": "store",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gdn.models.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
