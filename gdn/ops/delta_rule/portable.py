r"""The gated delta rule in Triton: forward and backward for any GPU from sm_80 on, or on the CPU under `TRITON_INTERPRET=1`.

Chunks of C = 64 tokens, rows are tokens. With G the running sum of g inside the chunk, gamma = exp(G), D = exp(G_last - G), S the state
before the chunk and S' the one after it:

    M   = stril(exp(G_i - G_j) k_i.k_j)                 Phi = (I + M diag(beta))^-1 M
    A   = scale tril(exp(G_i - G_j) q_i.k_j)
    Z   = v - diag(gamma) K S                           what the tokens meet, were there no other in the chunk
    R   = Z - M diag(beta) R = Z - Phi diag(beta) Z     the errors v_t - k_t^T S_t of equation (10)
    U   = diag(beta) R
    O   = scale diag(gamma) Q S + A U                   S' = gamma_last S + K^T diag(D) U

Why this form. The inverse is taken with the gates inside, so nothing grows that the recurrence would not let grow, whatever the length
of the keys. Only Phi, the correction, is rounded to the dtype of the inputs; the identity of R = (I - Phi diag(beta)) Z stays exact, and
neither forward nor backward divides by beta. The backward keeps of the forward Phi, A and the gates (and, with segments, the states that
enter them, and the states where slabs begin); it recomputes the states.

Backward, from dO and dS' (formulas in portable_grad.py for the rest):

    X   = A^T dO + diag(D) K dS'                        dU = X - Phi^T diag(beta) X
    dS  = gamma_last dS' + scale Q^T diag(gamma) dO - K^T diag(gamma beta) dU

Launches, forward: gates and pair (all chunks at once), output (chunk after chunk). Backward: states, backward, then pairs and gradient (all
chunks at once); all four for one slab of time after another, the last first, so that no buffer holds the states of all chunks
(README.md). Long sequences with few heads are cut into segments: then summary and handover come before output, and before backward.
Sums run in a fixed order and nothing is atomic: the same inputs give the same bits. Launch parameters come from `plan`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core import device as hardware
from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import CHUNK, Packing
from gdn.core.portable_launch import integer_kind, launch
from gdn.core.portable_rows import aligned as _aligned
from gdn.core.portable_rows import token_rows as _rows
from gdn.ops.delta_rule.portable_grad import gradient_kernel, pairs_kernel
from gdn.ops.delta_rule.portable_prepare import GATES as _GATES
from gdn.ops.delta_rule.portable_prepare import gates_kernel, pair_kernel
from gdn.ops.delta_rule.portable_scan import (
    backward_kernel,
    backward_summary_kernel,
    handover_kernel,
    output_kernel,
    states_kernel,
    summary_kernel,
)

GATES = int(_GATES.value)


@dataclass(frozen=True)
class Launch:
    """Block sizes and resources of one kernel."""

    block: int
    """Columns of V of a program; of K at a time for pair and gradient."""
    warps: int
    stages: int = 1
    """Depth of the software pipeline over chunks, or over blocks of V."""
    inner: int = 0
    """Columns of V at a time, for gradient."""
    registers: int | None = None
    """Most registers of a thread."""

    def __call__(self, kernel: Any, key: Any, programs: int, *args: Any) -> None:
        launch(kernel, (programs,), *args, warps=self.warps, registers=self.registers, key=key)


@dataclass(frozen=True)
class Plan:
    """Sizes and launch parameters of one call."""

    tokens: int
    length: int
    """Tokens of a row of the batch; all tokens when packed."""
    per_row: int
    """Chunks of a row of the batch."""
    chunks: int
    documents: int
    H: int
    HV: int
    K: int
    V: int
    BK: int
    packed: bool
    wide: bool
    S: int
    """Chunks of a segment, 0 without segments."""
    width: int
    """Chunks of a slab."""
    launches: dict[str, Launch]
    code: tuple[Any, ...]
    """Names the compiled kernels: constants, and what Triton specialises on in the other integers (whether 1, whether a multiple of 16)."""

    @property
    def segments(self) -> int:
        return -(-self.chunks // self.S) if self.S else 0

    @property
    def runs(self) -> int:
        return self.segments or self.documents

    @property
    def stretch(self) -> int:
        """Chunks of a run, as far as slabs go: packed documents without segments are one slab of one run."""
        return self.S or (self.chunks if self.packed else self.per_row)

    @property
    def slabs(self) -> int:
        return -(-self.stretch // self.width)

    @property
    def slots(self) -> int:
        """Chunks that the buffers of a slab have room for."""
        return self.width * (self.documents if not self.packed and not self.S else max(self.segments, 1))


@functools.lru_cache(maxsize=4096)
def plan(
    batch: int, length: int, documents: int, chunks: int, H: int, HV: int, K: int, V: int, packed: bool, wide: bool, processors: int
) -> Plan:
    """The launch parameters for a shape on a GPU with this many multiprocessors."""
    table = launches(_power_of_two(K), V, wide)
    rows, per_row = batch * length if packed else length, -(-length // CHUNK)
    S = segment_chunks(chunks, documents, HV * -(-V // table["output"].block), packed, processors or 132)
    runs, stretch = (-(-chunks // S), S) if S else (1, chunks) if packed else (batch, per_row)
    width = stretch if packed and not S else slab_chunks(stretch, runs * H * 2 * -(-K // table["gradient"].block))
    return Plan(
        tokens=batch * length,
        length=rows,
        per_row=per_row,
        chunks=chunks,
        documents=documents,
        H=H,
        HV=HV,
        K=K,
        V=V,
        BK=_power_of_two(K),
        packed=packed,
        wide=wide,
        S=S,
        width=width,
        launches=table,
        code=(H, HV, K, V, S, width, packed, wide, *[integer_kind(n) for n in (rows, per_row, chunks, documents, batch * length)]),
    )


def launches(BK: int, V: int, wide: bool) -> dict[str, Launch]:
    """Launch parameters of each kernel by padded key width, value width and whether inputs are fp32. Measured on an H200 (README.md)."""
    BV = _power_of_two(V) if V <= 64 else 128 if V % 128 == 0 or V > 256 else 64
    half = min(64, BV)
    if wide:
        scan = Launch(block=min(32, BV), warps=4)
        rest = {
            "pair": Launch(block=min(BK, 64), warps=4),
            "pairs": Launch(block=min(32, BV), warps=4),
            "gradient": Launch(block=min(32, BK), warps=4, inner=min(32, BV)),
            **dict.fromkeys(("output", "states", "summary", "backward", "backward_summary"), scan),
        }
    elif BK <= 128:
        rest = {
            "pair": Launch(block=BK, warps=4, registers=128),
            "output": Launch(block=half, warps=4, stages=2),
            "states": Launch(block=half, warps=4, stages=3),
            "summary": Launch(block=half, warps=4, stages=3),
            "backward": Launch(block=half, warps=4, stages=3),
            "backward_summary": Launch(block=half, warps=4, stages=3),
            "pairs": Launch(block=BV, warps=4),
            "gradient": Launch(block=BK, warps=4, stages=3, inner=half),
        }
    else:
        wide_scan = Launch(block=BV, warps=8, stages=2)
        rest = {
            "pair": Launch(block=128, warps=4, registers=128),
            "output": wide_scan,
            "states": Launch(block=half, warps=8, stages=2),
            "summary": Launch(block=half, warps=8, stages=2),
            "backward": wide_scan,
            "backward_summary": wide_scan,
            "pairs": Launch(block=BV, warps=4),
            "gradient": Launch(block=128, warps=4, stages=3, inner=half),
        }
    return {"gates": Launch(block=0, warps=2), "handover": Launch(block=16, warps=8, stages=2 if BK <= 128 else 1), **rest}


def segment_chunks(chunks: int, documents: int, programs: int, packed: bool, processors: int) -> int:
    """Chunks of a segment, 0 for none, by the estimated time in microseconds (H200, K = V = 128; README.md).

    A step of a program takes 3.0 alone on a multiprocessor and 3.75 beside another. Without segments: the steps of the longest document
    (twice the mean when packed, for lengths are on the device). With them: 1.4 times the steps of a segment, for the summaries of heads
    that forget are short, 2.8 for each link of the chain, and two more launches.
    """

    def step(count: int) -> float:
        return 3.0 if count <= processors else 3.75 * math.ceil(count / (2 * processors))

    longest = min(chunks, -(-chunks // max(documents, 1)) * (2 if packed and documents > 1 else 1))
    best, S = longest * step(documents * programs), 0
    for size in (4, 8, 16, 32, 64, 128):
        segments = -(-chunks // size)
        cost = (1.4 * step(segments * programs) + 0.5) * size + 2.8 * segments + 10
        if segments > 1 and cost < best:
            best, S = cost, size
    return S


def slab_chunks(stretch: int, programs: int) -> int:
    """Chunks of a slab for runs of this many: the fewest, from 8 on, that give the kernels over all chunks of a slab 3300 programs, 25 for
    each multiprocessor of an H200. `programs` are those of one chunk of every run. Slabs are made even.

    Each slab more costs its four launches some 40 us at that size, for in a launch all programs first wait for their loads (README.md).
    """
    width = max(8, -(-3300 // max(programs, 1)))
    slabs = max(1, -(-stretch // width))
    return max(1, -(-stretch // slabs))


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, final state; saved: Phi, A, gates, with segments norms, crosses, carried and entering, and the states midway."""
    p = _plan(q, v, cu_seqlens, chunk_table)
    q, k, v = _rows(q), _rows(k), _rows(v)
    g, beta = _aligned(g), _aligned(beta)
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final, *saved = _buffers(p, q, keep)
    if p.chunks == 0:
        return o, final.zero_() if initial_state is None else final.copy_(initial_state), *saved
    phi, scores, gates, norms, crosses, carried, entering, midway = saved
    initial_state = None if initial_state is None else _aligned(initial_state)
    key = _key(p, q, k, v, g, beta, initial_state is None)
    bounds = (cu_seqlens, chunk_table, chunk_offsets)
    heads = min(16, _power_of_two(p.HV))
    use = p.launches["gates"]
    use(gates_kernel, key, -(-p.HV // heads) * p.chunks, g, beta, gates, *bounds[:2], p.length, p.per_row, p.HV, heads, p.packed)
    use = p.launches["pair"]
    use(
        pair_kernel, key, p.HV * p.chunks, q, k, phi, scores, gates, norms, *bounds[:2], p.length, p.per_row, scale, q.stride(1), k.stride(1),
        p.HV, p.HV // p.H, p.K, use.block, p.packed, p.S > 0, p.wide,
    )  # fmt: skip
    if p.S:
        added = torch.empty((p.segments, p.HV, p.K, p.V), dtype=torch.float32, device=q.device)
        use = p.launches["summary"]
        use(
            summary_kernel, key, (-(-p.V // use.block) - (-p.K // use.block)) * p.HV * (p.segments - 1), k, v, phi, gates, norms, initial_state,
            added, carried, crosses, *bounds, p.length, p.per_row, p.chunks, p.S, k.stride(1), v.stride(1), p.H, p.HV, p.K, p.V, p.BK,
            use.block, _power_of_two(p.S), p.packed, initial_state is not None, p.wide, use.stages,
        )  # fmt: skip
        _hand_over(p, key, added, carried, crosses, entering, backward=False)
    use = p.launches["output"]
    halting = keep and p.slabs > 1
    use(
        output_kernel, (key, halting), -(-p.V // use.block) * p.HV * p.runs, q, k, v, phi, scores, gates, o, initial_state, entering, midway, final,
        *bounds, p.length, p.per_row, p.chunks, p.documents, p.S, p.width, scale, q.stride(1), k.stride(1), v.stride(1), p.H, p.HV, p.K, p.V, p.BK,
        use.block, p.S > 0, p.packed, initial_state is not None, halting, p.wide, use.stages,
    )  # fmt: skip
    return o, final, *saved


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, g, beta, initial_state, *bounds, scale = args
    phi, scores, gates, norms, crosses, carried, entering, midway = saved
    do, d_final = grads
    p = _plan(q, v, bounds[0], bounds[1])
    q, k, v, g = _rows(q), _rows(k), _rows(v), _aligned(g)
    do = torch.zeros_like(v, memory_format=torch.contiguous_format) if do is None else _aligned(do)
    d_final = None if d_final is None else _aligned(d_final)
    dq, dk = (torch.empty((*x.shape,), dtype=x.dtype, device=x.device) for x in (q, k))
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    d_initial = None if initial_state is None else torch.empty_like(initial_state, memory_format=torch.contiguous_format)
    if p.chunks == 0:
        if d_initial is not None:
            d_initial = d_initial.zero_() if d_final is None else d_final
        return [dq, dk, dv, torch.zeros_like(g), torch.zeros_like(beta), d_initial]
    initial_state = None if initial_state is None else _aligned(initial_state)
    key = _key(p, q, k, v, g, beta, initial_state is None, d_final is None)
    leaving = entering
    if p.S:
        added, leaving = torch.empty_like(entering), torch.empty_like(entering)
        use = p.launches["backward_summary"]
        use(
            backward_summary_kernel, key, -(-p.V // use.block) * p.HV * (p.segments - 1), q, k, phi, scores, gates, norms, do, d_final, added,
            *bounds, p.length, p.per_row, p.chunks, p.S, scale, q.stride(1), k.stride(1), p.H, p.HV, p.K, p.V, p.BK, use.block,
            _power_of_two(p.S), p.packed, d_final is not None, p.wide, use.stages,
        )  # fmt: skip
        _hand_over(p, key, added, carried, crosses, leaving, backward=True)
        del added
    states, d_states = (torch.empty((p.slots, p.HV, p.V, p.K), dtype=q.dtype, device=q.device) for _ in range(2))
    errors = torch.empty((p.slots, p.HV, p.V, CHUNK), dtype=q.dtype, device=q.device)
    pairs, d_scores = (torch.empty((p.slots, p.HV, CHUNK, CHUNK), dtype=q.dtype, device=q.device) for _ in range(2))
    between = torch.empty((p.runs if p.slabs > 1 else 0, p.HV, p.K, p.V), dtype=torch.float32, device=q.device)
    dbeta = torch.empty(beta.shape, dtype=torch.float32, device=g.device)
    blocks = 2 * -(-p.K // p.launches["gradient"].block)
    dg = torch.empty((blocks, *g.shape), dtype=torch.float32, device=g.device)
    ends = d_final is not None, d_initial is not None
    for slab in reversed(range(p.slabs)):
        use = p.launches["states"]
        use(
            states_kernel, key, -(-p.V // use.block) * p.HV * p.runs, k, v, phi, gates, states, errors, initial_state, entering, midway, *bounds,
            p.length, p.per_row, p.chunks, p.documents, p.S, p.width, slab, k.stride(1), v.stride(1), p.H, p.HV, p.K, p.V, p.BK, use.block,
            p.S > 0, p.packed, initial_state is not None, p.wide, use.stages,
        )  # fmt: skip
        use = p.launches["backward"]
        use(
            backward_kernel, key, -(-p.V // use.block) * p.HV * p.runs, q, k, phi, scores, gates, do, d_states, dv, d_final, leaving, between,
            d_initial, *bounds, p.length, p.per_row, p.chunks, p.documents, p.S, p.width, slab, scale, q.stride(1), k.stride(1), p.H,
            p.HV, p.K, p.V, p.BK, use.block, p.S > 0, p.packed, *ends, p.wide, use.stages,
        )  # fmt: skip
        use = p.launches["pairs"]
        use(
            pairs_kernel, key, p.HV * p.slots, gates, do, errors, d_scores, pairs, dv, dbeta, *bounds[:2], p.length, p.per_row, p.chunks,
            p.stretch, p.width, slab, scale, p.HV, p.V, use.block, p.packed, p.wide, use.stages,
        )  # fmt: skip
        use = p.launches["gradient"]
        use(
            gradient_kernel, key, blocks * p.H * p.slots, q, k, g, gates, do, states, errors, d_states, dv, d_scores, pairs, dq, dk, dg,
            *bounds[:2], p.length, p.per_row, p.chunks, p.stretch, p.width, slab, scale, p.tokens, q.stride(1), k.stride(1), p.H, p.HV,
            p.HV // p.H, p.K, p.V, use.block, use.inner, p.packed, p.wide, use.stages,
        )  # fmt: skip
    del states, d_states, errors, pairs, d_scores, between
    return [dq, dk, dv, dg.sum(0).to(g.dtype), dbeta.to(beta.dtype), d_initial]


def _hand_over(p: Plan, key: Any, added: Tensor, carried: Tensor, crosses: Tensor, out: Tensor, *, backward: bool) -> None:
    use = p.launches["handover"]
    use(
        handover_kernel, (key, backward), -(-p.V // use.block) * p.HV, added, carried, crosses, out, p.segments, p.HV, p.K, p.V, p.BK, use.block, backward,
        use.stages,
    )  # fmt: skip


def _plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Plan:
    B, T, H, K = q.shape
    wide = q.dtype == torch.float32
    processors = hardware.multiprocessors(q.device.index or 0)
    if cu_seqlens is None or chunk_table is None:
        return plan(B, T, B, B * -(-T // CHUNK), H, v.shape[2], K, v.shape[3], False, wide, processors)
    return plan(B, T, cu_seqlens.shape[0] - 1, chunk_table.shape[0], H, v.shape[2], K, v.shape[3], True, wide, processors)


def _key(p: Plan, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *absent: bool) -> tuple[Any, ...]:
    """What the compiled kernels depend on, beside what each launch is. All pointers are multiples of 16 bytes."""
    return p.code, q.dtype, g.dtype, beta.dtype, q.stride(1), k.stride(1), v.stride(1), absent


def _buffers(p: Plan, like: Tensor, keep: bool) -> Tensors:
    """final, Phi, A, gates, norms, crosses, carried, entering, midway."""
    f32 = {"dtype": torch.float32, "device": like.device}
    segmented = [p.segments, p.HV]
    return (
        torch.empty((p.documents, p.HV, p.K, p.V), **f32),
        torch.empty((p.chunks, p.HV, CHUNK, CHUNK), dtype=like.dtype, device=like.device),
        torch.empty((p.chunks, p.HV, CHUNK, CHUNK), dtype=like.dtype, device=like.device),
        torch.empty((p.chunks, p.HV, GATES, CHUNK), **f32),
        torch.empty((p.chunks if p.S else 0, p.HV), **f32),
        torch.empty(segmented, dtype=torch.int32, device=like.device),
        torch.empty((*segmented, p.K, p.K), **f32),
        torch.empty((*segmented, p.K, p.V), **f32),
        torch.empty((p.slabs - 1 if keep else 0, p.runs, p.HV, p.K, p.V), **f32),
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
    sizes = (*q.shape, *v.shape, *(() if cu_seqlens is None or chunk_table is None else (*cu_seqlens.shape, *chunk_table.shape)))
    if all(isinstance(size, int) for size in sizes):
        return (v.new_empty(v.shape), *_buffers(_plan(q, v, cu_seqlens, chunk_table), q, keep))
    return (v.new_empty(v.shape), *_buffers_of_any_size(q, v, cu_seqlens, chunk_table))


def _buffers_of_any_size(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None) -> Tensors:
    """`_buffers` in a graph for any number of tokens or documents: what the plan decides is then known only when it runs."""
    (B, T, _, K), (HV, V) = q.shape, v.shape[2:]
    documents = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    chunks = B * -(-T // CHUNK) if chunk_table is None else chunk_table.shape[0]
    context = torch.library.get_ctx()
    segmented, segments, slabs, runs = (context.new_dynamic_size() for _ in range(4))
    f32 = functools.partial(q.new_empty, dtype=torch.float32)
    return (
        f32((documents, HV, K, V)),
        q.new_empty((chunks, HV, CHUNK, CHUNK)),
        q.new_empty((chunks, HV, CHUNK, CHUNK)),
        f32((chunks, HV, GATES, CHUNK)),
        f32((segmented, HV)),
        q.new_empty((segments, HV), dtype=torch.int32),
        f32((segments, HV, K, K)),
        f32((segments, HV, K, V)),
        f32((slabs, runs, HV, K, V)),
    )


_OPAQUE = Opaque(
    "gdn::gated_delta_rule_portable",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "initial_state"),
)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_delta_rule`."""
    K, V = q.shape[3], v.shape[3]
    more_k, more_v = -K % 8, -V % 8  # loads take eight elements at a time
    if more_k:
        q, k = F.pad(q, (0, more_k)), F.pad(k, (0, more_k))
    if more_v:
        v = F.pad(v, (0, more_v))
    if initial_state is not None and (more_k or more_v):
        initial_state = F.pad(initial_state, (0, more_v, 0, more_k))
    bounds: tuple[Any, ...] = (None, None, None) if packing is None else (packing.cu_seqlens, packing.chunk_table, packing.chunk_offsets)
    o, final = _OPAQUE(q, k, v, g, beta, initial_state, *bounds, scale)
    return (o[..., :V], final[..., :K, :V]) if more_k or more_v else (o, final)
