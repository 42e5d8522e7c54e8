"""The gated delta rule by chunks as the paper has it, for tests: how wrong such a form is at a dtype."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from gdn.core.packing import Packing


def textbook_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float,
    initial_state: Tensor | None,
    packing: Packing | None,
    *,
    narrow: bool = False,
) -> tuple[Tensor, Tensor]:
    """The paper's chunkwise algorithm (its UT transform) written down in plain torch, gradients by autograd: how wrong a form by
    chunks of 64 is at a dtype, whoever writes it. Alternating sums over a chunk, as for repeated keys with beta = 2, cost it digits.
    With `narrow`, every matrix product takes its operands in the dtype of the inputs, as the matrix units of a GPU do."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.to(v.dtype).to(wide) @ b.to(v.dtype).to(wide) if narrow else a @ b

    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    groups, bounds = v.shape[2] // k.shape[2], packing.host.tolist() if packing else [i * v.shape[1] for i in range(v.shape[0] + 1)]
    flat = [x.to(wide).flatten(0, 1).transpose(0, 1) for x in (q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2), v)]
    g, beta = (x.to(wide).flatten(0, 1).transpose(0, 1).unsqueeze(-1) for x in (g.clamp(min=-64), beta))
    outputs, states = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        state = v.new_zeros(v.shape[2], k.shape[3], v.shape[3], dtype=wide) if initial_state is None else initial_state[n]
        for at in range(begin, end, 64):
            piece = slice(at, min(at + 64, end))
            queries, keys, values = (x[:, piece] for x in flat)
            total = g[:, piece].cumsum(1)
            decay = (total - total.mT).tril().exp().tril()
            rows = list((-(beta[:, piece] * decay * (keys @ keys.mT)).tril(-1)).unbind(1))
            for i in range(1, len(rows)):  # forward substitution, a row at a time
                rows[i] = rows[i] + (rows[i][:, None, :i] @ torch.stack(rows[:i], 1)).squeeze(1)
            solve = torch.stack(rows, 1) + torch.eye(total.shape[1], dtype=wide)
            solve_keys, solve_values = product(solve, beta[:, piece] * total.exp() * keys), product(solve, beta[:, piece] * values)
            u = solve_values - product(solve_keys, state)
            reads = (decay * product(queries, keys.mT)).tril()
            outputs.append(scale * (total.exp() * product(queries, state) + product(reads, u)))
            state = total[:, -1:].exp() * state + product(((total[:, -1:] - total).exp() * keys).mT, u)
        states.append(state)
    return torch.cat(outputs, 1).transpose(0, 1).reshape(v.shape).to(v.dtype), torch.stack(states)
