"""Kimi Delta Attention (arXiv 2510.26692): Gated DeltaNet with a decay for each key channel.

    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))        beta = sigmoid(W_b x)
    g = -exp(A_log) softplus(W_f2 W_f1 x + dt_bias)                one number for each value head and key channel
    o = channel_delta_rule(q, k, v, g, beta)                       y = W_o [rms_norm(o) * sigmoid(W_g2 W_g1 x)]

The decay and the output gate pass through a bottleneck of one value head's width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import GatedRMSNorm, ShortConv
from gdn.nn.decay import draw_rate, draw_time_step
from gdn.nn.norm import norm_and_project
from gdn.ops import channel_delta_rule, channel_delta_step, decay_gate, l2norm, write_gate

STEP_LENGTH = 8
"""Up to this many tokens with a state and no gradients are served by the one-token operators, which update in place."""


class KimiDelta(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 16
        """Query/key heads."""
        head_dim: int = 128
        """Width K of a query/key head."""
        value_heads: int | None = None
        """Value heads, a multiple of `heads` (grouped values). None: as many as `heads`."""
        expand_v: float = 1.0
        """Width of a value head over that of a key head."""
        short_conv: bool = True
        """Causal convolution over q, k and v."""
        conv_size: int = 4
        """Taps of the convolution."""
        allow_neg_eigval: bool = False
        """beta in (0, 2) instead of (0, 1), so that a write can reflect."""
        output_gate_bias: bool = True
        """Bias in the output gate. The released Kimi Linear model has none."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""
        decay_range: tuple[float, float] = (1.0, 16.0)
        """exp(A_log) is drawn uniformly from this range."""
        dt_range: tuple[float, float] = (1e-3, 0.1)
        """softplus(dt_bias) is drawn log-uniformly from this range."""

        def check(self) -> None:
            for name in ("heads", "head_dim", "conv_size"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
            if self.num_value_heads < 1 or self.num_value_heads % self.heads:
                raise ConfigError(f"value_heads: expected a multiple of heads={self.heads}, got {self.value_heads}")
            if self.head_dim * self.expand_v != self.value_dim or self.value_dim < 1:
                raise ConfigError(f"expand_v: expected head_dim * expand_v to be a whole number, got {self.head_dim * self.expand_v}")
            if not 0 <= self.decay_range[0] < self.decay_range[1]:
                raise ConfigError(f"decay_range: expected 0 <= low < high, got {self.decay_range}")
            if not 0 < self.dt_range[0] < self.dt_range[1]:
                raise ConfigError(f"dt_range: expected 0 < low < high, got {self.dt_range}")

        @property
        def num_value_heads(self) -> int:
            return self.heads if self.value_heads is None else self.value_heads

        @property
        def value_dim(self) -> int:
            """Width V of a value head."""
            return int(self.head_dim * self.expand_v)

        @property
        def value_width(self) -> int:
            """Channels of all values together."""
            return self.num_value_heads * self.value_dim

        @property
        def decay_width(self) -> int:
            """Numbers of a token's decay."""
            return self.num_value_heads * self.head_dim

        @property
        def qkv_width(self) -> int:
            """Channels of queries, keys and values together: those of the convolution."""
            return 2 * self.heads * self.head_dim + self.value_width

        def build(self, width: int) -> KimiDelta:
            return KimiDelta(self, width)

        def num_parameters(self, width: int) -> int:
            narrow = self.value_dim
            count = width * (self.qkv_width + self.value_width + self.num_value_heads)  # qkv_proj, o_proj, b_proj
            count += narrow * (width + self.decay_width) + self.decay_width + self.num_value_heads  # f_a_proj, f_b_proj, dt_bias, A_log
            count += narrow * (width + self.value_width) + self.value_width * self.output_gate_bias  # g_a_proj, g_b_proj
            return count + self.value_dim + self.qkv_width * self.conv_size * self.short_conv

        def flops_per_token(self, width: int, length: int) -> int:
            recall_write_read = 3 * self.head_dim * self.value_width
            return 2 * (self.num_parameters(width) + recall_write_read)

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            return 4 * self.head_dim * self.value_width + itemsize * self.qkv_width * (self.conv_size - 1) * self.short_conv

        def saved_channels(self, width: int) -> int:
            states = self.head_dim * self.value_width // 64  # one state a chunk of 64 tokens
            # The convolution's input and output, normalised q and k, raw and float32 decay, the core's output, norm and gate.
            return 2 * self.qkv_width + 2 * self.heads * self.head_dim + 3 * self.decay_width + states + 3 * self.value_width

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        hv, narrow = config.num_value_heads, config.value_dim
        self.qkv_proj = nn.Linear(width, config.qkv_width, bias=False)
        self.b_proj = nn.Linear(width, hv, bias=False)
        self.f_a_proj = nn.Linear(width, narrow, bias=False)
        self.f_b_proj = nn.Linear(narrow, config.decay_width, bias=False)
        self.g_a_proj = nn.Linear(width, narrow, bias=False)
        self.g_b_proj = nn.Linear(narrow, config.value_width, bias=config.output_gate_bias)
        self.o_proj = nn.Linear(config.value_width, width, bias=False)
        if config.short_conv:
            self.conv = ShortConv(config.qkv_width, config.conv_size, "silu")
        self.A_log = nn.Parameter(torch.empty(hv, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(config.decay_width, dtype=torch.float32))
        self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True  # type: ignore[attr-defined]
        self.o_norm = GatedRMSNorm(config.value_dim, config.norm_eps, "sigmoid")
        self.reset_parameters()

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        keys = self.config.heads * self.config.head_dim
        return {"qkv_proj": (keys, keys, self.config.value_width)}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation for the matrices; a rate for each value head, a time step for each channel."""
        draw_rate(self.A_log, *self.config.decay_range)
        draw_time_step(self.dt_bias, *self.config.dt_range)

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        c = self.config
        device = device or self.qkv_proj.weight.device
        dtype = dtype or self.qkv_proj.weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {"memory": torch.zeros(batch, c.num_value_heads, c.head_dim, c.value_dim, device=device, dtype=wide)}
        if c.short_conv:
            tensors["conv"] = torch.zeros(batch, c.conv_size - 1, c.qkv_width, device=device, dtype=dtype)
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
        qkv, (g, beta) = self.qkv_proj(x), self._gates(x, mask)
        if mask is not None:
            qkv = qkv.masked_fill(~mask.unsqueeze(-1), 0)
        if state is not None and x.shape[1] <= STEP_LENGTH and not torch.is_grad_enabled():
            qkv = self.conv.step(qkv, state["conv"], mask) if self.config.short_conv else F.silu(qkv)
            o = channel_delta_step(*self._split(qkv), g, beta, state["memory"])
        else:
            updates = {}
            if self.config.short_conv:
                qkv, updates["conv"] = self.conv(qkv, state=None if state is None else state["conv"], packing=packing, mask=mask)
            else:
                qkv = F.silu(qkv)
            start = None if state is None else state["memory"]
            o, updates["memory"] = channel_delta_rule(*self._split(qkv), g, beta, initial_state=start, packing=packing)
            state = None if state is None else state.update(**updates)
        gate = self.g_b_proj(self.g_a_proj(x)).unflatten(-1, o.shape[2:])
        return norm_and_project(self.o_norm, o, gate, self.o_proj), state

    def _gates(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """g `[B, T, HV, K]` and beta `[B, T, HV]`; padding forgets nothing and writes nothing."""
        c = self.config
        a, b = self.f_b_proj(self.f_a_proj(x)), self.b_proj(x)
        if mask is not None:
            hidden = ~mask.unsqueeze(-1)
            a, b = a.masked_fill(hidden, -math.inf), b.masked_fill(hidden, -math.inf)
        g = decay_gate(a, self.A_log.repeat_interleave(c.head_dim), self.dt_bias)
        return g.unflatten(-1, (c.num_value_heads, -1)), write_gate(b, top=2.0 if c.allow_neg_eigval else 1.0)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys `[B, T, H, K]`, normalised, and values `[B, T, HV, V]`."""
        c = self.config
        width = c.heads * c.head_dim
        q, k, v = qkv.split((width, width, c.value_width), dim=-1)
        q, k, v = q.unflatten(-1, (c.heads, -1)), k.unflatten(-1, (c.heads, -1)), v.unflatten(-1, (c.num_value_heads, -1))
        return l2norm(q), l2norm(k), v
