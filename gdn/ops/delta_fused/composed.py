"""The core through the tables of its parts, so that their fastest rows, or forced ones, apply. Runs wherever they do."""

from __future__ import annotations

from torch import Tensor

from gdn.core.packing import Packing
from gdn.ops.delta_fused import GateParameters
from gdn.ops.delta_rule import gated_delta_rule
from gdn.ops.gates import decay_gate, write_gate
from gdn.ops.norm import l2norm


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
    g, beta = decay_gate(a, gates.A_log, gates.dt_bias), write_gate(b, top=gates.top)
    return gated_delta_rule(l2norm(q), l2norm(k), v, g, beta, initial_state=initial_state, packing=packing)
