"""Windowed sigmoid attention in Triton: any GPU from sm_80 on, or the CPU under `TRITON_INTERPRET=1`. Formulas: README.md.

A sum of sigmoids needs no normalisation over the row, so the forward pass is one loop over the keys that a block of queries reaches, with
nothing to rescale and nothing to save. The backward pass computes the weights of a tile again: one kernel owns blocks of keys and sums dk
and dv, another owns blocks of queries and sums dq and the gradient of the slopes. Each number is summed by one program in a fixed order.

Tiles that no window or document reaches are not visited. The bounds of a block's loop come from its first and last token, so the loop falls
in three: tiles with an edge of the window or a document, tiles seen as a whole, which need no mask, and tiles on the other edge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from gdn.core import device as hardware
from gdn.core.opaque import Arguments, Opaque, Tensors
from gdn.core.packing import Packing
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64, sigmoid
from gdn.core.portable_rows import aligned, fresh, power_of_two, token_rows

_LOG2_E = tl.constexpr(1.4426950408889634)
LONG_ROW = 1 << 31
"""Elements of a row of the batch from which on offsets of tokens are int64. They take registers, of which `key_gradient_kernel` has none left: for
sm_90 it would spill 180 bytes for 76 with heads of 64 in 16 bits, and 300 for 164 with heads of 128."""


@dataclass(frozen=True)
class Launch:
    """Block sizes and resources of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Depth of the software pipeline of its loop."""


def launches(width: int, wide: bool, room: int) -> dict[str, Launch]:
    """Launch parameters of each kernel by the padded width of the wider of keys and values, whether inputs are float32, and `hardware.room`."""
    if wide:
        size = 64 if width <= 64 else 32 if width <= 128 else 16
        same = Launch(queries=size, keys=min(size, 32), warps=4, stages=2 if width <= 128 else 1)
        return dict.fromkeys(("forward", "keys", "queries"), same)
    if width <= 64:
        return {
            "forward": Launch(queries=128, keys=64, warps=4, stages=3),
            "keys": Launch(queries=64, keys=128, warps=8, stages=3),
            "queries": Launch(queries=128, keys=64, warps=8, stages=3),
        }
    if width <= 128:
        return {
            "forward": Launch(queries=128, keys=64, warps=8, stages=3),
            "keys": Launch(queries=32, keys=128, warps=8, stages=3),
            "queries": Launch(queries=128, keys=64, warps=8, stages=3 if room >= hardware.AMPERE else 2),
        }
    if room < hardware.AMPERE:
        return {
            "forward": Launch(queries=64, keys=32, warps=4, stages=2),
            "keys": Launch(queries=32, keys=32, warps=8, stages=2),
            "queries": Launch(queries=32, keys=32, warps=8, stages=2),
        }
    return {
        "forward": Launch(queries=128, keys=32, warps=8, stages=2),
        "keys": Launch(queries=32, keys=64, warps=8, stages=2),
        "queries": Launch(queries=64, keys=32, warps=8, stages=2),
    }


# --- what the kernels share


@triton.jit
def widened(H, q_stride, k_stride, v_stride, LONG: tl.constexpr):
    """What tokens are multiplied with in offsets, as int64 if a row is long: so are the offsets then."""
    if LONG:
        return int64(H), int64(q_stride), int64(k_stride), int64(v_stride)
    else:
        return H, q_stride, k_stride, v_stride


@triton.jit
def place(blocks, H):
    """Block of tokens, head and row of a program: blocks vary fastest, then heads, whose keys then stay in the cache."""
    program = tl.program_id(0)
    head = program // blocks
    return program % blocks, head % H, head // H


@triton.jit
def load_tokens(base, token, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `token` of a matrix whose rows are `stride` apart, a multiple of 8 (notes/triton_pipelines.md), zero beyond WIDTH."""
    c = tl.arange(0, BLOCK)[None, :]
    at = base + (token[:, None] * (stride // 8 * 8) + c)
    if WIDTH != BLOCK:
        return tl.load(at, mask=c < WIDTH, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_tokens(base, x, token, valid, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)[None, :]
    tl.store(base + (token[:, None] * stride + c), x.to(base.dtype.element_ty), mask=valid[:, None] & (c < WIDTH))


@triton.jit
def least_keys(own, row, token, positions, start, T, window):
    """The first key that each query at key `own` of a row sees."""
    least = own - window + 1
    if positions is not None:
        least = tl.maximum(least, own - tl.load(positions + int64(row) * T + token))
    if start is not None:
        least = tl.maximum(least, tl.load(start + row).to(tl.int32))
    return tl.maximum(least, 0)


@triton.jit
def dot(x, y, WIDE: tl.constexpr):
    return tl.dot(x, y, input_precision="tf32x3" if WIDE else "tf32")


@triton.jit
def add_dot(acc, x, y, WIDE: tl.constexpr):
    return tl.dot(x, y, acc, input_precision="tf32x3" if WIDE else "tf32")


@triton.jit
def weights_of(products, row, column, scale, slope, WIDE: tl.constexpr):
    """sigmoid(scale * products + slope * distance), the distance being row[:, None] - column[None, :].

    In 16 bits the two parts of the distance are scaled before they are subtracted, and the division is the square of a reciprocal root:
    two and three instructions less for each pair of tokens, at errors of 2^-22 of the weight.
    """
    if WIDE:
        return sigmoid(products * scale + (row[:, None] - column[None, :]) * slope)
    else:
        steep = slope * -_LOG2_E
        root = tl.rsqrt(1.0 + tl.exp2(products * (scale * -_LOG2_E) + ((row * steep)[:, None] - (column * steep)[None, :])))
        return root * root


@triton.jit
def key_loop(least, own, N: tl.constexpr):
    """Bounds of the loop over tiles of N keys for queries at `own`: edge [a, b), whole tiles [b, c), edge [c, d)."""
    a = tl.min(least, 0) // N * N
    d = tl.max(own, 0) + 1
    b = tl.minimum((tl.max(least, 0) + N - 1) // N, (d + N - 1) // N) * N
    c = tl.maximum((tl.min(own, 0) + 1) // N * N, b)
    return a, tl.maximum(b, a), tl.maximum(c, a), d


# --- forward


@triton.jit
def _read(
    acc, q_rows, k, v, own, least, begin, end, S, k_stride, v_stride, scale, slope,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, N: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, N)
    for first in tl.range(begin, end, N, num_stages=STAGES):
        token = tl.minimum(first + j, S - 1)
        products = dot(q_rows, tl.trans(load_tokens(k, token, k_stride, K, BK)), WIDE)
        p = weights_of(products, (own - first).to(tl.float32), j.to(tl.float32), scale, slope, WIDE)
        if MASKED:
            key = (first + j)[None, :]
            p = tl.where((key >= least[:, None]) & (key <= own[:, None]), p, 0.0)
        v_rows = load_tokens(v, token, v_stride, V, BV)
        acc = add_dot(acc, p.to(v_rows.dtype), v_rows, WIDE)
    return acc


@triton.jit
def forward_kernel(
    q, k, v, slopes, o, positions, start, T, S, blocks, window, scale, q_stride, k_stride, v_stride, H, GROUP,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LONG: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o of M queries of one head. Grid [rows * H * query blocks]."""
    H, q_stride, k_stride, v_stride = widened(H, q_stride, k_stride, v_stride, LONG)
    block, head, row = place(blocks, H)
    i = block * M + tl.arange(0, M)
    token = tl.minimum(i, T - 1)
    own = token + (S - T)
    least = least_keys(own, row, token, positions, start, T, window)
    slope = tl.load(slopes + head).to(tl.float32)
    q_rows = load_tokens(q + (int64(row) * T * q_stride + head * K), token, q_stride, K, BK)
    k += int64(row) * S * k_stride + head // GROUP * K
    v += int64(row) * S * v_stride + head // GROUP * V
    a, b, c, d = key_loop(least, own, N)
    acc = tl.zeros((M, BV), tl.float32)
    acc = _read(acc, q_rows, k, v, own, least, a, b, S, k_stride, v_stride, scale, slope, K, V, BK, BV, N, True, WIDE, STAGES)
    acc = _read(acc, q_rows, k, v, own, least, b, c, S, k_stride, v_stride, scale, slope, K, V, BK, BV, N, False, WIDE, STAGES)
    acc = _read(acc, q_rows, k, v, own, least, c, d, S, k_stride, v_stride, scale, slope, K, V, BK, BV, N, True, WIDE, STAGES)
    store_tokens(o + (int64(row) * T * H + head) * V, acc, token, i < T, H * V, V, BV)


# --- backward


@triton.jit
def _query_gradient(
    acc, steep, q_rows, do_rows, k, v, own, least, begin, end, S, k_stride, v_stride, scale, slope,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, N: tl.constexpr,
    SLOPES: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    j = tl.arange(0, N)
    for first in tl.range(begin, end, N, num_stages=STAGES):
        token = tl.minimum(first + j, S - 1)
        k_rows = load_tokens(k, token, k_stride, K, BK)
        v_rows = load_tokens(v, token, v_stride, V, BV)
        products = dot(q_rows, tl.trans(k_rows), WIDE)
        p = weights_of(products, (own - first).to(tl.float32), j.to(tl.float32), scale, slope, WIDE)
        dz = dot(do_rows, tl.trans(v_rows), WIDE) * (p * (1.0 - p))
        if MASKED:
            key = (first + j)[None, :]
            dz = tl.where((key >= least[:, None]) & (key <= own[:, None]), dz, 0.0)
        if SLOPES:
            steep += tl.sum(dz * ((own - first)[:, None] - j[None, :]).to(tl.float32), 1)
        acc = add_dot(acc, dz.to(k_rows.dtype), k_rows, WIDE)
    return acc, steep


@triton.jit
def query_gradient_kernel(
    q, k, v, slopes, do, dq, dslopes, positions, start, T, S, blocks, window, scale, q_stride, k_stride, v_stride, H, GROUP,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LONG: tl.constexpr, SLOPES: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq of M queries of one head, and if SLOPES their part of the slope's gradient, dslopes [rows, H, query blocks].
    Grid [rows * H * query blocks]."""
    H, q_stride, k_stride, v_stride = widened(H, q_stride, k_stride, v_stride, LONG)
    block, head, row = place(blocks, H)
    i = block * M + tl.arange(0, M)
    token = tl.minimum(i, T - 1)
    own = token + (S - T)
    least = least_keys(own, row, token, positions, start, T, window)
    slope = tl.load(slopes + head).to(tl.float32)
    q_rows = load_tokens(q + (int64(row) * T * q_stride + head * K), token, q_stride, K, BK)
    do_rows = load_tokens(do + (int64(row) * T * H + head) * V, token, H * V, V, BV)
    k += int64(row) * S * k_stride + head // GROUP * K
    v += int64(row) * S * v_stride + head // GROUP * V
    a, b, c, d = key_loop(least, own, N)
    acc = tl.zeros((M, BK), tl.float32)
    steep = tl.zeros((M,), tl.float32)
    acc, steep = _query_gradient(
        acc,
        steep,
        q_rows,
        do_rows,
        k,
        v,
        own,
        least,
        a,
        b,
        S,
        k_stride,
        v_stride,
        scale,
        slope,
        K,
        V,
        BK,
        BV,
        N,
        SLOPES,
        True,
        WIDE,
        STAGES,
    )
    acc, steep = _query_gradient(
        acc,
        steep,
        q_rows,
        do_rows,
        k,
        v,
        own,
        least,
        b,
        c,
        S,
        k_stride,
        v_stride,
        scale,
        slope,
        K,
        V,
        BK,
        BV,
        N,
        SLOPES,
        False,
        WIDE,
        STAGES,
    )
    acc, steep = _query_gradient(
        acc,
        steep,
        q_rows,
        do_rows,
        k,
        v,
        own,
        least,
        c,
        d,
        S,
        k_stride,
        v_stride,
        scale,
        slope,
        K,
        V,
        BK,
        BV,
        N,
        SLOPES,
        True,
        WIDE,
        STAGES,
    )
    store_tokens(dq + (int64(row) * T * H + head) * K, acc * scale, token, i < T, H * K, K, BK)
    if SLOPES:
        tl.store(dslopes + tl.program_id(0), tl.sum(tl.where(i < T, steep, 0.0), 0))


@triton.jit
def query_loop(first, last, row, documents, cu_seqlens, start, T, S, window, M: tl.constexpr):
    """Bounds of the loop over tiles of M queries for the keys first .. last: edge [a, b), whole tiles [b, c), edge [c, d)."""
    past = S - T
    end = tl.minimum(last + window - past, T)
    whole = tl.minimum(first + window - past, T)
    if documents is not None:
        origin = int64(row) * T
        end = tl.minimum(end, (tl.load(cu_seqlens + tl.load(documents + origin + last) + 1) - origin).to(tl.int32))
        whole = tl.minimum(whole, (tl.load(cu_seqlens + tl.load(documents + origin + first) + 1) - origin).to(tl.int32))
    if start is not None:
        begin = tl.load(start + row).to(tl.int32)
        end = tl.where(begin > last, 0, end)
        whole = tl.where(begin > first, 0, whole)
    end = tl.maximum(end, 0)
    a = tl.maximum(first - past, 0) // M * M
    b = tl.minimum((tl.maximum(last - past, 0) + M - 1) // M, (end + M - 1) // M) * M
    b = tl.maximum(b, a)
    c = tl.maximum(tl.maximum(whole, 0) // M * M, b)
    return a, b, c, end


@triton.jit
def _key_gradient(
    dk_acc, dv_acc, k_rows, v_rows, q, do, positions, start, row, key, begin, end, T, S, window, q_stride, do_stride, scale, slope,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr,
    MASKED: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, M)
    for first in tl.range(begin, end, M, num_stages=STAGES):
        token = tl.minimum(first + i, T - 1)
        q_rows = load_tokens(q, token, q_stride, K, BK)
        do_rows = load_tokens(do, token, do_stride, V, BV)
        products = dot(k_rows, tl.trans(q_rows), WIDE)
        p = weights_of(products, (first + (S - T) - key).to(tl.float32), -i.to(tl.float32), scale, slope, WIDE)
        if MASKED:
            own = token + (S - T)
            least = least_keys(own, row, token, positions, start, T, window)
            seen = (key[:, None] >= least[None, :]) & (key[:, None] <= own[None, :]) & (first + i < T)[None, :]
            p = tl.where(seen, p, 0.0)
        dv_acc = add_dot(dv_acc, p.to(do_rows.dtype), do_rows, WIDE)
        dz = dot(v_rows, tl.trans(do_rows), WIDE) * (p * (1.0 - p))
        dk_acc = add_dot(dk_acc, dz.to(q_rows.dtype), q_rows, WIDE)
    return dk_acc, dv_acc


@triton.jit
def key_gradient_kernel(
    q, k, v, slopes, do, dk, dv, positions, documents, cu_seqlens, start, T, S, blocks, window, scale, q_stride, k_stride, v_stride, H, GROUP,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    LONG: tl.constexpr, WIDE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of N keys of one key head, summed over the query heads that read it. Grid [rows * key heads * key blocks]."""
    H, q_stride, k_stride, v_stride = widened(H, q_stride, k_stride, v_stride, LONG)
    G = H // GROUP
    block, group, row = place(blocks, G)
    j = block * N + tl.arange(0, N)
    key = tl.minimum(j, S - 1)
    k_rows = load_tokens(k + (int64(row) * S * k_stride + group * K), key, k_stride, K, BK)
    v_rows = load_tokens(v + (int64(row) * S * v_stride + group * V), key, v_stride, V, BV)
    a, b, c, d = query_loop(block * N, tl.minimum(block * N + N, S) - 1, row, documents, cu_seqlens, start, T, S, window, M)
    dk_acc = tl.zeros((N, BK), tl.float32)
    dv_acc = tl.zeros((N, BV), tl.float32)
    for member in tl.range(0, GROUP, num_stages=1):
        head = group * GROUP + member
        slope = tl.load(slopes + head).to(tl.float32)
        q_head = q + (int64(row) * T * q_stride + head * K)
        do_head = do + (int64(row) * T * H + head) * V
        dk_acc, dv_acc = _key_gradient(
            dk_acc, dv_acc, k_rows, v_rows, q_head, do_head, positions, start, row, key, a, b, T, S, window, q_stride, H * V, scale, slope,
            K, V, BK, BV, M, True, WIDE, STAGES,
        )  # fmt: skip
        dk_acc, dv_acc = _key_gradient(
            dk_acc, dv_acc, k_rows, v_rows, q_head, do_head, positions, start, row, key, b, c, T, S, window, q_stride, H * V, scale, slope,
            K, V, BK, BV, M, False, WIDE, STAGES,
        )  # fmt: skip
        dk_acc, dv_acc = _key_gradient(
            dk_acc, dv_acc, k_rows, v_rows, q_head, do_head, positions, start, row, key, c, d, T, S, window, q_stride, H * V, scale, slope,
            K, V, BK, BV, M, True, WIDE, STAGES,
        )  # fmt: skip
    store_tokens(dk + (int64(row) * S * G + group) * K, dk_acc * scale, key, j < S, G * K, K, BK)
    store_tokens(dv + (int64(row) * S * G + group) * V, dv_acc, key, j < S, G * V, V, BV)


# --- the row


@dataclass(frozen=True)
class _Call:
    """Sizes of a call, and the arguments that all three kernels take in the same order."""

    q: Tensor
    k: Tensor
    v: Tensor
    slopes: Tensor
    window: int
    scale: float

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, window: int, scale: float) -> _Call:
        return cls(token_rows(q), token_rows(k), token_rows(v), slopes.contiguous(), min(window, k.shape[1]), scale)

    @property
    def widths(self) -> tuple[int, int, int, int]:
        K, V = self.q.shape[3], self.v.shape[3]
        return K, V, max(16, power_of_two(K)), max(16, power_of_two(V))

    @property
    def is_wide(self) -> bool:
        return self.q.dtype == torch.float32

    @property
    def is_long(self) -> bool:
        """Whether offsets within a row of any tensor, or of a gradient, pass an int32."""
        (_, T, H, _), S = self.q.shape, self.k.shape[1]
        return max(T * self.q.stride(1), T * H * self.v.shape[3], S * self.k.stride(1), S * self.v.stride(1)) >= LONG_ROW

    def launch_of(self, name: str) -> Launch:
        return launches(max(self.widths), self.is_wide, hardware.room(self.q.device.index or 0))[name]

    def sizes(self, blocks: int) -> tuple[Any, ...]:
        """T, S, blocks, window, scale, strides, H, GROUP, then the widths."""
        q, k, v = self.q, self.k, self.v
        strides = (q.stride(1), k.stride(1), v.stride(1))
        return q.shape[1], k.shape[1], blocks, self.window, self.scale, *strides, q.shape[2], q.shape[2] // k.shape[2], *self.widths


def windowed_sigmoid_attention(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, window: int, scale: float, start: Tensor | None, packing: Packing | None
) -> Tensor:
    """See `gdn.ops.windowed_sigmoid_attention`."""
    V, more_k, more_v = v.shape[3], -q.shape[3] % 8, -v.shape[3] % 8  # loads take eight elements at a time
    if more_k:
        q, k = F.pad(q, (0, more_k)), F.pad(k, (0, more_k))
    if more_v:
        v = F.pad(v, (0, more_v))
    bounds = (None, None, None) if packing is None else (packing.positions, packing.documents, packing.cu_seqlens)
    start = None if start is None else start.contiguous()
    (o,) = _OPAQUE(q, k, v, slopes, *bounds, start, window, scale, slopes.requires_grad)
    return o[..., :V] if more_v else o


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    positions: Tensor | None,
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    start: Tensor | None,
    window: int,
    scale: float,
    train_slopes: bool,
    keep: bool,
) -> tuple[Tensor]:
    call = _Call.of(q, k, v, slopes, window, scale)
    use = call.launch_of("forward")
    o = _empty_output(q, v)
    blocks = -(-q.shape[1] // use.queries)
    launch(
        forward_kernel, (q.shape[0] * q.shape[2] * blocks,), call.q, call.k, call.v, call.slopes, o, positions, start, *call.sizes(blocks),
        use.queries, use.keys, call.is_long, call.is_wide, use.stages, warps=use.warps,
    )  # fmt: skip
    return (o,)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor,
    positions: Tensor | None,
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    start: Tensor | None,
    window: int,
    scale: float,
    train_slopes: bool,
    keep: bool,
) -> tuple[Tensor]:
    return (_empty_output(q, v),)


def _empty_output(q: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(*q.shape[:3], v.shape[3])


def _backward(args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    q, k, v, slopes, positions, documents, cu_seqlens, start, window, scale, train_slopes = args
    (do,) = grads
    assert do is not None
    do = aligned(do)
    call = _Call.of(q, k, v, slopes, window, scale)
    dq, dk, dv = (fresh(x) for x in (q, k, v))
    use = call.launch_of("keys")
    blocks = -(-k.shape[1] // use.keys)
    launch(
        key_gradient_kernel, (k.shape[0] * k.shape[2] * blocks,), call.q, call.k, call.v, call.slopes, do, dk, dv, positions, documents, cu_seqlens,
        start, *call.sizes(blocks), use.queries, use.keys, call.is_long, call.is_wide, use.stages, warps=use.warps,
    )  # fmt: skip
    use = call.launch_of("queries")
    blocks = -(-q.shape[1] // use.queries)
    parts = torch.empty((q.shape[0], q.shape[2], blocks if train_slopes else 0), dtype=torch.float32, device=q.device)
    launch(
        query_gradient_kernel, (q.shape[0] * q.shape[2] * blocks,), call.q, call.k, call.v, call.slopes, do, dq, parts, positions, start,
        *call.sizes(blocks), use.queries, use.keys, call.is_long, train_slopes, call.is_wide, use.stages, warps=use.warps,
    )  # fmt: skip
    return [dq, dk, dv, parts.sum((0, 2)).to(slopes.dtype)]


_OPAQUE = Opaque(
    "gdn::windowed_sigmoid_attention_portable",
    _forward,
    _backward,
    fake=_fake,
    results=1,
    differentiable=("q", "k", "v", "slopes"),
    replay=True,
)
