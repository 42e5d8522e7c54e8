"""Several delta-rule writes a token, one decay, one read: contracts and tables. The derivation is in README.md beside this file."""

from __future__ import annotations

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.replay import replayed

OP = Op(
    "gated_delta_product",
    (
        Impl("portable", "gdn.ops.delta_product.portable:gated_delta_product", triton_gpu(K=range(1, 257))),
        Impl("chunked", "gdn.ops.delta_rule.chunked:gated_delta_product"),
        Impl("stretched", "gdn.ops.delta_product.stretched:gated_delta_product"),
        Impl("reference", "gdn.ops.delta_product.reference:gated_delta_product"),
    ),
)
"""Rows take `(q, k, v, g, beta, scale, initial_state, packing)` and return `(o, final_state)`."""

STEP = Op(
    "gated_delta_product_step",
    (
        Impl("portable", "gdn.ops.delta_step.portable:gated_delta_product_step", triton_gpu(K=range(1, 513))),
        Impl("torch", "gdn.ops.delta_step.plain:gated_delta_product_step"),
        Impl("reference", "gdn.ops.delta_product.reference:gated_delta_product_step"),
    ),
)
"""Rows take `(q, k, v, g, beta, state, scale, slots)`, write into `state` and return `o`."""


@replayed
def gated_delta_product(
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
    r"""A memory `S` that forgets once a token, corrects itself n times, and is read once.

    For each sequence and value head, from `S = initial_state` (or 0), for each token t in order:

        S   = exp(g_t) S                                                    forget
        S   = S + beta_tj k_tj (v_tj - k_tj^T S)       for j = 1 .. n       write, each after the other
        o_t = scale S^T q_t                                                 read, after the last write

    so that S is multiplied by `exp(g_t) (I - beta_tn k_tn k_tn^T) ... (I - beta_t1 k_t1 k_t1^T)`, a product of n generalised Householder
    matrices: DeltaProduct (arXiv 2502.10297), with g = 0 its ungated form. n = 1 is `gated_delta_rule`.

    Args:
        q: queries `[B, T, H, K]`.
        k: keys `[B, T, n, H, K]`, the dtype of q. Keys should have norm at most 1 (see `l2norm`) when beta can exceed 1.
        v: values `[B, T, n, HV, V]`, the dtype of q. HV is a multiple of H: value head i reads query/key head `i // (HV // H)`.
        g: log decay `[B, T, HV]`, at most 0; any floating dtype. Minus infinity clears the memory. Values below -64 act as -64.
        beta: writing strength `[B, T, n, HV]`, from 0 to 2; any floating dtype.
        scale: factor on the read. Default `K ** -0.5`.
        initial_state: `[N, HV, K, V]`, float32 (float64 with float64 inputs).
        packing: boundaries of N packed documents over the `B * T` tokens; state starts anew at each. Without it N = B.

    Returns:
        o `[B, T, HV, V]` in the dtype of v, and the final state `[N, HV, K, V]` in float32 (float64 with float64 inputs).
        Both are differentiable with respect to q, k, v, g, beta and initial_state.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or g is positive (values are looked at on the CPU only).

    Example:
        One head, K = V = 1, two writes of 3 with strength 0.5: the memory goes 0 -> 1.5 -> 2.25.

        >>> import torch
        >>> one = torch.ones(1, 1, 1, 1)
        >>> k, beta = torch.ones(1, 1, 2, 1, 1), torch.full((1, 1, 2, 1), 0.5)
        >>> o, state = gated_delta_product(one, k, 3 * k, torch.zeros(1, 1, 1), beta)
        >>> o.item(), state.item()
        (2.25, 2.25)
    """
    sizes = _check(q, k, v, g, beta)
    checks.same_device(("q", q), ("initial_state", initial_state))
    checks.boundaries(packing, sizes["B"], sizes["T"], q.device)
    if initial_state is not None:
        documents = sizes["B"] if packing is None else packing.num_documents
        checks.shapes(("initial_state", initial_state, "N HV K V"), N=documents, **sizes)
        expected = checks.accumulate_dtype(q.dtype)
        if initial_state.dtype != expected:
            raise ArgumentError(f"initial_state: expected {expected}, got {initial_state.dtype}")
    scale = checks.scale(scale, sizes["K"])
    return OP.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, g, beta, scale, initial_state, packing)


@replayed
def gated_delta_product_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor,
    *,
    scale: float | None = None,
    slots: Tensor | None = None,
) -> Tensor:
    r"""`gated_delta_product` for a few more tokens of each of many sequences, their memories updated in place: decoding.

    For sequence b and each value head, with `S = state[slots[b]]`: the tokens in order as in `gated_delta_product`, and S is stored back
    into the same row. A negative slot skips the sequence: its o is zero and no memory is touched. No gradients.

    Args:
        q: `[B, T, H, K]`, T of 1 or some; any T works.
        k: `[B, T, n, H, K]`, the dtype of q.
        v: `[B, T, n, HV, V]`, the dtype of q. HV is a multiple of H.
        g: log decay `[B, T, HV]`, at most 0; any floating dtype.
        beta: writing strength `[B, T, n, HV]`, from 0 to 2; any floating dtype.
        state: memories `[N, HV, K, V]`, updated in place. float32, or bfloat16 or float16 storage: the arithmetic is float32 all the same,
            rounded once a call. float64 with float64 inputs.
        scale: factor on the read. Default `K ** -0.5`.
        slots: integers `[B]` below N, no row twice. Default: row b for sequence b, then N = B. On a GPU, where values are not looked at, a
            sequence with a slot that is not below N touches no memory, and its o is no number.

    Returns:
        o `[B, T, HV, V]` in the dtype of v.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, g is positive or slots are wrong (values are looked at on the CPU only), or
            gradients are enabled and an argument requires one.

    Example:
        >>> import torch
        >>> one, state = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        >>> k, beta = torch.ones(1, 1, 2, 1, 1), torch.full((1, 1, 2, 1), 0.5)
        >>> gated_delta_product_step(one, k, 3 * k, torch.zeros(1, 1, 1), beta, state).item(), state.item()
        (2.25, 2.25)
    """
    sizes = _check(q, k, v, g, beta)
    checks.shapes(("state", state, "N HV K V"), HV=sizes["HV"], K=sizes["K"], V=sizes["V"])
    checks.memory(state, q.dtype)
    checks.same_device(("q", q), ("state", state), ("slots", slots))
    checks.slots(slots, sizes["B"], state.shape[0])
    checks.no_gradient(("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta), ("state", state))
    scale = checks.scale(scale, sizes["K"])
    return STEP.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, g, beta, state, scale, slots)


def _check(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> dict[str, int]:
    letters = (("q", q, "B T H K"), ("k", k, "B T n H K"), ("v", v, "B T n HV V"), ("g", g, "B T HV"), ("beta", beta, "B T n HV"))
    sizes = checks.shapes(*letters)
    checks.value_heads(sizes)
    if sizes["n"] < 1:
        raise ArgumentError(f"k: expected [B, T, n, H, K] with at least one write a token, got {list(k.shape)}")
    checks.same_dtype(("q", q), ("k", k), ("v", v))
    checks.floating(("g", g), ("beta", beta))
    checks.same_device(("q", q), ("k", k), ("v", v), ("g", g), ("beta", beta))
    checks.not_positive("g", g, "a log decay")
    return sizes
