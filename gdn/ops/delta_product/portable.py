"""Several writes a token by the Triton kernels of the gated delta rule, over a sequence that is n times as long (stretched.py)."""

from __future__ import annotations

from functools import partial

from gdn.ops.delta_product.stretched import through
from gdn.ops.delta_rule import portable

gated_delta_product = partial(through, portable.gated_delta_rule)
"""See `gdn.ops.gated_delta_product`."""
