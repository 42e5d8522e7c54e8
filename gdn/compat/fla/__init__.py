"""flash-linear-attention 0.6.0's gated delta rule on our operators: the same names, signatures, argument order and parameter names.

    from fla.ops.gated_delta_rule import chunk_gated_delta_rule         ->  from gdn.compat.fla.ops.gated_delta_rule import ...
    from fla.layers import GatedDeltaNet                                ->  from gdn.compat.fla.layers import GatedDeltaNet

or every name from here. Runs on CPU and GPU, without a line of FLA. Each flag is honoured, or refused by name; what FLA takes and drops
without a word (an unknown keyword) is refused too. What is more than FLA: `fused_recurrent_gated_delta_rule` has gradients.
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "Cache": "cache",
    "GatedDeltaNet": "layers",
    "chunk_gated_delta_rule": "ops.gated_delta_rule",
    "chunk_gdn": "ops.gated_delta_rule",
    "fused_recurrent_gated_delta_rule": "ops.gated_delta_rule",
    "fused_recurrent_gdn": "ops.gated_delta_rule",
    "naive_chunk_gated_delta_rule": "ops.gated_delta_rule",
    "naive_recurrent_gated_delta_rule": "ops.gated_delta_rule",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(importlib.import_module(f"gdn.compat.fla.{_WHERE[name]}"), name)
    return globals()[name]


def __dir__() -> list[str]:
    return __all__
