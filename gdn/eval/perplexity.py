"""How well a model predicts held-out text: nats per token, bits per byte, and both by position in the document.

Bits per byte, the total information of the text in bits over its length in UTF-8 bytes, compares models with different tokenizers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdn.core.errors import DataError
from gdn.models.lm import LM
from gdn.ops import linear_cross_entropy

if TYPE_CHECKING:
    from gdn.data import Batch

IGNORE = -100


@dataclass(frozen=True)
class Perplexity:
    """The result of `evaluate`."""

    loss: float
    """Mean nats per predicted token."""
    bits_per_byte: float
    tokens: int
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss), per token."""
        return math.exp(self.loss)


@dataclass(frozen=True)
class ByPosition:
    """The mean loss of the tokens whose place in their document lies in `start <= place < stop`."""

    start: int
    stop: int
    loss: float
    tokens: int


@torch.no_grad()
def evaluate(model: LM, batches: Iterable[Batch]) -> Perplexity:
    """Loss over all valid targets of the batches. Puts the model in evaluation mode and back."""
    total = tokens = num_bytes = 0.0
    with evaluating(model):
        for batch in batches:
            valid = int((batch.targets != IGNORE).sum())
            if not valid:
                continue
            batch = batch.to(model.embedding.weight.device)
            loss = model(batch.tokens, targets=batch.targets, packing=batch.packing).loss
            total += float(loss) * valid
            tokens += valid
            num_bytes += batch.num_bytes
    if not tokens:
        raise DataError("evaluation: expected some text to predict, got none")
    return Perplexity(total / tokens, total / math.log(2) / max(num_bytes, 1), int(tokens), int(num_bytes))


@torch.no_grad()
def evaluate_by_position(model: LM, batches: Iterable[Batch], edges: Sequence[int]) -> list[ByPosition]:
    """Mean loss in each interval of positions between consecutive `edges`, e.g. (0, 64, 512, 4096).

    Give rows longer than the model was trained on to see how it extrapolates. Intervals without tokens are left out.
    """
    bounds = torch.tensor(edges)
    sums, counts = torch.zeros(len(edges) + 1, dtype=torch.float64), torch.zeros(len(edges) + 1, dtype=torch.int64)
    with evaluating(model):
        for batch in batches:
            batch = batch.to(model.embedding.weight.device)
            hidden, _ = model.hidden(batch.tokens, packing=batch.packing)
            losses = linear_cross_entropy(hidden, model.head_weight.to(hidden.dtype), batch.targets, reduction="none")
            bucket = torch.bucketize(_positions(batch).cpu(), bounds, right=True)
            valid = (batch.targets != IGNORE).cpu()
            sums.index_add_(0, bucket[valid], losses.cpu().double()[valid])
            counts += torch.bincount(bucket[valid], minlength=len(counts))
    means = sums / counts.clamp(min=1)
    return [ByPosition(edges[i - 1], edges[i], float(means[i]), int(counts[i])) for i in range(1, len(edges)) if counts[i]]


def _positions(batch: Batch) -> Tensor:
    """The place of each token in its document, `[B, T]`."""
    if batch.packing is not None:
        return batch.packing.positions.reshape(batch.tokens.shape)
    return torch.arange(batch.tokens.shape[1], device=batch.tokens.device).expand_as(batch.tokens)


class evaluating:
    """Evaluation mode inside the block, the earlier mode after it."""

    def __init__(self, model: LM) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.training = self.model.training
        self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.model.train(self.training)
