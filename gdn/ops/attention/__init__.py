"""Attention: contracts and tables of implementations. How the rows work is in README.md beside this file."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Needs, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.replay import replayed

CAUSAL = Op(
    "causal_attention",
    (
        Impl(
            "flex",
            "gdn.ops.attention.flex:causal_attention",
            Needs(
                device="cuda",
                dtypes=(torch.bfloat16, torch.float16, torch.float32),
                dims={"K": range(16, 257), "V": range(16, 257), "masked": (1,)},
                compiled=True,
            ),
        ),
        Impl("sdpa", "gdn.ops.attention.sdpa:causal_attention"),
        Impl("reference", "gdn.ops.attention.reference:causal_attention"),
    ),
)

SIGMOID = Op(
    "windowed_sigmoid_attention",
    (
        Impl(
            "portable",
            "gdn.ops.attention.portable:windowed_sigmoid_attention",
            triton_gpu(K=range(1, 257), V=range(1, 257)),
        ),
        Impl("chunked", "gdn.ops.attention.chunked:windowed_sigmoid_attention"),
        Impl("reference", "gdn.ops.attention.reference:windowed_sigmoid_attention"),
    ),
)


def causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    start: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    r"""Softmax attention to the past, whole or through a sliding window.

    Query t of T stands at key `s = S - T + t` of S, so the first `S - T` keys lie before all queries. With n from
    `max(first, s - window + 1)` to s, where `first` is the begin of the document (or `start`, or 0),

        o_t = sum_n softmax_n(scale q_t^T k_n) v_n

    A window of 1 is the token itself. Positions enter through q and k (`gdn.nn.Rotary`), not here.

    Args:
        q: queries `[B, T, H, K]`.
        k, v: keys `[B, S, G, K]` and values `[B, S, G, V]` with S at least T, the dtype of q. H is a multiple of G: query head i reads
            key/value head `i // (H // G)`.
        window: how many keys a query sees at most, itself included. None is no limit.
        scale: factor on the scores. Default `K ** -0.5`.
        start: integers `[B]`: the keys of row b before `start[b]` are empty. Outputs at such places are zero. Not together with packing.
        packing: boundaries of packed documents over the `B * T` tokens; nothing passes from one to the next. Needs S equal to T.

    Returns:
        o `[B, T, H, V]` in the dtype of v, differentiable with respect to q, k and v.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or start comes with packing.

    Example:
        One head, K = V = 1, all scores zero: each output is the mean of the values seen.

        >>> zero, v = torch.zeros(1, 4, 1, 1), torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 4, 1, 1)
        >>> causal_attention(zero, zero, v).flatten().tolist(), causal_attention(zero, zero, v, window=2).flatten().tolist()
        ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 4.0, 6.0])
    """
    sizes = _check(q, k, v, start, packing)
    if window is not None:
        window = checks.integer("window", window, least=1)
    scale = checks.scale(scale, sizes["K"])
    masked = sizes["S"] == sizes["T"] and (packing is not None or (window is not None and window < sizes["S"]))
    return CAUSAL.pick(q, K=sizes["K"], V=sizes["V"], masked=bool(masked))(q, k, v, window, scale, start, packing)


@replayed
def windowed_sigmoid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    *,
    window: int,
    scale: float | None = None,
    start: Tensor | None = None,
    packing: Packing | None = None,
) -> Tensor:
    r"""Attention through a sliding window whose weights are sigmoids: what a token reads is a sum, not a mean.

    Query t of T stands at key `s = S - T + t` of S, so the first `S - T` keys lie before all queries. With n from
    `max(first, s - window + 1)` to s, where `first` is the begin of the document (or `start`, or 0), for each head

        o_t = sum_n sigmoid(scale q_t^T k_n + slope (s - n)) v_n

    The operator of SWAT (arXiv 2502.18845) with its positional bias: a negative slope favours recent tokens, a positive one the oldest in
    the window. The rotary embedding enters through q and k (`gdn.nn.Rotary`).

    Args:
        q: queries `[B, T, H, K]`.
        k, v: keys `[B, S, G, K]` and values `[B, S, G, V]` with S at least T, the dtype of q. H is a multiple of G: query head i reads
            key/value head `i // (H // G)`.
        slopes: `[H]`, any floating dtype.
        window: how many keys a query sees at most, itself included.
        scale: factor on the scores. Default `K ** -0.5`.
        start: integers `[B]`: the keys of row b before `start[b]` are empty. Outputs at such places are zero. Not together with packing.
        packing: boundaries of packed documents over the `B * T` tokens; nothing passes from one to the next. Needs S equal to T.

    Returns:
        o `[B, T, H, V]` in the dtype of v, differentiable with respect to q, k, v and slopes.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, or start comes with packing.

    Example:
        One head, K = V = 1, scores and slope zero: each output is half the sum of the values seen.

        >>> zero, v = torch.zeros(1, 4, 1, 1), torch.tensor([1.0, 3.0, 5.0, 7.0]).view(1, 4, 1, 1)
        >>> windowed_sigmoid_attention(zero, zero, v, torch.zeros(1), window=2).flatten().tolist()
        [0.5, 2.0, 4.0, 6.0]
    """
    sizes = _check(q, k, v, start, packing)
    checks.shapes(("slopes", slopes, "H"), H=sizes["H"])
    checks.floating(("slopes", slopes))
    checks.same_device(("q", q), ("slopes", slopes))
    window = checks.integer("window", window, least=1)
    scale = checks.scale(scale, sizes["K"])
    return SIGMOID.pick(q, K=sizes["K"], V=sizes["V"])(q, k, v, slopes, window, scale, start, packing)


def _check(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, packing: Packing | None) -> dict[str, int]:
    sizes = checks.shapes(("q", q, "B T H K"), ("k", k, "B S G K"), ("v", v, "B S G V"))
    if sizes["G"] == 0 or sizes["H"] % sizes["G"]:
        raise ArgumentError(f"q: expected a multiple of {sizes['G']} heads (the heads of k), got {sizes['H']}")
    if sizes["S"] < sizes["T"]:
        raise ArgumentError(f"k: expected at least {sizes['T']} keys, one for each query, got {sizes['S']}")
    checks.same_dtype(("q", q), ("k", k), ("v", v))
    checks.same_device(("q", q), ("k", k), ("v", v), ("start", start))
    if packing is not None:
        if start is not None:
            raise ArgumentError("start: cannot be given together with packing; a packed batch has no padding")
        if sizes["S"] != sizes["T"]:
            raise ArgumentError(f"k: expected {sizes['T']} keys with packing, as many as queries, got {sizes['S']}")
        checks.boundaries(packing, sizes["B"], sizes["T"], q.device)
    if start is not None:
        checks.shapes(("start", start, "B"), B=sizes["B"])
        if start.dtype not in (torch.int32, torch.int64):
            raise ArgumentError(f"start: expected int32 or int64, got {start.dtype}")
    return sizes
