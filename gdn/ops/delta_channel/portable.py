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
from typing import cast

import torch
from torch import Tensor

from gdn.core import device as hardware
from gdn.core.opaque import Tensors
from gdn.core.packing import CHUNK, Packing
from gdn.core.portable_rows import fresh
from gdn.ops.delta_channel.portable_grad import gradient_kernel, pairs_kernel
from gdn.ops.delta_channel.portable_scan import backward_kernel, output_kernel, states_kernel
from gdn.ops.delta_channel.portable_solve import solve_kernel
from gdn.ops.linear_recurrence.portable_channels import channels_kernel
from gdn.ops.linear_recurrence.portable_gated import exponent_sums
from gdn.ops.linear_recurrence.portable_plan import Plan, plan
from gdn.ops.sequences.portable import Launch
from gdn.ops.sequences.portable_recurrence import Call, Gradients, Recurrence


@dataclasses.dataclass(frozen=True)
class Decayed:
    """Rows with their decays multiplied in, `[B, T, HV, K]`, and the decay over each chunk `[chunks, HV, K]`."""

    read: Tensor
    met: Tensor
    written: Tensor
    last: Tensor


@functools.lru_cache
def launches(BK: int, V: int, wide: bool, room: int) -> dict[str, Launch]:
    """Launch parameters of each kernel by padded key width, value width, whether inputs are fp32, and `hardware.room`.

    Products of 64 tokens take 4 warps, and tiles in 16 bits have rows of at least 128 bytes (notes/triton_pipelines.md). A product without tensor
    cores, as one backwards in fp32 is, spills more than twice as much with 32 columns as with 16. Without a limit of registers scans of wide keys
    in fp32 would get 32 (there as well).
    """
    block = 32 if wide else 64
    if wide:
        scan = Launch(block=block, warps=4, registers=255 if BK > 128 else None)
    elif BK > 128 and V > 64 and room >= hardware.HOPPER:
        scan = Launch(block=128, warps=8)
    else:
        scan = Launch(block=block, warps=4, stages=1 if BK > 128 else 2)
    return {
        "channels": Launch(block=block, warps=4),
        "solve": Launch(block=0, warps=4),
        "scan": scan,
        "backward": dataclasses.replace(scan, block=16) if wide else scan,
        "pairs": Launch(block=block, warps=4),
        "gradient": Launch(block=block, warps=4),
    }


def _forward(call: Call, o: Tensor, final: Tensor, kept: tuple[Tensor, Tensor]) -> None:
    (phi, scores), p, v, beta, initial, bounds = kept, call.p, call.v, call.beta, call.initial, call.bounds
    use = _launches(call)
    pairs = torch.empty(phi.shape, dtype=torch.float32, device=v.device)
    x = _decay(call, exponent_sums(p, v), scores, pairs)
    use["solve"](solve_kernel, call.key, p.HV * p.chunks, pairs, beta, phi, *bounds[:2], p.length, p.per_row, p.HV, p.packed, p.wide)
    del pairs
    scan = use["scan"]
    scan(
        output_kernel, (call.key, initial is None), -(-p.V // scan.block) * p.HV * p.documents, x.read, x.met, x.written, x.last, v, beta, phi, scores, o,
        initial, final, bounds[0], bounds[2], p.length, p.per_row, v.stride(1), p.HV, p.K, p.V, p.BK, scan.block, p.packed, p.wide, scan.stages,
    )  # fmt: skip


def _backward(call: Call, kept: Tensors, do: Tensor, d_final: Tensor | None, d_initial: Tensor | None) -> Gradients:
    (phi, scores), p, q, k, v, g, initial, bounds = kept, call.p, call.q, call.k, call.v, call.g, call.initial, call.bounds
    beta, use = cast(Tensor, call.beta), _launches(call)
    sums = exponent_sums(p, v)
    x = _decay(call, sums, None, None)
    scan, back = use["scan"], use["backward"]
    programs = p.HV * p.documents
    states, d_states = (torch.empty((p.chunks, p.HV, p.V, p.K), dtype=v.dtype, device=v.device) for _ in range(2))
    errors, dv = (fresh(v) for _ in range(2))
    scan(
        states_kernel, (call.key, initial is None), -(-p.V // scan.block) * programs, x.met, x.written, x.last, v, beta, phi, states, errors, initial,
        bounds[0], bounds[2], p.length, p.per_row, v.stride(1), p.HV, p.K, p.V, p.BK, scan.block, p.packed, p.wide, scan.stages,
    )  # fmt: skip
    back(
        backward_kernel, (call.key, d_final is None, d_initial is None), -(-p.V // back.block) * programs, x.read, x.met, x.written, x.last, beta, phi,
        scores, do, d_states, dv, d_final, d_initial, bounds[0], bounds[2], p.length, p.per_row, p.HV, p.K, p.V, p.BK, back.block, p.packed, p.wide,
        back.stages,
    )  # fmt: skip
    last = x.last
    del x
    dbeta = torch.empty(beta.shape, dtype=torch.float32, device=v.device)
    d_scores, d_pairs = (torch.empty(phi.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    pair = use["pairs"]
    pair(
        pairs_kernel, call.key, p.HV * p.chunks, beta, do, errors, dv, dbeta, d_scores, d_pairs, *bounds[:2], p.length, p.per_row, call.scale, p.HV, p.V,
        pair.block, p.packed, p.wide, pair.stages,
    )  # fmt: skip
    group = p.HV // q.shape[2]
    dq, dk = (torch.empty(g.shape, dtype=q.dtype if group == 1 else torch.float32, device=g.device) for _ in range(2))
    dg = fresh(g)
    grad = use["gradient"]
    grad(
        gradient_kernel, call.key, -(-p.K // grad.block) * p.HV * p.chunks, q, k, g, sums, beta, last, do, errors, dv, states, d_states, d_scores, d_pairs,
        dq, dk, dg, *bounds[:2], p.length, p.per_row, call.scale, q.stride(1), k.stride(1), p.HV, group, p.K, p.V, grad.block, grad.block, p.packed,
        p.wide, grad.stages,
    )  # fmt: skip
    if group > 1:
        dq, dk = (t.unflatten(2, (-1, group)).sum(3).to(q.dtype) for t in (dq, dk))
    return dq, dk, dv, dg, dbeta.to(beta.dtype)


def _decay(call: Call, sums: Tensor, scores: Tensor | None, pairs: Tensor | None) -> Decayed:
    """The decayed rows; fill `scores` with A and `pairs` with M in float32 and the squared lengths of keys on its diagonal."""
    p, q, k, g = call.p, call.q, call.k, call.g
    use, group = _launches(call)["channels"], p.HV // k.shape[2]
    read, met, written = (torch.empty(g.shape, dtype=k.dtype, device=k.device) for _ in range(3))
    last = torch.empty((p.chunks, p.HV, p.K), dtype=torch.float32, device=k.device)
    for x, reached, onward, products, factor in ((q, read, written, scores, call.scale), (k, met, None, pairs, 1.0)):
        use(
            channels_kernel, (call.key, onward is None, products is None), p.HV * p.chunks, k, x, g, sums, reached, onward, last, products,
            *call.bounds[:2], p.length, p.per_row, factor, x.stride(1), k.stride(1), p.HV, group, p.K, use.block, p.packed, onward is None, p.wide,
        )  # fmt: skip
    return Decayed(read, met, written, last)


def _plan(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Plan:
    (B, T, HV, V), K, wide = v.shape, k.shape[3], v.dtype == torch.float32
    if cu_seqlens is None or chunk_table is None:
        return _whole(B, T, B, B * -(-T // CHUNK), HV, K, V, False, wide)
    return _whole(B, T, cu_seqlens.shape[0] - 1, chunk_table.shape[0], HV, K, V, True, wide)


@functools.lru_cache(maxsize=4096)
def _whole(batch: int, length: int, documents: int, chunks: int, HV: int, K: int, V: int, packed: bool, wide: bool) -> Plan:
    """Sizes for memories that walk over whole documents, each with decays of its own."""
    return dataclasses.replace(plan(batch, length, documents, chunks, HV, HV, K, V, packed, wide, 1), S=0)


def _launches(call: Call) -> dict[str, Launch]:
    return launches(call.p.BK, call.p.V, call.p.wide, hardware.room(call.v.device.index or 0))


def _kept(p: Plan, like: Tensor) -> tuple[Tensor, Tensor]:
    """Phi and A."""
    phi, scores = (torch.empty((p.chunks, p.HV, CHUNK, CHUNK), dtype=like.dtype, device=like.device) for _ in range(2))
    return phi, scores


_ROW = Recurrence("channel_delta_rule", "key", plan=_plan, kept=_kept, forward=_forward, backward=_backward)


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
    return _ROW(q, k, v, g, beta, scale, initial_state, packing)
