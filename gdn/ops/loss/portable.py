"""The head's loss over chunks of tokens on a GPU: matrix products by torch, all between them in one Triton kernel, in place.

As in chunked.py, a chunk's logits are made once and "mean" and "sum" take their gradients while they are at hand. The kernel turns the
float32 logits of a token into its loss and into the gradient of the logits, softmax minus one at the target, written over them: in bfloat16
(the first half of each row) where both inputs are bfloat16 or autocast says so, so that all three products run on bfloat16 numbers with
float32 sums. Factors that all tokens share come last, on dx and dW, so that the gradient of a logit never leaves the range of its type.
With "mean" and "sum" of dense bfloat16 what stands around the products is two kernels forward and two backward, and a replay
(gdn/core/replay.py) needs torch for nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.device import memory_bytes
from gdn.core.opaque import Opaque
from gdn.core.portable_launch import launch
from gdn.core.portable_math import int64
from gdn.core.replay import asked

CHUNK_LOGITS = 1 << 26
"""Logits of a chunk: 256 MB, 2048 tokens of 32768 words, with which the products run at nearly full speed."""
ROOMY = 64 << 30
"""Bytes of a GPU on which a chunk has twice as many: on an H200 32768 tokens of 32000 words in 21.8 ms for 22.8."""
BLOCK = 4096
"""Logits of a program at a time."""


@triton.jit
def softmax_kernel(
    logits, targets, factors, losses, gradients, vocab, ignored, stride, gradient_stride,
    BLOCK: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Loss of one token, and (if BACKWARD) the gradient of its logits over them. Grid [tokens].

    A block of narrower gradients ends before the next block of logits begins, so only within a block must reading come before writing.
    """
    row = int64(tl.program_id(0))
    target = tl.load(targets + row)
    logits += row * stride
    gradients += row * gradient_stride
    counts = target != ignored
    i = tl.arange(0, BLOCK)
    largest = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(0, vocab, BLOCK):
        z = tl.load(logits + start + i, mask=start + i < vocab, other=float("-inf"))
        higher = tl.maximum(largest, tl.max(z, 0), propagate_nan=tl.PropagateNan.ALL)
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), 0)
        largest = higher
    right = (target >= 0) & (target < vocab)
    at_target = tl.load(logits + target, mask=counts & right, other=float("nan"))
    tl.store(losses + row, tl.where(counts, tl.log(total) + (largest - at_target), 0.0))
    if BACKWARD:
        factor = tl.where(counts, 1.0, 0.0)
        if factors is not None:
            factor *= tl.load(factors + row)
        for start in range(0, vocab, BLOCK):
            z = tl.load(logits + start + i, mask=start + i < vocab, other=float("-inf"))
            gradient = tl.exp(z - largest) / total - tl.where(start + i == target, 1.0, 0.0)
            gradient = tl.where(counts, factor * gradient, 0.0)
            tl.debug_barrier()
            tl.store(gradients + start + i, gradient.to(gradients.dtype.element_ty), mask=start + i < vocab)


@triton.jit
def total_kernel(losses, targets, total, share, count, ignored, BLOCK: tl.constexpr, MEAN: tl.constexpr):
    """The sum of the losses, or with MEAN their mean over the tokens that count, and the share of one of them. Grid [1]: one order of sums."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float32)
    counts = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        sums += tl.load(losses + start + i, mask=start + i < count, other=0.0)
        counts += (tl.load(targets + start + i, mask=start + i < count, other=ignored) != ignored).to(tl.int32)
    part = 1.0 / tl.maximum(tl.sum(counts, 0), 1).to(tl.float32) if MEAN else 1.0
    tl.store(total, tl.sum(sums, 0) * part)
    tl.store(share, part)


@triton.jit
def scale_kernel(x, slope, share, out, count, BLOCK: tl.constexpr):
    """out = slope share x, rounded once; both factors are on the device. Grid [blocks]."""
    i = int64(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(out + i, (value * (tl.load(slope) * tl.load(share))).to(out.dtype.element_ty), mask=i < count)


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `gdn.ops.linear_cross_entropy`."""
    casts, to_bfloat16 = _AUTOCAST[x.device.type]
    narrow = asked(to_bfloat16) if asked(casts) else x.dtype == weight.dtype == torch.bfloat16
    return _LOSS(x, weight, targets, ignore_index, reduction, narrow)[0]


def _forward(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, narrow: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; saved: dx, dW and the factor that both still lack."""
    targets = targets.contiguous()
    losses, dx, dweight = _go_over(x, weight, targets, ignore_index, narrow, None, keep and reduction != "none")
    if reduction == "none":
        return losses, dx, dweight, losses.new_empty(0)
    total, share = losses.new_empty(()), losses.new_empty(())
    launch(total_kernel, (1,), losses, targets, total, share, losses.numel(), ignore_index, BLOCK, reduction == "mean", warps=8)
    return total, dx, dweight, share


def _fake(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, narrow: bool, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    made = keep and reduction != "none"
    return (
        x.new_empty(targets.shape if reduction == "none" else (), dtype=torch.float32),
        x.new_empty(x.shape if made else (0,), dtype=torch.float32),
        x.new_empty(weight.shape if made else (0,), dtype=torch.float32),
        x.new_empty((0,) if reduction == "none" else (), dtype=torch.float32),
    )


def _backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor]:
    x, weight, targets, ignore_index, reduction, narrow = args
    dx, dweight, share = saved
    (dloss,) = grads
    assert dloss is not None
    if reduction == "none":
        _, dx, dweight = _go_over(x, weight, targets.contiguous(), ignore_index, narrow, dloss.contiguous(), True)
        return [dx.to(x.dtype), dweight.to(weight.dtype)]
    return [_scaled(dx, dloss, share, x.dtype), _scaled(dweight, dloss, share, weight.dtype)]


def _go_over(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, narrow: bool, factors: Tensor | None, backward: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token and, if asked for, the gradients of `sum of factors losses` (factors None: ones), all float32."""
    dtype = torch.bfloat16 if narrow else torch.float32
    tokens, vocab = x.shape[0], weight.shape[0]
    x, weight = x.to(dtype).contiguous(), weight.to(dtype).contiguous()
    losses = torch.empty(tokens, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape if backward else (0,), dtype=torch.float32, device=x.device)
    dweight = (torch.empty if tokens else torch.zeros)(weight.shape if backward else (0,), dtype=torch.float32, device=x.device)
    number = max(1, -(-tokens * vocab // chunk_logits(x.device)))
    size = -(-tokens // number)
    width = -(-vocab // 8) * 8
    space = torch.empty((size, width), dtype=torch.float32, device=x.device)
    for start in range(0, tokens, max(size, 1)):
        part = x[start : start + size]
        logits = space[: part.shape[0], :vocab]
        multiply(part, weight.T, logits)
        gradients = logits.view(torch.bfloat16)[:, :vocab] if narrow else logits
        launch(
            softmax_kernel, (part.shape[0],), logits, targets[start : start + size], None if factors is None else factors[start:],
            losses[start:], gradients, vocab, ignore_index, width, gradients.stride(0), BLOCK, backward, warps=8,
        )  # fmt: skip
        if backward:
            multiply(gradients, weight, dx[start : start + size])
            multiply(gradients.T, part, dweight, added=start > 0)
    return losses, dx, dweight


def chunk_logits(device: torch.device) -> int:
    """Logits of a chunk on a device."""
    roomy = device.type == "cuda" and memory_bytes(device.index or 0) >= ROOMY
    return 2 * CHUNK_LOGITS if roomy else CHUNK_LOGITS


def multiply(a: Tensor, b: Tensor, out: Tensor, *, added: bool = False) -> None:
    """out = a b, or added to it, summed and stored in float32 whatever a and b are."""
    if out.is_meta:
        return
    if a.dtype != torch.float32 and _takes_narrow(a.device):
        if added:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif added:
        out.addmm_(a.float(), b.float())
    else:
        torch.mm(a.float(), b.float(), out=out)


def _takes_narrow(device: torch.device) -> bool:
    """Whether torch has products of 16 bits in float32 there. It has none on a CPU, where the interpreter runs."""
    return device.type == "cuda"


def _scaled(x: Tensor, slope: Tensor, share: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch(scale_kernel, (-(-x.numel() // 4096),), x, slope, share, out, x.numel(), 4096)
    return out


def _casts_to_bfloat16(kind: str) -> bool:
    return torch.get_autocast_dtype(kind) == torch.bfloat16


_AUTOCAST = {
    kind: (functools.partial(torch.is_autocast_enabled, kind), functools.partial(_casts_to_bfloat16, kind)) for kind in ("cuda", "cpu")
}
"""Whether it is on, and its dtype, on these devices: the CPU has the interpreter."""

_LOSS = Opaque(
    "gdn::linear_cross_entropy_portable", _forward, _backward, fake=_fake, results=1, differentiable=("x", "weight"), replay=True
)
