"""A few more tokens of each of many sequences, whose states are rows of a pool and are updated in their place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

LARGE = 1 << 16
"""Elements of one sequence's memories from which each sequence is updated by itself, in cache and in its place in the pool."""


def update_rows(
    update: Callable[[Sequence[Tensor], Tensor], Tensor], tokens: Sequence[Tensor], state: Tensor, slots: Tensor | None
) -> Tensor:
    """The outputs of `update(tokens, state)`, which takes sequence b on row b of a state and changes it in place.

    Args:
        tokens: `[B, T, ...]`; the outputs look like the third of them.
        state: `[N, ...]`, the pool.
        slots: the row of each sequence `[B]`; negative ones skip the sequence, whose output is zero. None: row b for sequence b.
    """
    like = tokens[2]
    if state.device.type == "cpu" and state[:1].numel() >= LARGE:
        o = like.new_zeros(like.shape)
        for b, row in enumerate(range(like.shape[0]) if slots is None else slots.tolist()):
            if row >= 0:
                o[b : b + 1] = update([x[b : b + 1] for x in tokens], state[row : row + 1])
        return o
    if slots is None:
        return update(tokens, state)
    used = (slots >= 0).nonzero().squeeze(1)
    rows = slots.index_select(0, used).long()
    memory = state.index_select(0, rows)
    o = like.new_zeros(like.shape)
    o[used] = update([x.index_select(0, used) for x in tokens], memory)
    state.index_copy_(0, rows, memory)
    return o


def vectors(x: Tensor, value_heads: int) -> list[Tensor]:
    """`[B, T, H, D]` as T rows `[B * HV, 1, D]`, each head once for every value head of its group."""
    groups = value_heads // x.shape[2]
    x = x if groups == 1 else x.repeat_interleave(groups, dim=2)
    return [row.reshape(-1, 1, x.shape[3]) for row in x.unbind(1)]
