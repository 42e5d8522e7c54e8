"""Gated Slot Attention (arXiv 2409.07146): a memory of m slots, each with a key and a value, that is read by softmax.

    q, k = phi(W x)       v = silu(W x)       g = logsigmoid(W_f x) / tau       s = 1 - exp(g)        (one decay for each slot)

    slot keys    K~ = diag(exp(g)) K~ + s k^T
    slot values  V~ = diag(exp(g)) V~ + s v^T
    o = V~^T softmax(K~ q)            y = W_o rms_norm(silu(o))

Reading and writing K~ is linear attention with values s that forget by channel, V~ with keys s that do: two passes with a softmax between.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import RMSNorm
from gdn.nn.decay import log_sigmoid
from gdn.nn.memory import PER_KEY, PER_VALUE
from gdn.nn.widths import head_multiple


class GSA(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 4
        """Number of heads."""
        slots: int = 64
        """Slots m of each head."""
        expand_k: float = 1.0
        """Width of all keys over the width of the residual stream."""
        expand_v: float = 1.0
        """Width of all values over the width of the residual stream."""
        feature_map: Literal["silu", "relu"] = "silu"
        """phi, on queries and keys."""
        gate_normaliser: float = 8.0
        """tau, the divisor of the log decay: the larger, the longer the memory at the start."""
        norm_weight: bool = True
        """A weight for each channel in the output norm."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm, which spans all heads."""

        def check(self) -> None:
            for name in ("heads", "slots"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
            if self.gate_normaliser <= 0:
                raise ConfigError(f"gate_normaliser: expected above 0, got {self.gate_normaliser}")

        def widths(self, width: int) -> tuple[int, int]:
            """Channels of all keys and of all values."""
            keys = head_multiple("expand_k", self.expand_k, width, self.heads)
            return keys, head_multiple("expand_v", self.expand_v, width, self.heads)

        def build(self, width: int) -> GSA:
            return GSA(self, width)

        def num_parameters(self, width: int) -> int:
            keys, values = self.widths(width)
            return width * (2 * keys + 2 * values + self.heads * self.slots) + values * self.norm_weight

        def flops_per_token(self, width: int, length: int) -> int:
            return 2 * (self.num_parameters(width) + 2 * self.slots * sum(self.widths(width)))  # write and read

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            return 4 * self.slots * sum(self.widths(width))

        def saved_channels(self, width: int) -> int:
            keys, values = self.widths(width)
            slots = self.heads * self.slots
            # q, k and v before and after activation, the gate, g, s, the scores and their softmax, o and its norm; memories in some chunks.
            return 4 * keys + 5 * values + 5 * slots + self.slots * (keys + values) // 64

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.keys, self.values = config.widths(width)
        self.qkv_proj = nn.Linear(width, 2 * self.keys + self.values, bias=False)
        self.f_proj = nn.Linear(width, config.heads * config.slots, bias=False)
        self.o_proj = nn.Linear(self.values, width, bias=False)
        self.o_norm = RMSNorm(self.values, config.norm_eps) if config.norm_weight else nn.RMSNorm(self.values, config.norm_eps, False)

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qkv_proj": (self.keys, self.keys, self.values)}

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """`memory_keys` `[N, heads, K, m]` and `memory_values` `[N, heads, m, V]`."""
        c, weight = self.config, self.qkv_proj.weight
        device, dtype = device or weight.device, accumulate_dtype(dtype or weight.dtype)
        shapes = {"memory_keys": (self.keys // c.heads, c.slots), "memory_values": (c.slots, self.values // c.heads)}
        return MixerState({name: torch.zeros(batch, c.heads, *shape, device=device, dtype=dtype) for name, shape in shapes.items()})

    def forward(
        self,
        x: Tensor,
        *,
        state: MixerState | None = None,
        packing: Packing | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        if state is not None and packing is not None:
            raise ArgumentError("state: cannot be given together with packing; the documents of a packed batch begin empty")
        g = log_sigmoid(self.f_proj(x), over=self.config.gate_normaliser)
        if mask is not None:  # padding must forget nothing, and so writes nothing: s = 1 - exp(0)
            g = g.masked_fill(~mask.unsqueeze(-1), 0)
        q, k, v, g = (t.unflatten(-1, (self.config.heads, -1)) for t in (*self._activated(x), g))
        s = -torch.expm1(g).to(q.dtype)
        past = dict(state.tensors) if state is not None else {"memory_keys": None, "memory_values": None}
        scores, keys = PER_VALUE(q, k, s, g, scale=1.0, state=past["memory_keys"], packing=packing)
        weights = scores.to(accumulate_dtype(scores.dtype)).softmax(-1).to(q.dtype)
        o, values = PER_KEY(weights, s, v, g, scale=1.0, state=past["memory_values"], packing=packing)
        if state is not None and keys is not None and values is not None:
            state = state.update(memory_keys=keys, memory_values=values)
        return self.o_proj(self.o_norm(F.silu(o.flatten(2)))), state

    def _activated(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v after their activations."""
        q, k, v = self.qkv_proj(x).split((self.keys, self.keys, self.values), dim=-1)
        phi = F.silu if self.config.feature_map == "silu" else F.relu
        return phi(q), phi(k), F.silu(v)
