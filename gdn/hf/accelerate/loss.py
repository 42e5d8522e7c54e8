"""The loss of a causal language model of transformers, with its logits read once forward and once backward on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.ops.loss.logits import cross_entropy


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """As `transformers.loss.loss_utils.ForCausalLMLoss`, which serves other devices."""
    if logits.device.type != "cpu":
        from transformers.loss.loss_utils import ForCausalLMLoss

        items: Any = num_items_in_batch
        return ForCausalLMLoss(logits, labels, vocab_size, items, ignore_index, shift_labels, **kwargs)
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = cross_entropy(logits.reshape(-1, vocab_size), shift_labels.reshape(-1).to(logits.device), ignore_index, reduction)
    return loss if num_items_in_batch is None else loss / torch.as_tensor(num_items_in_batch, device=loss.device)
