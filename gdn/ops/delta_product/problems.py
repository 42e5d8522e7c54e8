"""Named problems of several writes a token, for tests and benchmarks: those of the gated delta rule, with more writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdn.ops.delta_rule import problems as rule


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes and character of a call of `gated_delta_product`."""

    tokens: rule.Problem
    """Its q, g, initial state and packing are taken as they are; k, v and beta are drawn anew for every write."""
    n: int = 2
    """Writes of a token."""

    @property
    def name(self) -> str:
        return f"{self.tokens.name}, {self.n} writes"

    def build(self, *, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu", gradient: bool = True) -> dict[str, Any]:
        """Fresh arguments of the contract, see `gdn.ops.delta_rule.problems`."""
        arguments = self.tokens.build(seed=seed, dtype=dtype, device=device, gradient=gradient)
        every_write = self.tokens.with_(T=self.tokens.T * self.n, lengths=None, initial=False)
        writes = every_write.build(seed=seed + 1, dtype=dtype, device=device, gradient=False)
        shape = (self.tokens.T, self.n)
        return arguments | {name: writes[name].unflatten(1, shape).requires_grad_(gradient) for name in ("k", "v", "beta")}


_RULES = {problem.name: problem for problem in rule.SMALL}

SMALL = (
    Problem(tokens=_RULES["one token"], n=3),
    Problem(tokens=_RULES["chunk plus one"], n=1),
    Problem(tokens=_RULES["chunk plus one"], n=2),
    Problem(tokens=_RULES["grouped values"], n=3),
    Problem(tokens=_RULES["odd sizes"], n=5),
    Problem(tokens=_RULES["packed"], n=2),
    Problem(tokens=_RULES["empty documents"], n=3),
    Problem(tokens=_RULES["never forgets"], n=2),
    Problem(tokens=_RULES["forgets strongly"], n=4),
    Problem(tokens=_RULES["packed and cleared"], n=2),
    Problem(tokens=_RULES["full strength"], n=2),
    Problem(tokens=_RULES["correlated keys"], n=3),
    Problem(tokens=_RULES["long keys"], n=2),
    Problem(tokens=rule.Problem(name="twenty tokens", T=20, initial=True), n=40),
)
"""What every implementation must get right, small enough for the recurrence with autograd."""

BENCHMARK = tuple(Problem(tokens=rule.LAYER.with_(name="1024 tokens", T=1024, H=8, HV=8, top=2.0), n=n) for n in (2, 3, 4))
"""One layer of about 1024 channels."""
