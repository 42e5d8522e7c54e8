"""Named problems of the attention operators, for tests and benchmarks: sizes, windows, boundaries, padding and keys from before."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn.core.packing import Packing


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes of a call of `causal_attention` or `windowed_sigmoid_attention`."""

    name: str
    B: int = 1
    T: int
    H: int = 1
    G: int = 1
    K: int = 8
    V: int = 8
    window: int | None = None
    past: int = 0
    """Keys before all queries."""
    start: tuple[int, ...] | None = None
    """First key of each row that holds anything."""
    lengths: tuple[int, ...] | None = None
    """Of packed documents; their sum is B * T."""
    size: float = 1.0
    """Standard deviation of queries and keys: 1 spreads the weight, 2 gives most of it to one key, 8 saturates sigmoids. Fused softmax
    kernels recover weights as exp(score - logsumexp) in the backward pass, which costs as many units in the last place as the score has."""

    def build(
        self, *, slopes: bool = False, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu", gradient: bool = True
    ) -> dict[str, Any]:
        """Fresh arguments of the contract, with slopes or without. Every number is rounded to bfloat16 first, so that all dtypes start
        from the same ones."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, factor: float = 1.0) -> Tensor:
            values = factor * torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.bfloat16().to(device, dtype).requires_grad_(gradient)

        arguments: dict[str, Any] = {
            "q": normal(self.B, self.T, self.H, self.K, factor=self.size),
            "k": normal(self.B, self.past + self.T, self.G, self.K, factor=self.size),
            "v": normal(self.B, self.past + self.T, self.G, self.V),
            "window": self.window,
        }
        if slopes:
            arguments["slopes"] = normal(self.H, factor=0.1)
        if self.start is not None:
            arguments["start"] = torch.tensor(self.start, device=device)
        if self.lengths is not None:
            arguments["packing"] = Packing.from_lengths(self.lengths, device=device)
        return arguments

    def with_(self, **changes: Any) -> Problem:
        """A copy with other values."""
        return dataclasses.replace(self, **changes)


WINDOWED = (
    Problem(name="window of one", T=9, window=1),
    Problem(name="window of three", B=2, T=80, H=2, G=2, window=3),
    Problem(name="window of a block", T=150, window=64),
    Problem(name="window that is no multiple", B=2, T=131, H=2, G=1, window=37),
    Problem(name="window of two blocks and more", T=230, window=140),
    Problem(name="window longer than the row", B=2, T=20, window=50),
    Problem(name="grouped heads, odd sizes", B=2, T=71, H=6, G=2, K=5, V=11, window=12),
    Problem(name="keys from before", B=2, T=70, H=2, G=2, window=20, past=19),
    Problem(name="more keys from before than the window", B=2, T=5, window=4, past=90),
    Problem(name="few keys from before", T=130, window=100, past=3),
    Problem(name="one query", B=3, T=1, H=2, G=1, window=8, past=7, start=(0, 3, 7)),
    Problem(name="padded", B=3, T=80, H=2, G=2, window=10, start=(0, 33, 79)),
    Problem(name="padded with keys from before", B=2, T=40, window=70, past=69, start=(69, 50)),
    Problem(name="packed", T=133, H=2, G=1, window=30, lengths=(1, 64, 65, 3)),
    Problem(name="packed rows", B=2, T=70, window=7, lengths=(69, 1, 30, 40)),
    Problem(name="empty documents", T=130, window=40, lengths=(0, 66, 0, 0, 64, 0)),
    Problem(name="peaked", T=100, window=20, size=2.0),
)
"""What every implementation of a windowed operator must get right."""

FULL = (
    *(p.with_(name=f"no window: {p.name}", window=None) for p in WINDOWED if p.T < 140),
    Problem(name="one token", T=1),
    Problem(name="batch", B=2, T=70, H=4, G=2),
)
"""The same without a window."""

BENCHMARK = (
    Problem(name="window 2048", T=4096, H=16, G=16, K=64, V=64, window=2048),
    Problem(name="window 128", T=4096, H=16, G=16, K=64, V=64, window=128),
)
"""One layer of 1024 channels."""
