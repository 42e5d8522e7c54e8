"""The head's loss over chunks of tokens in plain torch, any device: the logits of one chunk are the largest thing ever held.

For "mean" and "sum" the gradients are made in the forward pass, while a chunk's logits are at hand, up to the factor that the backward
pass brings: three matrix products in all, as without chunks. For "none" that factor differs by token, so the backward pass makes the logits
a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.opaque import Opaque

CHUNK_LOGITS = 1 << 23
"""Logits of a chunk, 32 MB in float32. Less pays for going over the gradient of weight too often: see README.md for the figures."""


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `gdn.ops.linear_cross_entropy`."""
    return _LOSS(x, weight, targets, ignore_index, reduction)[0]


def _forward(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    counts = targets != ignore_index
    factor = counts.to(accumulate_dtype(x.dtype))
    if reduction == "mean":
        factor /= counts.sum().clamp(min=1)
    nothing = factor.new_empty(0)
    if reduction == "none":
        return _losses(x, weight, targets, counts), nothing, nothing.clone()
    if not keep:
        return (_losses(x, weight, targets, counts) * factor).sum(), nothing, nothing.clone()
    losses, dx, dweight = _losses_and_gradients(x, weight, targets, counts, factor)
    return (losses * factor).sum(), dx, dweight


def _fake(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = accumulate_dtype(x.dtype)
    made = keep and reduction != "none"
    return (
        x.new_empty(targets.shape if reduction == "none" else (), dtype=wide),
        x.new_empty(x.shape if made else (0,), dtype=wide),
        x.new_empty(weight.shape if made else (0,), dtype=wide),
    )


def _backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor]:
    x, weight, targets, ignore_index, reduction = args
    (dloss,) = grads
    assert dloss is not None
    if reduction == "none":
        counts = targets != ignore_index
        _, dx, dweight = _losses_and_gradients(x, weight, targets, counts, dloss * counts)
    else:
        dx, dweight = (gradient * dloss for gradient in saved)
    return [dx.to(x.dtype), dweight.to(weight.dtype)]


def _chunks(tokens: int, vocab: int) -> list[tuple[int, int]]:
    """Bounds of equal chunks of tokens with at most `CHUNK_LOGITS` logits each."""
    number = -(-tokens * vocab // CHUNK_LOGITS)
    size = max(1, -(-tokens // max(1, number)))
    return [(start, min(start + size, tokens)) for start in range(0, tokens, size)]


def _losses(x: Tensor, weight: Tensor, targets: Tensor, counts: Tensor) -> Tensor:
    weight, targets = weight.to(accumulate_dtype(x.dtype)), targets.where(counts, 0)[:, None]
    losses, space = _make_room(x, weight)
    for start, end in _chunks(x.shape[0], weight.shape[0]):
        logits = torch.mm(x[start:end].to(weight.dtype), weight.T, out=space[: end - start])
        losses[start:end] = _softmax(logits, targets[start:end])[0]
    return losses.masked_fill_(~counts, 0)


def _losses_and_gradients(x: Tensor, weight: Tensor, targets: Tensor, counts: Tensor, factor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of each token, and the gradients of `sum_t factor_t loss_t`, all in the wide dtype."""
    weight, targets = weight.to(accumulate_dtype(x.dtype)), targets.where(counts, 0)[:, None]
    factor = factor.to(weight.dtype)[:, None]
    losses, space = _make_room(x, weight)
    dx, dweight = x.new_empty(x.shape, dtype=weight.dtype), torch.empty_like(weight) if x.shape[0] else torch.zeros_like(weight)
    for start, end in _chunks(x.shape[0], weight.shape[0]):
        part, target = x[start:end].to(weight.dtype), targets[start:end]
        logits = torch.mm(part, weight.T, out=space[: end - start])
        losses[start:end], exps, total = _softmax(logits, target)
        dlogits = exps.mul_(factor[start:end] / total).scatter_add_(1, target, -factor[start:end])
        torch.mm(dlogits, weight, out=dx[start:end])
        torch.addmm(dweight, dlogits.T, part, beta=int(start > 0), out=dweight)
    return losses.masked_fill_(~counts, 0), dx, dweight


def _make_room(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """For the loss of each token, and for the logits of a chunk."""
    largest = max((end - start for start, end in _chunks(x.shape[0], weight.shape[0])), default=0)
    return weight.new_empty(x.shape[0]), weight.new_empty(largest, weight.shape[0])


def _softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Losses `[tokens]`, and the softmax as exponentials (written over the logits) and their sums `[tokens, 1]`."""
    at_target = logits.gather(1, target)
    largest = logits.amax(1, keepdim=True)
    exps = logits.sub_(largest).exp_()
    total = exps.sum(1, keepdim=True)
    return (total.log() + (largest - at_target)).squeeze(1), exps, total


_LOSS = Opaque("gdn::linear_cross_entropy", _forward, _backward, fake=_fake, results=1, differentiable=("x", "weight"))
