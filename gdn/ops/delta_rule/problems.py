"""Named problems of the gated delta rule, for tests and benchmarks: sizes, boundaries and hard inputs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from gdn.core.checks import accumulate_dtype
from gdn.core.packing import Packing

Keys = Literal["unit", "repeated", "zero", "correlated", "long"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes and character of a call of `gated_delta_rule`."""

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
    """Every so many tokens g is minus infinity; 0 is never."""
    top: float = 1.0
    """beta is this times the sigmoid of a normal number."""
    full: bool = False
    """beta is `top` at every token."""
    keys: Keys = "unit"
    """"repeated": one unit key at every token; "correlated": unit keys near one direction; "long": norms up to 1.4."""

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu", gradient: bool = True) -> dict[str, Any]:
        """Fresh arguments of the contract. Every number is rounded to bfloat16 first, so that all dtypes start from the same ones.

        q, k, v have `dtype`; g, beta and the initial state are float64 for float64 and otherwise float32.
        """
        generator = torch.Generator().manual_seed(seed)
        wide = accumulate_dtype(dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def finish(x: Tensor, to: torch.dtype) -> Tensor:
            return x.bfloat16().to(device, to).requires_grad_(gradient)

        tokens = (self.B, self.T)
        g = -self.decay * normal(*tokens, self.HV).abs()
        if self.clear_every:
            g[:, self.clear_every - 1 :: self.clear_every] = -torch.inf
        beta = self.top * (torch.ones(*tokens, self.HV) if self.full else normal(*tokens, self.HV).sigmoid())
        arguments: dict[str, Any] = {
            "q": finish(normal(*tokens, self.H, self.K), dtype),
            "k": finish(self._keys(normal(*tokens, self.H, self.K), normal(self.H, self.K)), dtype),
            "v": finish(normal(*tokens, self.HV, self.V), dtype),
            "g": finish(g, wide),
            "beta": finish(beta, wide),
        }
        if self.initial:
            documents = self.B if self.lengths is None else len(self.lengths)
            arguments["initial_state"] = finish(normal(documents, self.HV, self.K, self.V), wide)
        if self.lengths is not None:
            arguments["packing"] = Packing.from_lengths(self.lengths, device=device)
        return arguments

    def _keys(self, each: Tensor, common: Tensor) -> Tensor:
        """Keys from normal numbers for each token and for all tokens together."""
        if self.keys == "unit":
            return normalize(each, dim=-1)
        if self.keys == "repeated":
            return normalize(common, dim=-1).expand_as(each)
        if self.keys == "zero":
            return torch.zeros_like(each)
        if self.keys == "correlated":
            return normalize(common + 0.3 * each, dim=-1)
        return normalize(each, dim=-1) * (0.4 + each[..., :1].sigmoid())

    def with_(self, **changes: Any) -> Problem:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


SMALL = (
    Problem(name="one token", T=1, H=2, HV=2, initial=True),
    Problem(name="chunk minus one", T=63, initial=True),
    Problem(name="one chunk", T=64, initial=True),
    Problem(name="chunk plus one", T=65, B=2, initial=True),
    Problem(name="batch of several chunks", B=2, T=150, H=2, HV=2),
    Problem(name="grouped values", B=2, T=70, H=2, HV=6, initial=True),
    Problem(name="odd sizes", T=67, H=3, HV=3, K=5, V=11, initial=True),
    Problem(name="packed", T=200, H=1, HV=2, lengths=(1, 64, 65, 3, 67), initial=True),
    Problem(name="packed, no initial state", B=2, T=70, lengths=(69, 1, 30, 40)),
    Problem(name="empty documents", T=130, lengths=(0, 66, 0, 0, 64, 0), initial=True),
    Problem(name="never forgets", T=130, decay=0.0, initial=True),
    Problem(name="forgets strongly", T=130, decay=20.0, initial=True),
    Problem(name="cleared", B=2, T=130, clear_every=13, initial=True),
    Problem(name="cleared at boundaries", T=192, clear_every=64, initial=True),
    Problem(name="packed and cleared", T=130, lengths=(65, 0, 65), clear_every=9, initial=True),
    Problem(name="full strength", T=130, decay=0.02, top=2.0, full=True, initial=True),
    Problem(name="repeated keys at full strength", T=130, decay=0.02, top=2.0, full=True, keys="repeated", initial=True),
    Problem(name="repeated keys", T=130, keys="repeated", initial=True),
    Problem(name="correlated keys", T=130, top=2.0, keys="correlated", initial=True),
    Problem(name="zero keys", T=70, keys="zero", initial=True),
    Problem(name="long keys", T=130, keys="long", initial=True),
)
"""What every implementation must get right, small enough for the recurrence with autograd."""

LAYER = Problem(name="2048 tokens", T=2048, H=16, HV=16, K=128, V=128)
"""One layer of about 2048 channels."""

BENCHMARK = (
    LAYER,
    LAYER.with_(name="8192 tokens", T=8192),
    LAYER.with_(name="grouped", HV=32),
)
