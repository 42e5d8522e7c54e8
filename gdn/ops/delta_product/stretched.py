"""Several writes a token as the gated delta rule over a sequence that is n times as long: whatever row serves that rule serves this one.

Token t becomes n tokens: the first carries the decay, the last the query, the others neither. It pays n times for queries that are zero;
README.md says how much.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from gdn.core.packing import Packing
from gdn.ops.delta_rule import OP


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
    rule = OP.pick(q, K=q.shape[3], V=v.shape[4])
    return through(rule, q, k, v, g, beta, scale, initial_state, packing)


def through(
    rule: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """By `rule`, a row of the gated delta rule."""
    writes = k.shape[2]
    queries = F.pad(q.unsqueeze(2), (0, 0, 0, 0, writes - 1, 0)).flatten(1, 2)
    decays = F.pad(g.unsqueeze(2), (0, 0, 0, writes - 1)).flatten(1, 2)
    keys, values, strengths = (x.flatten(1, 2) for x in (k, v, beta))
    longer = None if packing is None else packing.stretched(writes)
    o, state = rule(queries, keys, values, decays, strengths, scale, initial_state, longer)
    return o.unflatten(1, (-1, writes))[:, :, -1], state
