"""The gated delta rule over a sequence: contract and table of implementations. The derivation is in README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.replay import replayed

OP = Op(
    "gated_delta_rule",
    (
        Impl("portable", "gdn.ops.delta_rule.portable:gated_delta_rule", triton_gpu(K=range(1, 257))),
        Impl("chunked", "gdn.ops.delta_rule.chunked:gated_delta_rule"),
        Impl("recurrent", "gdn.ops.delta_rule.recurrent:gated_delta_rule"),
        Impl("reference", "gdn.ops.delta_rule.reference:gated_delta_rule"),
    ),
)


@replayed
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    r"""A memory `S` that forgets by a gate and corrects itself by the delta rule, read at every token.

    For each sequence and value head, from `S = initial_state` (or 0), for each token t in order:

        S   = exp(g_t) S                                forget
        S   = S + beta_t k_t (v_t - k_t^T S)            write the error of what the memory recalls for k_t
        o_t = scale S^T q_t                             read, after the write

    Equation (10) of Gated Delta Networks (arXiv 2412.06464); with g = 0 it is DeltaNet (arXiv 2406.06484).

    Args:
        q, k: queries and keys `[B, T, H, K]`. Keys should have norm at most 1 (see `l2norm`) when beta can exceed 1.
        v: values `[B, T, HV, V]`, the dtype of q. HV is a multiple of H: value head i reads query/key head `i // (HV // H)`.
        g: log decay `[B, T, HV]`, at most 0; any floating dtype. Minus infinity clears the memory. Values below -64 act as -64.
        beta: writing strength `[B, T, HV]`, from 0 to 2; any floating dtype.
        scale: factor on the read. Default `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, float32 (float64 with float64 inputs).
        packing: boundaries of N packed documents over the `B * T` tokens; state starts anew at each. Without it N = B.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]` in float32 (float64 with float64 inputs).
        Both are differentiable with respect to q, k, v, g, beta and initial_state.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or g is positive (values are looked at on the CPU only).

    Example:
        One head, K = V = 1: q = k = 1, v = 3, g = 0, beta = 0.5 for two tokens. The memory goes 0 -> 1.5 -> 2.25.

        >>> import torch
        >>> one = torch.ones(1, 2, 1, 1)
        >>> o, state = gated_delta_rule(one, one, 3 * one, torch.zeros(1, 2, 1), torch.full((1, 2, 1), 0.5))
        >>> o.flatten().tolist(), state.item()
        ([1.5, 2.25], 2.25)
    """
    sizes = _check(q, k, v, g, beta, initial_state, packing)
    scale = checks.scale(scale, sizes["K"])
    return OP.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, g, beta, scale, initial_state, packing)


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, packing: Packing | None
) -> dict[str, int]:
    sizes = checks.shapes(("q", q, "B T H K"), ("k", k, "B T H K"), ("v", v, "B T HV V"), ("g", g, "B T HV"), ("beta", beta, "B T HV"))
    checks.value_heads(sizes)
    checks.same_dtype(("q", q), ("k", k), ("v", v))
    checks.floating(("g", g), ("beta", beta))
    checks.same_device(("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("initial_state", initial_state))
    checks.not_positive("g", g, "a log decay")
    checks.boundaries(packing, sizes["B"], sizes["T"], q.device)
    if initial_state is not None:
        documents = sizes["B"] if packing is None else packing.num_documents
        checks.shapes(("initial_state", initial_state, "N HV K V"), N=documents, **sizes)
        expected = checks.accumulate_dtype(q.dtype)
        if initial_state.dtype != expected:
            raise ArgumentError(f"initial_state: expected {expected}, got {initial_state.dtype}")
    return sizes
