"""The host of a recurrence in Triton: one operator with forward and backward from what a row launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.opaque import Arguments, Opaque, Tensors, all_numbers
from gdn.core.packing import Packing
from gdn.core.portable_rows import aligned, dense, fresh, token_rows
from gdn.ops.sequences.portable import Bounds, bounds_of


@dataclass(frozen=True)
class Call:
    """The arguments of a call as kernels take them."""

    p: Any
    """Its plan: `chunks`, `documents`, `HV`, the rows K and columns V of a memory, and `code`, what compiled kernels depend on."""
    key: Any
    """Names the compiled kernels, beside what each launch is. All pointers are multiples of 16 bytes."""
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor | None
    initial: Tensor | None
    bounds: Bounds
    scale: float


Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]
"""Of q, k, v, g and beta."""


class Recurrence:
    """A row for `(q, k, v, g, beta, scale, initial_state, packing) -> (o, final_state)`.

    Args:
        name: of the registered operator, "<name>_portable".
        decays: what has a decay of its own: a head, or a channel of the keys or the values. With "value", kernels have states turned,
            `[N, HV, V, K]`, all but the final one.
        plan: `(q, k, v, cu_seqlens, chunk_table)` to the plan of a call.
        kept: the two buffers that forward fills for backward, from the plan and v.
        forward: fills o, the final state and what is kept.
        backward: from what is kept, the gradients of o and of the final state; fills that of the initial state.
    """

    def __init__(
        self,
        name: str,
        decays: Literal["head", "key", "value"],
        *,
        plan: Callable[..., Any],
        kept: Callable[[Any, Tensor], tuple[Tensor, Tensor]],
        forward: Callable[[Call, Tensor, Tensor, tuple[Tensor, Tensor]], None],
        backward: Callable[[Call, Tensors, Tensor, Tensor | None, Tensor | None], Gradients],
    ) -> None:
        self.name, self.decays, self.plan, self.kept, self.fill, self.find = name, decays, plan, kept, forward, backward
        differentiable = ("q", "k", "v", "g", "beta", "initial_state")
        self._operator = Opaque(
            f"gdn::{name}_portable",
            self._forward,
            self._backward,
            fake=self._fake,
            results=2,
            differentiable=differentiable,
            replay=True,
            expected=1,
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
        scale: float,
        initial_state: Tensor | None,
        packing: Packing | None,
    ) -> tuple[Tensor, Tensor]:
        K, V = q.shape[3], v.shape[3]
        more_k, more_v = -K % 8, -V % 8  # loads take eight elements at a time
        if more_k:
            q, k = F.pad(q, (0, more_k)), F.pad(k, (0, more_k))
        if more_v:
            v = F.pad(v, (0, more_v))
        more_g = {"head": 0, "key": more_k, "value": more_v}[self.decays]
        if more_g:  # to pad by nothing is to copy
            g = F.pad(g, (0, more_g))
        if initial_state is not None and (more_k or more_v):
            initial_state = F.pad(initial_state, (0, more_v, 0, more_k))
        o, final = self._operator(q, k, v, g, beta, initial_state, *bounds_of(packing), scale)
        if not (more_k or more_v):
            return o, final
        return o[..., :V], final[..., :K, :V]

    def _forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_table: Tensor | None,
        chunk_offsets: Tensor | None,
        scale: float,
        keep: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """o, final state; what is kept."""
        call = self._call(q, k, v, g, beta, initial_state, (cu_seqlens, chunk_table, chunk_offsets), scale)
        o, final, first, second = self._buffers(call.p, call.v)
        if call.p.chunks:
            self.fill(call, o, final, (first, second))
        elif call.initial is None:
            final.zero_()
        else:
            final.copy_(self._turned(call.initial))
        return o, final, first, second

    def _backward(self, args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        q, k, v, g, beta, initial_state, *bounds, scale = args
        do, d_final = grads
        call = self._call(q, k, v, g, beta, initial_state, (bounds[0], bounds[1], bounds[2]), scale)
        do = torch.zeros(v.shape, dtype=v.dtype, device=v.device) if do is None else dense(do)
        d_final = None if d_final is None else aligned(self._turned(d_final))
        d_initial = None if call.initial is None else torch.empty_like(call.initial)
        if call.p.chunks:
            gradients = self.find(call, saved, do, d_final, d_initial)
        else:
            gradients = [None if x is None else torch.zeros_like(x) for x in (q, k, v, g, beta)]
            if d_initial is not None:
                d_initial = d_initial.zero_() if d_final is None else d_initial.copy_(d_final)
        return [*gradients, None if d_initial is None else self._turned(d_initial)]

    def _turned(self, state: Tensor) -> Tensor:
        """A state of a user as kernels have it, and the other way round."""
        return state.transpose(2, 3) if self.decays == "value" else state

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, initial: Tensor | None, bounds: Bounds, scale: float
    ) -> Call:
        p = self.plan(q, k, v, *bounds[:2])
        q, k, v, g = token_rows(q), token_rows(k), token_rows(v), aligned(g)
        beta, initial = None if beta is None else aligned(beta), None if initial is None else aligned(self._turned(initial))
        strides = tuple(x.stride(1) for x in (q, k, v))
        key = (self.name, p.code, q.shape[2], q.dtype, g.dtype, None if beta is None else beta.dtype, strides)
        return Call(p, key, q, k, v, g, beta, initial, bounds, scale)

    def _buffers(self, p: Any, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        o = fresh(like)
        sizes = (p.V, p.K) if self.decays == "value" else (p.K, p.V)
        final = torch.empty((p.documents, p.HV, *sizes), dtype=torch.float32, device=like.device)
        return o, final, *self.kept(p, like)

    def _fake(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        chunk_table: Tensor | None,
        chunk_offsets: Tensor | None,
        scale: float,
        keep: bool,
    ) -> Tensors:
        if all_numbers(q, k, v, cu_seqlens, chunk_table):
            o, final, *kept = self._buffers(self.plan(q, k, v, cu_seqlens, chunk_table), v)
            return o, final, *kept
        q, k, like = (x.new_empty((1, 1, *map(int, x.shape[2:]))) for x in (q, k, v))  # a graph for each number of heads and width
        _, final, *kept = self._buffers(self.plan(q, k, like, None, None), like)
        documents = v.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        return (
            v.new_empty(v.shape),
            _longer(final, documents),
            *(_longer(x, torch.library.get_ctx().new_dynamic_size()) for x in kept),
        )


def _longer(x: Tensor, size: Any) -> Tensor:
    """Like x, of another size along the first dimension. How many pieces a plan cuts a sequence into is a symbol of its own where its length is one."""
    return x.new_empty((size, *x.shape[1:]))
