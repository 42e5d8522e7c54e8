"""How far a memory stored in fewer bits drifts from float32 as the text goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.core.errors import ArgumentError
from gdn.models.lm import LM
from gdn.models.precision import Precision, memories
from gdn.models.state import LMState


@dataclass(frozen=True)
class Drift:
    """One precision after so many tokens, against float32 on the same text."""

    precision: Precision
    tokens: int
    memory_error: float
    """Norm of the difference of all memories over the norm of the float32 ones."""
    divergence: float
    """Mean Kullback-Leibler divergence of the next token's distribution over the tokens since the last row, in nats."""
    agreement: float
    """Part of those tokens at which the likeliest next token is the same."""
    bytes_per_sequence: int


@torch.no_grad()
def drift(model: LM, tokens: Tensor, precisions: Sequence[Precision] = ("bf16", "fp16", "int8", "fp8"), *, piece: int = 1) -> list[Drift]:
    """Read a text with the memory in float32 and in each precision at once; a row for each after 1, 2, 4, 8, ... pieces.

    Args:
        model: any model with recurrent memories.
        tokens: int64 `[B, T]`.
        precisions: to compare with float32.
        piece: tokens read at once; the memory is rounded after each piece, so 1 is generation, the worst case.
    """
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ArgumentError(f"tokens: expected [B, T] with at least one token, got {list(tokens.shape)}")
    if piece < 1:
        raise ArgumentError(f"piece: expected at least 1, got {piece}")
    exact = model.init_state(tokens.shape[0])
    if not any(memories(layer) for layer in exact.layers):
        raise ArgumentError("model: has no recurrent memory whose precision could be changed")
    states = {p: exact.to(p) for p in precisions}
    sums = {p: [0.0, 0.0, 0] for p in precisions}
    rows: list[Drift] = []
    pieces = tokens.split(piece, dim=1)
    for i, part in enumerate(pieces, start=1):
        truth, exact = _read(model, part, exact)
        for p in precisions:
            found, states[p] = _read(model, part, states[p])
            sums[p][0] += float((truth.exp() * (truth - found)).sum())
            sums[p][1] += float((truth.argmax(-1) == found.argmax(-1)).sum())
            sums[p][2] += truth.shape[0] * truth.shape[1]
            if i & (i - 1) == 0 or i == len(pieces):
                divergence, agreed, count = sums[p]
                size = states[p].nbytes // tokens.shape[0]
                rows.append(Drift(p, exact.length, _memory_error(states[p], exact), divergence / count, agreed / count, size))
                sums[p] = [0.0, 0.0, 0]
    return rows


def _read(model: LM, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
    output = model(tokens, state=state)
    assert output.logits is not None
    assert output.state is not None
    return output.logits.double().log_softmax(-1), output.state


def _memory_error(state: LMState, exact: LMState) -> float:
    wrong = total = 0.0
    for mine, truth in zip(state.layers, exact.layers, strict=True):
        for name in memories(truth):
            memory = truth[name].double()
            wrong += float((mine.full()[name].double() - memory).square().sum())
            total += float(memory.square().sum())
    return (wrong / max(total, 1e-300)) ** 0.5
