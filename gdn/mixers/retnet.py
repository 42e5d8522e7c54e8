"""RetNet (arXiv 2307.08621): linear attention with a fixed decay for each head, and a rotary embedding.

    q, k = rope(W x)      v = W x      gamma_h = 1 - 2^(-5-h)      o = linear_attention(q, k, v, log gamma)
    y = W_o [rms_norm(o) * silu(W_g x)]

The defaults are those of models of 1.3 B parameters (width 2048).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdn.core.checks import accumulate_dtype
from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.attention import token_positions
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import GatedRMSNorm, Rotary
from gdn.nn.memory import PER_HEAD
from gdn.nn.norm import norm_and_project
from gdn.nn.widths import head_multiple


class RetNet(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 8
        """Number of heads."""
        expand_k: float = 1.0
        """Width of all keys over the width of the residual stream."""
        expand_v: float = 2.0
        """Width of all values over the width of the residual stream."""
        rope_base: float = 10000.0
        """Base of the rotary embedding's frequencies."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""

        def check(self) -> None:
            if self.heads < 1:
                raise ConfigError(f"heads: expected at least 1, got {self.heads}")

        def widths(self, width: int) -> tuple[int, int]:
            """Channels of all keys and of all values."""
            keys = head_multiple("expand_k", self.expand_k, width, self.heads)
            if keys // self.heads % 2:
                raise ConfigError(
                    f"heads: expected an even width of each for the rotary embedding, got {keys // self.heads} = {keys} / {self.heads}"
                )
            return keys, head_multiple("expand_v", self.expand_v, width, self.heads)

        def build(self, width: int) -> RetNet:
            return RetNet(self, width)

        def num_parameters(self, width: int) -> int:
            keys, values = self.widths(width)
            return width * (2 * keys + 3 * values) + values // self.heads

        def flops_per_token(self, width: int, length: int) -> int:
            keys, values = self.widths(width)
            return 2 * (self.num_parameters(width) + 2 * keys * values // self.heads)  # write and read

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            keys, values = self.widths(width)
            return 4 * keys * values // self.heads + 8

        def saved_channels(self, width: int) -> int:
            keys, values = self.widths(width)
            # q and k before and after the rotary embedding, v, the memory's output and its gate; a memory in some chunks.
            return 4 * keys + 3 * values + keys * values // self.heads // 64

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.keys, self.values = config.widths(width)
        self.qkv_proj = nn.Linear(width, 2 * self.keys + self.values, bias=False)
        self.g_proj = nn.Linear(width, self.values, bias=False)
        self.o_proj = nn.Linear(self.values, width, bias=False)
        self.o_norm = GatedRMSNorm(self.values // config.heads, config.norm_eps)
        self.rotary = Rotary(self.keys // config.heads, config.rope_base)

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qkv_proj": (self.keys, self.keys, self.values)}

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        """`memory` and `seen`, the number of tokens of each sequence: the memory holds keys turned by their position."""
        heads, weight = self.config.heads, self.qkv_proj.weight
        device, dtype = device or weight.device, accumulate_dtype(dtype or weight.dtype)
        memory = torch.zeros(batch, heads, self.keys // heads, self.values // heads, device=device, dtype=dtype)
        return MixerState({"memory": memory, "seen": torch.zeros(batch, device=device, dtype=torch.int64)})

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
        qkv = self.qkv_proj(x)
        g = self._log_decay(x)
        if mask is not None:  # padding must write nothing (zero keys) and forget nothing
            hidden = ~mask.unsqueeze(-1)
            qkv, g = qkv.masked_fill(hidden, 0), g.masked_fill(hidden, 0)
        q, k, v = (t.unflatten(-1, (self.config.heads, -1)) for t in qkv.split((self.keys, self.keys, self.values), dim=-1))
        q, k = self.rotary(token_positions(x, None if state is None else state["seen"], packing, mask), q, k)
        o, memory = PER_HEAD(q, k, v, g, state=None if state is None else state["memory"], packing=packing)
        if state is not None and memory is not None:
            state = state.update(memory=memory, seen=state["seen"] + (x.shape[1] if mask is None else mask.sum(1)))
        gate = self.g_proj(x).unflatten(-1, o.shape[2:])
        return norm_and_project(self.o_norm, o, gate, self.o_proj), state

    def _log_decay(self, x: Tensor) -> Tensor:
        """log gamma for each token and head, `[B, T, heads]`."""
        heads = torch.arange(self.config.heads, device=x.device, dtype=accumulate_dtype(x.dtype))
        return torch.log1p(-torch.exp2(-5 - heads)).expand(*x.shape[:2], -1)
