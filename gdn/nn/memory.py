"""The memory of a linear-attention mixer: over a sequence, or a few tokens at a time in its place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gdn.core.packing import Packing
from gdn.ops import (
    gated_linear_attention,
    gated_linear_attention_step,
    linear_attention,
    linear_attention_step,
    value_gated_linear_attention,
    value_gated_linear_attention_step,
)

STEP_LENGTH = 8
"""Up to this many tokens with a state and no gradients are served by the one-token operators, which update in place."""


def in_place(x: Tensor, state: object | None) -> bool:
    """Whether tokens x `[B, T, ...]` are few enough for `Memory.step`."""
    return state is not None and x.shape[1] <= STEP_LENGTH and not torch.is_grad_enabled()


@dataclass(frozen=True)
class Memory:
    """The two operators of one recurrence."""

    sequence: Callable[..., tuple[Tensor, Tensor]]
    step: Callable[..., Tensor]

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        *,
        scale: float | None = None,
        state: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The outputs and the memory after the last token: `state` itself where it was updated in place; None where none was given."""
        if state is not None and in_place(q, state):
            return self.step(q, k, v, g, state, scale=scale), state
        o, after = self.sequence(q, k, v, g, scale=scale, initial_state=state, packing=packing)
        return o, None if state is None else after


PER_HEAD = Memory(linear_attention, linear_attention_step)
PER_KEY = Memory(gated_linear_attention, gated_linear_attention_step)
PER_VALUE = Memory(value_gated_linear_attention, value_gated_linear_attention_step)
