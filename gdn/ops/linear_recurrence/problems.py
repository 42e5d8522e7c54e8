"""Named problems of linear attention with decay, for tests and benchmarks: sizes, boundaries and hard inputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing

Gates = Literal["head", "key", "value"]
"""What has a log decay of its own: `linear_attention`, `gated_linear_attention`, `value_gated_linear_attention`."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes and character of a call of one of the three operators."""

    name: str
    B: int = 1
    T: int
    H: int = 1
    HV: int = 1
    K: int = 16
    V: int = 16
    lengths: tuple[int, ...] | None = None
    """Of packed documents; their sum is B * T. None: no packing."""
    initial: bool = False
    """Whether an initial state is given."""
    decay: float = 0.1
    """g is minus this times the absolute value of a normal number: 0.1 remembers, 0 never forgets, 20 forgets nearly all at most tokens."""
    clear_every: int = 0
    """Every so many tokens half of the log decays are minus infinity; 0 is never."""

    def build(
        self, gates: Gates, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu", gradient: bool = True
    ) -> dict[str, Any]:
        """Fresh arguments of the contract. Every number is rounded to bfloat16 first, so that all dtypes start from the same ones.

        q, k, v have `dtype`; g and the initial state are float64 for float64 and otherwise float32.
        """
        generator = torch.Generator().manual_seed(seed)
        wide = accumulate_dtype(dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def finish(x: Tensor, to: torch.dtype) -> Tensor:
            return x.bfloat16().to(device, to).requires_grad_(gradient)

        tokens = (self.B, self.T)
        g = -self.decay * normal(*tokens, *{"head": (self.HV,), "key": (self.H, self.K), "value": (self.HV, self.V)}[gates]).abs()
        g = g.clamp(min=-64)  # the contract allows any number between 0 and exp(-64) for what lies below
        if self.clear_every:
            cleared = g[:, self.clear_every - 1 :: self.clear_every]
            cleared[normal(*cleared.shape) > 0] = -torch.inf
        arguments: dict[str, Any] = {
            "q": finish(normal(*tokens, self.H, self.K), dtype),
            "k": finish(normal(*tokens, self.H, self.K), dtype),
            "v": finish(normal(*tokens, self.HV, self.V), dtype),
            "g": finish(g, wide),
        }
        if self.initial:
            documents = self.B if self.lengths is None else len(self.lengths)
            arguments["initial_state"] = finish(normal(documents, self.HV, self.K, self.V), wide)
        if self.lengths is not None:
            arguments["packing"] = Packing.from_lengths(self.lengths, device=device)
        return arguments

    def with_(self, **changes: Any) -> Problem:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


SMALL = (
    Problem(name="one token", T=1, H=2, HV=2, initial=True),
    Problem(name="three tokens", T=3, initial=True),
    Problem(name="chunk minus one", T=63, initial=True),
    Problem(name="one chunk", T=64, initial=True),
    Problem(name="chunk plus one", T=65, B=2, initial=True),
    Problem(name="batch of several chunks", B=2, T=110, H=2, HV=2),
    Problem(name="grouped values", B=2, T=70, H=2, HV=6, initial=True),
    Problem(name="odd sizes", T=67, H=3, HV=3, K=5, V=11, initial=True),
    Problem(name="packed", T=170, H=1, HV=2, lengths=(1, 64, 65, 3, 37), initial=True),
    Problem(name="packed, no initial state", B=2, T=70, lengths=(69, 1, 30, 40)),
    Problem(name="short documents", T=67, HV=2, K=5, V=3, lengths=(1, 0, 66), initial=True),
    Problem(name="empty documents", T=130, lengths=(0, 66, 0, 0, 64, 0), initial=True),
    Problem(name="never forgets", T=100, decay=0.0, initial=True),
    Problem(name="forgets", T=100, decay=1.0, initial=True),
    Problem(name="forgets strongly", T=100, decay=20.0, initial=True),
    Problem(name="forgets more strongly", T=100, decay=60.0, initial=True),
    Problem(name="cleared", B=2, T=100, clear_every=13, initial=True),
    Problem(name="cleared at boundaries", T=130, clear_every=64, initial=True),
    Problem(name="packed and cleared", T=130, lengths=(65, 0, 65), clear_every=9, initial=True),
)
"""What every implementation must get right, small enough for the recurrence with autograd."""
