"""The definition of the core: the composition of the definitions of its parts."""

from __future__ import annotations

from torch import Tensor

from gdn.core.packing import Packing
from gdn.ops.delta_fused import GateParameters
from gdn.ops.delta_rule.reference import gated_delta_rule
from gdn.ops.gates.reference import decay_gate, write_gate
from gdn.ops.norm.reference import l2norm

NORM_EPS = 1e-6


def delta_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gates: GateParameters,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.delta_core`."""
    g, beta = decay_gate(a, gates.A_log, gates.dt_bias), write_gate(b, gates.top)
    q, k = l2norm(q, NORM_EPS), l2norm(k, NORM_EPS)
    return gated_delta_rule(q, k, v, g, beta, q.shape[-1] ** -0.5, initial_state, packing)
