"""Generated tasks: seeded, without a download. One file is one task; see `base` for the contract."""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "MQAR": "mqar",
    "ForgettingMQAR": "mqar_forgetting",
    "CompositionalMQAR": "mqar_compositional",
    "Parity": "parity",
    "ModularArithmetic": "modular_arithmetic",
    "GroupWords": "group_words",
    "InContextRecall": "mad_recall",
    "NoisyRecall": "mad_noisy_recall",
    "FuzzyRecall": "mad_fuzzy_recall",
    "Memorisation": "mad_memorisation",
    "Compression": "mad_compression",
    "MADSelectiveCopying": "mad_selective_copying",
    "SelectiveCopying": "selective_copying",
    "InductionHeads": "induction_heads",
    "Needle": "needle",
    "RegBench": "regbench",
    "PhoneBook": "phone_book",
    "Sample": "base",
    "Task": "base",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"gdn.data.synthetic.{_WHERE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
