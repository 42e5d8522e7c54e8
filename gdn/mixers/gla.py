"""Gated Linear Attention (arXiv 2312.06635): linear attention with a data-dependent decay for each channel of the keys.

    q, k, v = W x       g = logsigmoid(W_2 W_1 x + b) / tau      o = gated_linear_attention(q, k, v, g)
    y = W_o [rms_norm(o) * silu(W_g x)]

The defaults are the paper's layer. `short_conv` adds a causal convolution with SiLU over q, k and v.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdn.core.checks import accumulate_dtype
from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import GatedRMSNorm, ShortConv
from gdn.nn.decay import log_sigmoid
from gdn.nn.memory import PER_KEY, in_place
from gdn.nn.norm import norm_and_project
from gdn.nn.widths import head_multiple


class GLA(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 4
        """Number of heads."""
        expand_k: float = 0.5
        """Width of all keys over the width of the residual stream."""
        expand_v: float = 1.0
        """Width of all values over the width of the residual stream."""
        gate_rank: int = 16
        """Width between the two matrices of the decay."""
        gate_normaliser: float = 16.0
        """tau, the divisor of the log decay: the larger, the longer the memory at the start."""
        short_conv: bool = False
        """Causal convolution with SiLU over q, k and v."""
        conv_size: int = 4
        """Taps of the convolution."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""

        def check(self) -> None:
            for name in ("heads", "gate_rank", "conv_size"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
            if self.gate_normaliser <= 0:
                raise ConfigError(f"gate_normaliser: expected above 0, got {self.gate_normaliser}")

        def widths(self, width: int) -> tuple[int, int]:
            """Channels of all keys and of all values."""
            return head_multiple("expand_k", self.expand_k, width, self.heads), head_multiple("expand_v", self.expand_v, width, self.heads)

        def build(self, width: int) -> GLA:
            return GLA(self, width)

        def num_parameters(self, width: int) -> int:
            keys, values = self.widths(width)
            count = width * (2 * keys + 3 * values)  # qkv_proj, g_proj, o_proj
            count += width * self.gate_rank + self.gate_rank * keys + keys  # the decay
            return count + values // self.heads + (2 * keys + values) * self.conv_size * self.short_conv

        def flops_per_token(self, width: int, length: int) -> int:
            keys, values = self.widths(width)
            return 2 * (self.num_parameters(width) + 2 * keys * values // self.heads)  # write and read

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            keys, values = self.widths(width)
            return 4 * keys * values // self.heads + itemsize * (2 * keys + values) * (self.conv_size - 1) * self.short_conv

        def saved_channels(self, width: int) -> int:
            keys, values = self.widths(width)
            # Inputs of the memory and of the convolution, the decay before and after logsigmoid, the output and its gate.
            return (1 + self.short_conv) * (2 * keys + values) + 2 * keys + 2 * values + keys * values // self.heads // 64

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.keys, self.values = config.widths(width)
        self.qkv_proj = nn.Linear(width, 2 * self.keys + self.values, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(width, config.gate_rank, bias=False), nn.Linear(config.gate_rank, self.keys))
        self.g_proj = nn.Linear(width, self.values, bias=False)
        self.o_proj = nn.Linear(self.values, width, bias=False)
        self.o_norm = GatedRMSNorm(self.values // config.heads, config.norm_eps)
        if config.short_conv:
            self.conv = ShortConv(2 * self.keys + self.values, config.conv_size, "silu")

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qkv_proj": (self.keys, self.keys, self.values)}

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        c, weight = self.config, self.qkv_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        shape = (batch, c.heads, self.keys // c.heads, self.values // c.heads)
        tensors = {"memory": torch.zeros(shape, device=device, dtype=accumulate_dtype(dtype))}
        if c.short_conv:
            tensors["conv"] = torch.zeros(batch, c.conv_size - 1, 2 * self.keys + self.values, device=device, dtype=dtype)
        return MixerState(tensors)

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
        qkv, decay = self.qkv_proj(x), self.decay_proj(x)
        g = log_sigmoid(decay, over=self.config.gate_normaliser)
        if mask is not None:  # padding must write nothing (zero keys) and forget nothing
            hidden = ~mask.unsqueeze(-1)
            qkv, g = qkv.masked_fill(hidden, 0), g.masked_fill(hidden, 0)
        after: dict[str, Tensor] = {}
        if self.config.short_conv:
            if state is not None and in_place(x, state):
                qkv = self.conv.step(qkv, state["conv"], mask)
            else:
                qkv, after["conv"] = self.conv(qkv, state=None if state is None else state["conv"], packing=packing, mask=mask)
        q, k, v = (t.unflatten(-1, (self.config.heads, -1)) for t in qkv.split((self.keys, self.keys, self.values), dim=-1))
        g = g.unflatten(-1, q.shape[2:])
        o, memory = PER_KEY(q, k, v, g, state=None if state is None else state["memory"], packing=packing)
        if state is not None and memory is not None:
            state = state.update(memory=memory, **after)
        gate = self.g_proj(x).unflatten(-1, o.shape[2:])
        return norm_and_project(self.o_norm, o, gate, self.o_proj), state
