r"""The delta rule with channel decays in Triton: forward and backward for any GPU from sm_80 on, or on the CPU under `TRITON_INTERPRET=1`.

Chunks of C = 64 tokens, rows are tokens. With `exp(sum of g)` taken channel by channel (README.md), S the memory before the chunk, S' after it:

    M   = stril(sum over channels of k_i k_j exp(g_{j+1} + ... + g_i))          Phi = (I + M diag(beta))^-1 M
    A   = scale tril(the same of q_i k_j)
    Z   = V - met S                                 met = k from the begin of the chunk
    R   = Z - Phi diag(beta) Z                      the errors v_t - k_t^T S_t
    O   = read S + A diag(beta) R                   read = scale q from the begin of the chunk
    S'  = last S + written^T diag(beta) R           written = k up to the end of the chunk

Everything that decays comes from the kernels of linear attention with channel decays, which halve chunks again and again, so that every exponent is a plain
sum of log decays (gdn/ops/linear_recurrence/portable_channels.py); what is solved and carried on is the gated delta rule's
(gdn/ops/delta_rule/portable.py).

Launches, forward: decayed queries, keys and A; decayed keys and M; Phi, all chunks at once; output, chunk after chunk. Backward: the decayed
rows again; states, then backward, chunk after chunk; pairs and gradient, all chunks at once. Kept for the backward beside the arguments: Phi and A. Sums run
in a fixed order and nothing is atomic.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import CHUNK, Packing
from gdn.core.portable_rows import aligned, dense, token_rows
from gdn.ops.delta_channel.portable_grad import gradient_kernel, pairs_kernel
from gdn.ops.delta_channel.portable_scan import backward_kernel, output_kernel, states_kernel
from gdn.ops.delta_channel.portable_solve import solve_kernel
from gdn.ops.linear_recurrence.portable_channels import channels_kernel
from gdn.ops.linear_recurrence.portable_gated import exponent_sums
from gdn.ops.linear_recurrence.portable_plan import Plan, plan
from gdn.ops.sequences.portable import Bounds, Launch, bounds_of


@dataclasses.dataclass(frozen=True)
class Decayed:
    """Rows with their decays multiplied in, `[B, T, HV, K]`, and the decay over each chunk `[chunks, HV, K]`."""

    read: Tensor
    met: Tensor
    written: Tensor
    last: Tensor


@functools.lru_cache
def launches(BK: int, V: int, wide: bool) -> dict[str, Launch]:
    """Launch parameters of each kernel by padded key width, value width and whether inputs are fp32.

    Products of 64 tokens take 4 warps, and tiles in 16 bits have rows of at least 128 bytes (notes/triton_pipelines.md).
    """
    block = 32 if wide else 64
    scan = (
        Launch(block=128, warps=8)
        if BK > 128 and V > 64 and not wide
        else Launch(block=block, warps=4, stages=1 if wide or BK > 128 else 2)
    )
    return {
        "channels": Launch(block=block, warps=4),
        "solve": Launch(block=0, warps=4),
        "scan": scan,
        "pairs": Launch(block=block, warps=4),
        "gradient": Launch(block=block, warps=4),
    }


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_table: Tensor | None,
    chunk_offsets: Tensor | None,
    scale: float,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, final state; saved: Phi and A."""
    p = _plan(k, v, cu_seqlens, chunk_table)
    q, k, v, g, beta = token_rows(q), token_rows(k), token_rows(v), aligned(g), aligned(beta)
    o, final, phi, scores = _buffers(p, v)
    if p.chunks == 0:
        return o, final.zero_() if initial_state is None else final.copy_(initial_state), phi, scores
    initial_state = None if initial_state is None else aligned(initial_state)
    key, use = _key(p, q, k, v, g, beta), _launches(p)
    bounds = (cu_seqlens, chunk_table, chunk_offsets)
    pairs = torch.empty(phi.shape, dtype=torch.float32, device=v.device)
    x = _decay(p, key, q, k, g, exponent_sums(p, v), scores, pairs, bounds, scale)
    use["solve"](solve_kernel, key, p.HV * p.chunks, pairs, beta, phi, *bounds[:2], p.length, p.per_row, p.HV, p.packed, p.wide)
    del pairs
    scan = use["scan"]
    scan(
        output_kernel, (key, initial_state is None), -(-p.V // scan.block) * p.HV * p.documents, x.read, x.met, x.written, x.last, v, beta, phi, scores,
        o, initial_state, final, cu_seqlens, chunk_offsets, p.length, p.per_row, v.stride(1), p.HV, p.K, p.V, p.BK, scan.block, p.packed, p.wide,
        scan.stages,
    )  # fmt: skip
    return o, final, phi, scores


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, g, beta, initial_state, *rest, scale = args
    (phi, scores), (do, d_final) = saved, grads
    p = _plan(k, v, rest[0], rest[1])
    q, k, v, g, beta = token_rows(q), token_rows(k), token_rows(v), aligned(g), aligned(beta)
    do = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if do is None else dense(do)
    d_final = None if d_final is None else aligned(d_final)
    d_initial = None if initial_state is None else torch.empty(initial_state.shape, dtype=torch.float32, device=v.device)
    if p.chunks == 0:
        if d_initial is not None:
            d_initial = d_initial.zero_() if d_final is None else d_final
        return [*(torch.zeros_like(x) for x in (q, k, v, g, beta)), d_initial]
    initial_state = None if initial_state is None else aligned(initial_state)
    key, use = _key(p, q, k, v, g, beta), _launches(p)
    bounds = (rest[0], rest[1], rest[2])
    sums = exponent_sums(p, v)
    x = _decay(p, key, q, k, g, sums, None, None, bounds, scale)
    scan = use["scan"]
    columns = -(-p.V // scan.block) * p.HV * p.documents
    sizes = (p.HV, p.K, p.V, p.BK, scan.block, p.packed, p.wide, scan.stages)
    states, d_states = (torch.empty((p.chunks, p.HV, p.V, p.K), dtype=v.dtype, device=v.device) for _ in range(2))
    errors, dv = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    scan(
        states_kernel, (key, initial_state is None), columns, x.met, x.written, x.last, v, beta, phi, states, errors, initial_state, bounds[0], bounds[2],
        p.length, p.per_row, v.stride(1), *sizes,
    )  # fmt: skip
    scan(
        backward_kernel, (key, d_final is None, d_initial is None), columns, x.read, x.met, x.written, x.last, beta, phi, scores, do, d_states, dv,
        d_final, d_initial, bounds[0], bounds[2], p.length, p.per_row, *sizes,
    )  # fmt: skip
    last = x.last
    del x
    dbeta = torch.empty(beta.shape, dtype=torch.float32, device=v.device)
    d_scores, d_pairs = (torch.empty(phi.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    pair = use["pairs"]
    pair(
        pairs_kernel, key, p.HV * p.chunks, beta, do, errors, dv, dbeta, d_scores, d_pairs, *bounds[:2], p.length, p.per_row, scale, p.HV, p.V,
        pair.block, p.packed, p.wide, pair.stages,
    )  # fmt: skip
    group = p.HV // q.shape[2]
    dq, dk = (torch.empty((*g.shape,), dtype=q.dtype if group == 1 else torch.float32, device=g.device) for _ in range(2))
    dg = torch.empty(g.shape, dtype=g.dtype, device=g.device)
    grad = use["gradient"]
    grad(
        gradient_kernel, key, -(-p.K // grad.block) * p.HV * p.chunks, q, k, g, sums, beta, last, do, errors, dv, states, d_states, d_scores, d_pairs, dq,
        dk, dg, *bounds[:2], p.length, p.per_row, scale, q.stride(1), k.stride(1), p.HV, group, p.K, p.V, grad.block, grad.block, p.packed, p.wide,
        grad.stages,
    )  # fmt: skip
    if group > 1:
        dq, dk = (t.unflatten(2, (-1, group)).sum(3).to(q.dtype) for t in (dq, dk))
    return [dq, dk, dv, dg, dbeta.to(beta.dtype), d_initial]


def _decay(
    p: Plan,
    key: Any,
    q: Tensor,
    k: Tensor,
    g: Tensor,
    sums: Tensor,
    scores: Tensor | None,
    pairs: Tensor | None,
    bounds: Bounds,
    scale: float,
) -> Decayed:
    """The decayed rows; fill `scores` with A and `pairs` with M in float32 and the squared lengths of keys on its diagonal."""
    use, group = _launches(p)["channels"], p.HV // k.shape[2]
    read, met, written = (torch.empty(g.shape, dtype=k.dtype, device=k.device) for _ in range(3))
    last = torch.empty((p.chunks, p.HV, p.K), dtype=torch.float32, device=k.device)
    for x, reached, onward, products, factor in ((q, read, written, scores, scale), (k, met, None, pairs, 1.0)):
        use(
            channels_kernel, (key, onward is None, products is None), p.HV * p.chunks, k, x, g, sums, reached, onward, last, products, *bounds[:2],
            p.length, p.per_row, factor, x.stride(1), k.stride(1), p.HV, group, p.K, use.block, p.packed, x is k, p.wide,
        )  # fmt: skip
    return Decayed(read, met, written, last)


def _plan(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Plan:
    (B, T, HV, V), K, wide = v.shape, k.shape[3], v.dtype == torch.float32
    if cu_seqlens is None or chunk_table is None:
        return _whole(B, T, B, B * -(-T // CHUNK), HV, K, V, False, wide)
    return _whole(B, T, cu_seqlens.shape[0] - 1, chunk_table.shape[0], HV, K, V, True, wide)


@functools.lru_cache(maxsize=4096)
def _whole(batch: int, length: int, documents: int, chunks: int, HV: int, K: int, V: int, packed: bool, wide: bool) -> Plan:
    """Sizes for memories that walk over whole documents, each with decays of its own."""
    return dataclasses.replace(plan(batch, length, documents, chunks, HV, HV, K, V, packed, wide, 1), S=0)


def _launches(p: Plan) -> dict[str, Launch]:
    return launches(p.BK, p.V, p.wide)


def _key(p: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> tuple[Any, ...]:
    """What the compiled kernels depend on, beside what each launch is. All pointers are multiples of 16 bytes."""
    return "delta", p.code, q.shape[2], q.dtype, g.dtype, beta.dtype, q.stride(1), k.stride(1), v.stride(1)


def _buffers(p: Plan, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, final, Phi, A."""
    return (
        torch.empty(like.shape, dtype=like.dtype, device=like.device),
        torch.empty((p.documents, p.HV, p.K, p.V), dtype=torch.float32, device=like.device),
        torch.empty((p.chunks, p.HV, CHUNK, CHUNK), dtype=like.dtype, device=like.device),
        torch.empty((p.chunks, p.HV, CHUNK, CHUNK), dtype=like.dtype, device=like.device),
    )


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_table: Tensor | None,
    chunk_offsets: Tensor | None,
    scale: float,
    keep: bool,
) -> Tensors:
    return _buffers(_plan(k, v, cu_seqlens, chunk_table), v)


_OPAQUE = Opaque(
    "gdn::channel_delta_rule_portable",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "initial_state"),
)


def channel_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.channel_delta_rule`."""
    K, V = q.shape[3], v.shape[3]
    more_k, more_v = -K % 8, -V % 8  # loads take eight elements at a time
    if more_k:
        q, k, g = (F.pad(x, (0, more_k)) for x in (q, k, g))
    if more_v:
        v = F.pad(v, (0, more_v))
    if initial_state is not None and (more_k or more_v):
        initial_state = F.pad(initial_state, (0, more_v, 0, more_k))
    o, final = _OPAQUE(q, k, v, g, beta, initial_state, *bounds_of(packing), scale)
    return (o[..., :V], final[..., :K, :V]) if more_k or more_v else (o, final)
