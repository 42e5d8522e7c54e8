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
of the keys. Only Phi, the correction, is rounded, for most inputs of 16 bits to fp16 in units that suit it (`minus_solved`); the identity of
R = (I - Phi diag(beta)) Z stays exact, and only the gradient of a beta that is not tiny is a quotient by it. The backward keeps of the
forward Phi, A and the gates (and, with segments, the states that enter them, and the states where slabs begin); it recomputes the states.

Backward, from dO and dS' (formulas in portable_grad.py for the rest):

    X   = A^T dO + diag(D) K dS'                        dU = X - Phi^T diag(beta) X
    dS  = gamma_last dS' + scale Q^T diag(gamma) dO - K^T diag(gamma beta) dU

Launches, forward: pair (all chunks at once; before many of them gates), output (chunk after chunk). Backward: states, backward, then
pairs and gradient (all chunks at once); all four for one slab of time after another, the last first, so that no buffer holds the states
of all chunks (README.md). Long sequences with few heads are cut into segments: then summary and handover come before output, and before
backward. Sums run in a fixed order and nothing is atomic: the same inputs give the same bits. Launch parameters come from `plan`.

Where a token has several writes (gdn/ops/delta_product), tokens are writes above, and Q, O, A, dO and dQ have only the rows that are read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core import device as hardware
from gdn.core.opaque import Arguments, Opaque, Tensors, decided
from gdn.core.packing import CHUNK, Packing
from gdn.core.portable_rows import aligned as _aligned
from gdn.core.portable_rows import fresh
from gdn.core.portable_rows import token_rows as _rows
from gdn.core.portable_schedule import Schedule
from gdn.core.portable_workspace import Buffers, Workspace
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

    @property
    def resources(self) -> dict[str, Any]:
        return {"warps": self.warps, "registers": self.registers}


class Kind(NamedTuple):
    """What the launches of a call depend on beside its sizes. All pointers are multiples of 16 bytes."""

    dtypes: tuple[torch.dtype, ...]
    """Of q, g and beta."""
    strides: tuple[int, ...]
    """From token to token, of q, k and v."""
    scale: float
    initial: bool
    """Whether there is an initial state."""
    also: bool
    """Forward: whether a backward will follow. Backward: whether the final state has a gradient."""


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
    writes: int
    """Of a token; all sizes above count writes."""
    apart: bool
    """Whether the gates have a kernel of their own: always where a token has several writes, since Triton 3.6 may sum them wrong in the
    pair kernel then (notes/triton_pipelines.md)."""
    launches: dict[str, Launch]
    made: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)
    """What `prepared` has made."""

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
    def reads(self) -> int:
        """Rows of the queries, outputs and scores of a chunk."""
        return chunk_reads(self.writes, self.wide)

    @property
    def slots(self) -> int:
        """Chunks that the buffers of a slab have room for."""
        return self.width * (self.documents if not self.packed and not self.S else max(self.segments, 1))

    def prepared(self, make: Callable[[Plan, Kind], Prepared], kind: Kind) -> Prepared:
        """`make(self, kind)`, made once."""
        found = self.made.get((make, kind))
        if found is None:
            found = self.made[make, kind] = make(self, kind)
        return found


@functools.lru_cache(maxsize=4096)
def plan(
    batch: int,
    length: int,
    documents: int,
    chunks: int,
    H: int,
    HV: int,
    K: int,
    V: int,
    packed: bool,
    wide: bool,
    processors: int,
    room: int,
    writes: int,
) -> Plan:
    """The launch parameters for a shape on a GPU with this many multiprocessors and this much `hardware.room`."""
    processors = processors or 132
    chains = HV * -(-V // 16)
    choose = functools.partial(launches, K, V, wide, chained=chains > processors, room=room)
    table = choose()
    programs = HV * -(-V // table["output"].block)
    rows, per_row = batch * length if packed else length, -(-length // CHUNK)
    S = segment_chunks(chunks, documents, programs, packed, processors)
    runs, stretch = (-(-chunks // S), S) if S else (1, chunks) if packed else (batch, per_row)
    if (runs if S or not packed else documents) * programs > processors:
        table = choose(crowded=True)
    width = max(1, stretch) if packed and not S else slab_chunks(stretch, runs * H * 2 * -(-K // table["gradient"].block), K > 128)
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
        writes=writes,
        apart=writes > 1 or gates_apart(chunks * HV),
        launches=table,
    )


def launches(K: int, V: int, wide: bool, *, crowded: bool = False, chained: bool = False, room: int = hardware.HOPPER) -> dict[str, Launch]:
    """Launch parameters of each kernel by key width, value width and whether inputs are fp32. Measured on an H200 (README.md).

    Crowded: a multiprocessor has more than one program of 64 columns. Where two would load the same k and q, one of 128 columns loads them once.
    Chained: it has more than one of 16 columns of the hand-over. With less room than Hopper's: what fits, not measured on any GPU.
    """
    BK, BV = _power_of_two(K), _power_of_two(V) if V <= 64 else 128 if V % 128 == 0 or V > 256 else 64
    half = min(64, BV)
    if wide:
        # without a limit ptxas takes 32 registers here and spills all (notes/triton_pipelines.md)
        scan = Launch(block=min(32, BV), warps=4, registers=255 if BK > 128 else None)
        rest = {
            "pair": Launch(block=min(BK, 64), warps=4, registers=255),
            "pairs": Launch(block=min(32, BV), warps=4),
            "gradient": Launch(block=min(32, BK), warps=4, inner=min(32, BV)),
            **dict.fromkeys(("output", "states", "summary", "backward", "backward_summary"), scan),
        }
    elif BK <= 128:
        together = Launch(block=BV, warps=8, stages=3) if crowded and BV == 128 and room >= hardware.AMPERE else None
        rest = {
            "pair": Launch(block=BK, warps=4, registers=168),
            "output": together or Launch(block=half, warps=4, stages=2),
            "states": together or Launch(block=half, warps=4, stages=3),
            "summary": Launch(block=half, warps=4, stages=3),
            "backward": together or Launch(block=half, warps=4, stages=3),
            "backward_summary": Launch(block=half, warps=4, stages=3),
            "pairs": Launch(block=BV, warps=4),
            "gradient": Launch(block=BK, warps=4, stages=3, inner=half),
        }
    else:
        scan, narrow = Launch(block=BV, warps=8, stages=2), Launch(block=half, warps=8, stages=2)
        whole = V % BV == 0 or V <= 64  # else registers go to bounds, and much of the last block to nothing
        rest = {
            "pair": Launch(block=128, warps=4, registers=168),
            "output": scan,
            "states": scan if whole and K == BK else narrow,
            "summary": narrow,
            "backward": scan if whole else Launch(block=half, warps=4, stages=2),
            "backward_summary": scan,
            "pairs": Launch(block=BV if whole else half, warps=4),
            "gradient": Launch(block=128, warps=4, stages=3, inner=half),
        }
    warps = 8 if BK > 64 else 4  # 16 rows a warp at least (notes/triton_pipelines.md)
    if chained and BK == 128 and not wide:
        handover = Launch(block=32, warps=warps, stages=2)
    else:
        handover = Launch(block=16, warps=warps, stages=1 if BK > 128 else 2 if wide else 3)
    return {"handover": handover, **rest} if wide or room >= hardware.HOPPER else {"handover": handover, **rest, **_smaller(BK, half, room)}


def _smaller(BK: int, half: int, room: int) -> dict[str, Launch]:
    """In place of the launches for inputs of 16 bits that need more shared memory than `room` (README.md)."""
    if BK > 128:
        scan = Launch(block=half, warps=8, stages=2 if room >= hardware.AMPERE else 1)
        return {"states": Launch(block=half, warps=8, stages=2), **dict.fromkeys(("output", "backward", "backward_summary"), scan)}
    if room >= hardware.AMPERE:
        return {}
    scan = Launch(block=half, warps=4, stages=2)
    return {"handover": Launch(block=16, warps=8 if BK > 64 else 4, stages=2), "backward": scan, "backward_summary": scan}


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


def slab_chunks(stretch: int, programs: int, wide_keys: bool) -> int:
    """Chunks of a slab for runs of this many: the fewest, from 8 on, that give the kernels over all chunks of a slab 3300 programs, 25 for
    each multiprocessor of an H200, but a third of the run at most; with keys wider than 128 three times as many, and half of the run.
    `programs` are those of one chunk of every run. Slabs are made even.

    Each slab more costs its four launches some 40 us at that size, for in a launch all programs first wait for their loads (README.md).
    """
    least, most = (9900, 2) if wide_keys else (3300, 3)
    width = max(8, -(-least // max(programs, 1)))
    slabs = max(1, -(-stretch // width), min(most, stretch // 8))
    return max(1, -(-stretch // slabs))


def gates_apart(tiles: int) -> bool:
    """Whether so many chunks of value heads are worth a kernel of their own for the gates: one launch more, of 18 us, for 71 of the 712 us
    of `pair_kernel` with 64 heads, 8 x 4096. Below, the pair kernel finds them while it waits for other things anyway (README.md)."""
    return tiles >= 12000


def chunk_reads(writes: int, wide: bool) -> int:
    """Rows for the reads of 64 writes, as many a token: a power of two, and at least the 16 that a product has. 32 for fp32, since the turned
    scores of 16 rows would have rows of 64 bytes in shared memory beside others of 128 (notes/triton_pipelines.md)."""
    return max(_power_of_two(-(-CHUNK // writes)), 32 if wide else 16)


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
    writes: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o, final state; saved: one workspace (`_kept`)."""
    p = _plan(q, v, cu_seqlens, chunk_table, writes)
    q, k, v = _rows(q), _rows(k), _rows(v)
    g, beta = _aligned(g), _aligned(beta)
    initial = None if initial_state is None else _aligned(initial_state)
    schedule, workspace, more = p.prepared(_schedule_forward, _kind(q, k, v, g, beta, scale, initial, keep))
    o = fresh(v) if writes == 1 else v.new_empty(*q.shape[:2], p.HV, p.V)
    final = torch.empty((p.documents, p.HV, p.K, p.V), dtype=torch.float32, device=q.device)
    kept = workspace.allocate(q)
    if p.chunks == 0:
        return o, final.zero_() if initial is None else final.copy_(initial), kept
    bounds = {"cu_seqlens": cu_seqlens, "chunk_table": chunk_table, "chunk_offsets": chunk_offsets}
    spaces = [(workspace, kept), *[(each, each.allocate(q)) for each in more]]
    schedule.run({"q": q, "k": k, "v": v, "g": g, "beta": beta, "o": o, "initial": initial, "final": final, **bounds}, *spaces)
    return o, final, kept


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, g, beta, initial_state, cu_seqlens, chunk_table, chunk_offsets, scale, writes = args
    do, d_final = grads
    p = _plan(q, v, cu_seqlens, chunk_table, writes)
    q, k, v, g = _rows(q), _rows(k), _rows(v), _aligned(g)
    do = v.new_zeros(*q.shape[:2], p.HV, p.V) if do is None else _aligned(do)
    d_final = None if d_final is None else _aligned(d_final)
    dq, dk, dv, dbeta = (fresh(x) for x in (q, k, v, beta))
    d_initial = None if initial_state is None else fresh(initial_state)
    if p.chunks == 0:
        if d_initial is not None:
            d_initial = d_initial.zero_() if d_final is None else d_initial.copy_(d_final)
        return [dq, dk, dv, torch.zeros_like(g), dbeta, d_initial]
    initial = None if initial_state is None else _aligned(initial_state)
    schedule, workspace, more = p.prepared(_schedule_backward, _kind(q, k, v, g, beta, scale, initial, d_final is not None))
    dg = torch.empty((2 * _key_blocks(p), *g.shape), dtype=torch.float32, device=g.device)
    shares = _key_blocks(p) if q.dtype == torch.bfloat16 else 1
    d_written = dbeta if shares == 1 else torch.empty((shares, *beta.shape), dtype=torch.float32, device=beta.device)
    inputs = {"q": q, "k": k, "v": v, "g": g, "initial": initial, "do": do, "d_final": d_final}
    outputs = {"dq": dq, "dk": dk, "dv": dv, "dg": dg, "dbeta": d_written, "d_initial": d_initial}
    bounds = {"cu_seqlens": cu_seqlens, "chunk_table": chunk_table, "chunk_offsets": chunk_offsets}
    schedule.run(inputs | outputs | bounds, (workspace, _aligned(saved[0])), *[(each, each.allocate(q)) for each in more])
    if shares > 1:
        dbeta = d_written.sum(0).to(beta.dtype)
    return [dq, dk, dv, dg.sum(0).to(g.dtype), dbeta, d_initial]


Prepared = tuple[Schedule, Workspace, tuple[Workspace, ...]]
"""The launches, what is kept from forward to backward, and other memory."""


def _schedule_forward(p: Plan, kind: Kind) -> Prepared:
    schedule, keep = _schedule(p, kind), kind.also
    if p.apart:
        heads = min(16, _power_of_two(p.HV))
        schedule.add(gates_kernel, -(-p.HV // heads) * p.chunks, warps=2, BH=heads)
    use = p.launches["pair"]
    sizes = {"GROUP": p.HV // p.H, "BK": use.block}
    schedule.add(pair_kernel, p.HV * p.chunks, **use.resources, **sizes, APART=p.apart, NORMS=p.S > 0)
    if p.S:
        use = p.launches["summary"]
        programs = (-(-p.V // use.block) - (-p.K // use.block)) * p.HV * (p.segments - 1)
        schedule.add(summary_kernel, programs, **use.resources, BV=use.block, BS=_power_of_two(p.S), STAGES=use.stages)
        _add_handover(schedule, p, "entering", backward=False)
    use = p.launches["output"]
    halting = keep and p.slabs > 1
    schedule.add(output_kernel, _columns(p, use), **use.resources, BV=use.block, MIDWAY=halting, STAGES=use.stages)
    return schedule, _kept(p, kind.dtypes[0], keep), (Workspace({"added": _handed(p)}),) if p.S and keep else ()


def _schedule_backward(p: Plan, kind: Kind) -> Prepared:
    schedule, narrow = _schedule(p, kind), kind.dtypes[0]
    leaving = "leaving" if p.S else "entering"
    if p.S:
        use = p.launches["backward_summary"]
        programs = -(-p.V // use.block) * p.HV * (p.segments - 1)
        schedule.add(
            backward_summary_kernel, programs, **use.resources, BV=use.block, BS=_power_of_two(p.S), FINAL=kind.also, STAGES=use.stages
        )
        _add_handover(schedule, p, "leaving", backward=True)
    for slab in reversed(range(p.slabs)):
        use = p.launches["states"]
        schedule.add(states_kernel, _columns(p, use), **use.resources, slab=slab, BV=use.block, STAGES=use.stages)
        use = p.launches["backward"]
        schedule.add(
            backward_kernel, _columns(p, use), **use.resources, names={"leaving": leaving}, slab=slab, BV=use.block, FINAL=kind.also,
            STAGES=use.stages,
        )  # fmt: skip
        use = p.launches["pairs"]
        schedule.add(pairs_kernel, p.HV * p.slots, **use.resources, slab=slab, BV=use.block, STAGES=use.stages)
        use = p.launches["gradient"]
        schedule.add(
            gradient_kernel, 2 * _key_blocks(p) * p.H * p.slots, **use.resources, slab=slab, GROUP=p.HV // p.H, BK=use.block, BV=use.inner,
            STAGES=use.stages,
        )  # fmt: skip
    handed: Buffers = {"leaving": _handed(p)} if p.S else {}
    slabs: Buffers = {
        "states": ((p.slots, p.HV, p.V, p.K), narrow),
        "d_states": ((p.slots, p.HV, p.V, p.K), narrow),
        "errors": ((p.slots, p.HV, p.V, CHUNK), narrow),
        "pairs": ((p.slots, p.HV, CHUNK, CHUNK), narrow),
        "d_scores": ((p.slots, p.HV, p.reads, CHUNK), narrow),
        "between": ((p.runs if p.slabs > 1 else 0, p.HV, p.K, p.V), torch.float32),
    }
    return schedule, _kept(p, narrow, True), (Workspace(handed, {"added": _handed(p)} if p.S else {}, slabs),)


def _schedule(p: Plan, kind: Kind) -> Schedule:
    """A schedule that knows what all kernels are told alike."""
    q_stride, k_stride, v_stride = kind.strides
    return Schedule(
        T=p.length,
        per_row=p.per_row,
        chunks=p.chunks,
        documents=p.documents,
        segments=p.segments,
        S=p.S,
        width=p.width,
        length=p.stretch,
        tokens=p.tokens,
        scale=kind.scale,
        q_stride=q_stride,
        k_stride=k_stride,
        v_stride=v_stride,
        H=p.H,
        HV=p.HV,
        K=p.K,
        V=p.V,
        BK=p.BK,
        PACKED=p.packed,
        SEGMENTS=p.S > 0,
        INITIAL=kind.initial,
        WIDE=p.wide,
        WRITES=p.writes,
        READS=p.reads,
    )


def _add_handover(schedule: Schedule, p: Plan, out: str, *, backward: bool) -> None:
    use = p.launches["handover"]
    programs = -(-p.V // use.block) * p.HV
    sizes = {"BV": use.block, "BS": _power_of_two(p.segments)}
    schedule.add(handover_kernel, programs, **use.resources, names={"out": out}, **sizes, BACKWARD=backward, STAGES=use.stages)


def _columns(p: Plan, use: Launch) -> int:
    """Programs of a kernel that walks along every run with a block of columns of every head."""
    return -(-p.V // use.block) * p.HV * p.runs


def _key_blocks(p: Plan) -> int:
    return -(-p.K // p.launches["gradient"].block)


def _handed(p: Plan) -> tuple[tuple[int, ...], torch.dtype]:
    """A state for each segment and head."""
    return (p.segments, p.HV, p.K, p.V), torch.float32


def _kept(p: Plan, dtype: torch.dtype, keep: bool) -> Workspace:
    """What forward finds for itself and for backward."""
    maps = ((p.segments, p.HV, p.K, p.K), torch.float32) if p.wide else ((p.segments, p.HV, 2, p.K, p.K), torch.bfloat16)
    return Workspace(
        {
            "phi": ((p.chunks, p.HV, CHUNK, CHUNK), dtype if p.wide or p.K > 128 else torch.float16),
            "units": ((p.chunks, p.HV), torch.float32),
            "scores": ((p.chunks, p.HV, p.reads, CHUNK), dtype),
            "gates": ((p.chunks, p.HV, GATES, CHUNK), torch.float32),
            "norms": ((p.chunks if p.S else 0, p.HV), torch.float32),
            "crosses": ((p.segments, p.HV), torch.int32),
            "carried": maps,
            "entering": _handed(p),
            **({} if keep else {"added": _handed(p)}),  # of no use to backward
            "midway": ((max(p.slabs - 1, 0) if keep else 0, p.runs, p.HV, p.K, p.V), torch.float32),
        }
    )


def _plan(q: Tensor, v: Tensor, cu_seqlens: Tensor | None, chunk_table: Tensor | None, writes: int) -> Plan:
    B, T, HV, V = v.shape
    H, K = q.shape[2:]
    wide = q.dtype == torch.float32
    index = q.device.index or 0
    gpu = hardware.multiprocessors(index), hardware.room(index)
    if cu_seqlens is None or chunk_table is None:
        return plan(B, T, B, B * -(-T // CHUNK), H, HV, K, V, False, wide, *gpu, writes)
    return plan(B, T, cu_seqlens.shape[0] - 1, chunk_table.shape[0], H, HV, K, V, True, wide, *gpu, writes)


def _kind(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial: Tensor | None, also: bool) -> Kind:
    strides = (q.stride(1), k.stride(1), v.stride(1))
    return Kind((q.dtype, g.dtype, beta.dtype), strides, scale, initial is not None, also)


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
    writes: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = q.new_empty((documents, *v.shape[2:3], q.shape[3], v.shape[3]), dtype=torch.float32)
    o = v.new_empty((*q.shape[:2], *v.shape[2:]))
    kept = decided(lambda: _kept(_plan(q, v, cu_seqlens, chunk_table, writes), q.dtype, keep).size, q, v, cu_seqlens, chunk_table, writes)
    return o, final, q.new_empty(kept, dtype=torch.uint8)


_OPAQUE = Opaque(
    "gdn::gated_delta_rule_portable",
    _forward,
    _backward,
    fake=_fake,
    results=2,
    differentiable=("q", "k", "v", "g", "beta", "initial_state"),
    replay=True,
    expected=1,
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
    writes: int = 1,
) -> tuple[Tensor, Tensor]:
    """See `gdn.ops.gated_delta_rule`. With several writes a token k, v, beta and packing have a token for each write, as many in a row as belong
    to one; q and g have one for all of them, and so has o: it is read after the last, and g is the decay before the first."""
    K, V = q.shape[3], v.shape[3]
    more_k, more_v = -K % 8, -V % 8  # loads take eight elements at a time
    if more_k:
        q, k = F.pad(q, (0, more_k)), F.pad(k, (0, more_k))
    if more_v:
        v = F.pad(v, (0, more_v))
    if initial_state is not None and (more_k or more_v):
        initial_state = F.pad(initial_state, (0, more_v, 0, more_k))
    bounds: tuple[Any, ...] = (None, None, None) if packing is None else (packing.cu_seqlens, packing.chunk_table, packing.chunk_offsets)
    o, final = _OPAQUE(q, k, v, g, beta, initial_state, *bounds, scale, writes)
    return (o[..., :V], final[..., :K, :V]) if more_k or more_v else (o, final)
