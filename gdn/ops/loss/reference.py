"""The definition of the head's loss: one token at a time, any floating dtype, gradients by autograd. Runs anywhere, slowly."""

from __future__ import annotations

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """See `gdn.ops.linear_cross_entropy`."""
    wide = accumulate_dtype(x.dtype)
    x, weight = x.to(wide), weight.to(wide)
    losses = []
    for t, target in enumerate(targets.tolist()):
        logits = (weight * x[t]).sum(-1)
        losses.append(logits.new_zeros(()) * logits.sum() if target == ignore_index else logits.logsumexp(0) - logits[target])
    loss = torch.stack(losses) if losses else x.sum(-1) * weight.sum()
    if reduction == "none":
        return loss
    return loss.sum() / max(int((targets != ignore_index).sum()), 1) if reduction == "mean" else loss.sum()
