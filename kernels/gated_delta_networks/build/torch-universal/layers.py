"""Functions as layers: a module without parameters whose forward is the function. `kernelize` reads what they can do."""

from typing import Any

from torch import nn

from gdn.compat.fla import chunk_gated_delta_rule as _chunk
from gdn.compat.fla import fused_recurrent_gated_delta_rule as _recurrent


class chunk_gated_delta_rule(nn.Module):
    """`chunk_gated_delta_rule`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _chunk(*args, **kwargs)


class recurrent_gated_delta_rule(nn.Module):
    """`fused_recurrent_gated_delta_rule`."""

    has_backward = True
    can_torch_compile = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _recurrent(*args, **kwargs)


__all__ = ["chunk_gated_delta_rule", "recurrent_gated_delta_rule"]
