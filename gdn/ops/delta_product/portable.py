"""Several writes a token by the Triton kernels of the gated delta rule, over a sequence that is n times as long (stretched.py)."""

from __future__ import annotations

from torch import Tensor

from gdn.core.packing import Packing
from gdn.ops.delta_product.stretched import through
from gdn.ops.delta_rule import portable


def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_delta_product`."""
    return through(portable.gated_delta_rule, q, k, v, g, beta, scale, initial_state, packing)
