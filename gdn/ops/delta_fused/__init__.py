"""The gated delta rule from raw gates and un-normalised queries and keys: what a fused kernel computes in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.replay import replayed

OP = Op(
    "delta_core",
    (
        Impl("portable", "gdn.ops.delta_fused.portable:delta_core", triton_gpu(A_log=(32,), K=range(1, 4097), HV=range(1, 1025))),
        Impl("composed", "gdn.ops.delta_fused.composed:delta_core"),
        Impl("reference", "gdn.ops.delta_fused.reference:delta_core"),
    ),
)
"""Rows take `(q, k, v, a, b, gates, initial_state, packing)` and return `(o, final_state)`."""


@dataclass(frozen=True)
class GateParameters:
    """What turns raw gates into decay and writing strength."""

    A_log: Tensor
    """`[HV]`, float32, see `decay_gate`."""
    dt_bias: Tensor
    """`[HV]`, float32, see `decay_gate`."""
    top: float = 1.0
    """Largest writing strength, see `write_gate`."""

    def replay_parts(self) -> tuple[Any, ...]:
        """For `gdn.core.replay`."""
        return self.A_log, self.dt_bias, self.top


@replayed
def delta_core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gates: GateParameters,
    *,
    initial_state: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    r"""From the convolution's outputs and raw gates to the mixer's output, the core of a Gated DeltaNet layer (arXiv 2412.06464):

        o, final_state = gated_delta_rule(l2norm(q), l2norm(k), v, decay_gate(a, A_log, dt_bias), write_gate(b, top=top))

    Args:
        q, k: `[B, T, H, K]`, not normalised.
        v: `[B, T, HV, V]`, the dtype of q; HV is a multiple of H.
        a, b: raw decay and raw writing strength `[B, T, HV]`, any floating dtype.
        gates: their parameters.
        initial_state: `[N, HV, K, V]`, float32 (float64 with float64 inputs).
        packing: boundaries of N packed documents over the `B * T` tokens. Without it N = B.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]` in float32 (float64 with float64 inputs). Both are
        differentiable with respect to q, k, v, a, b, A_log, dt_bias and initial_state.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.

    Example:
        One head, one channel: the normalised q and k are 1, the decay of an empty memory does not matter, beta is 0.5.

        >>> import torch
        >>> q = torch.full((1, 1, 1, 1), 7.0)
        >>> gates = GateParameters(torch.zeros(1), torch.zeros(1))
        >>> o, state = delta_core(q, q, 3 * torch.ones_like(q), torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), gates)
        >>> round(o.item(), 3), round(state.item(), 3)
        (1.5, 1.5)
    """
    sizes = _check(q, k, v, a, b, gates, initial_state, packing)
    row = OP.pick(q, K=sizes["K"], V=sizes["V"], HV=sizes["HV"], A_log=8 * gates.A_log.element_size())
    return row(q, k, v, a, b, gates, initial_state, packing)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    gates: GateParameters,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> dict[str, int]:
    if not isinstance(gates, GateParameters):
        raise ArgumentError(f"gates: expected GateParameters(A_log, dt_bias, top), got {type(gates).__name__}")
    A_log, dt_bias = gates.A_log, gates.dt_bias
    sizes = checks.shapes(("q", q, "B T H K"), ("k", k, "B T H K"), ("v", v, "B T HV V"), ("a", a, "B T HV"), ("b", b, "B T HV"))
    checks.shapes(("A_log", A_log, "HV"), ("dt_bias", dt_bias, "HV"), HV=sizes["HV"])
    checks.value_heads(sizes)
    checks.same_dtype(("q", q), ("k", k), ("v", v))
    checks.same_dtype(("A_log", A_log), ("dt_bias", dt_bias))
    checks.floating(("a", a), ("b", b))
    if A_log.dtype != checks.accumulate_dtype(A_log.dtype):
        raise ArgumentError(f"A_log: expected float32 (the gate loses its precision otherwise), got {A_log.dtype}")
    checks.number("top", gates.top, above=0, most=2)
    checks.same_device(("q", q), ("k", k), ("v", v), ("a", a), ("b", b), ("A_log", A_log), ("dt_bias", dt_bias))
    checks.boundaries(packing, sizes["B"], sizes["T"], q.device)
    if initial_state is not None:
        documents = sizes["B"] if packing is None else packing.num_documents
        checks.shapes(("initial_state", initial_state, "N HV K V"), N=documents, **sizes)
        checks.same_device(("q", q), ("initial_state", initial_state))
        if initial_state.dtype != checks.accumulate_dtype(q.dtype):
            raise ArgumentError(f"initial_state: expected {checks.accumulate_dtype(q.dtype)}, got {initial_state.dtype}")
    return sizes
