"""Several writes a token by the Triton kernels of the gated delta rule: writes are their tokens, and every so many have a query and a decay."""

from __future__ import annotations

from torch import Tensor

from gdn.core.packing import Packing
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
    writes = k.shape[2]
    keys, values, strengths = (x.flatten(1, 2) for x in (k, v, beta))
    longer = None if packing is None else packing.stretched(writes)
    return portable.gated_delta_rule(q, keys, values, g, strengths, scale, initial_state, longer, writes)
