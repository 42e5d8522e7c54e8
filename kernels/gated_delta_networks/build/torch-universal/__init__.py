"""The gated delta rule with the interface of flash-linear-attention 0.6.0, on CPU and GPU, with gradients."""

try:
    from gdn.compat.fla import (
        chunk_gated_delta_rule,
        chunk_gdn,
        fused_recurrent_gated_delta_rule,
        fused_recurrent_gdn,
        naive_chunk_gated_delta_rule,
        naive_recurrent_gated_delta_rule,
    )
except ImportError as error:
    raise ImportError("this kernel is a part of gated-delta-networks: pip install gated-delta-networks") from error

from . import layers

__all__ = [
    "chunk_gated_delta_rule",
    "chunk_gdn",
    "fused_recurrent_gated_delta_rule",
    "fused_recurrent_gdn",
    "layers",
    "naive_chunk_gated_delta_rule",
    "naive_recurrent_gated_delta_rule",
]
