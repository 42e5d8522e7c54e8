"""Mamba2 (arXiv 2405.21060): a state-space layer as linear attention with one decay per head, a skip, and a norm after the gate.

    z, xBC, dt = W_in u         x, B, C = silu(conv(xBC) + bias)        dt = softplus(dt + dt_bias)
    y = linear_attention(q=C, k=B, v=dt x, g=-exp(A_log) dt) + D x      out = W_out rms_norm(y * silu(z))

B and C are shared by the heads of a group. The defaults are the official layer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import RMSNorm, ShortConv
from gdn.nn.decay import draw_rate, draw_time_step
from gdn.nn.memory import PER_HEAD, in_place
from gdn.ops import scale_heads, skip_gated_rms_norm

LINEAR = 40.0
"""softplus(z) = z above this, as in `gdn.ops.decay_gate`."""


class Mamba2(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        expand: int = 2
        """Inner width over the width of the residual stream."""
        head_dim: int = 64
        """Width P of a head of x; the inner width is a multiple of it."""
        state_dim: int = 128
        """Width N of B and C: channels of state for each channel of x."""
        groups: int = 1
        """Groups of heads that share B and C."""
        conv_size: int = 4
        """Taps of the convolution over x, B and C."""
        conv_bias: bool = True
        """Bias of the convolution."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm, which spans the channels of a group."""
        decay_range: tuple[float, float] = (1.0, 16.0)
        """exp(A_log) is drawn uniformly from this range."""
        dt_range: tuple[float, float] = (1e-3, 0.1)
        """softplus(dt_bias) is drawn log-uniformly from this range."""

        def check(self) -> None:
            for name in ("expand", "head_dim", "state_dim", "groups", "conv_size"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
            for name in ("decay_range", "dt_range"):
                low, high = getattr(self, name)
                if not 0 < low < high:
                    raise ConfigError(f"{name}: expected 0 < low < high, got {(low, high)}")

        def heads(self, width: int) -> int:
            """Number of heads."""
            inner = self.expand * width
            if inner % self.head_dim or inner // self.head_dim % self.groups:
                raise ConfigError(
                    f"head_dim: expected expand * width = {inner} to be a multiple of head_dim * groups, "
                    f"got {self.head_dim} * {self.groups}"
                )
            return inner // self.head_dim

        def conv_width(self, width: int) -> int:
            """Channels of x, B and C together: those of the convolution."""
            return self.expand * width + 2 * self.groups * self.state_dim

        def build(self, width: int) -> Mamba2:
            return Mamba2(self, width)

        def num_parameters(self, width: int) -> int:
            inner, conv, heads = self.expand * width, self.conv_width(width), self.heads(width)
            matrices = width * (inner + conv + heads) + inner * width
            return matrices + conv * (self.conv_size + self.conv_bias) + 3 * heads + inner  # A_log, D, dt_bias, norm

        def flops_per_token(self, width: int, length: int) -> int:
            return 2 * (self.num_parameters(width) + 2 * self.expand * width * self.state_dim)  # write and read

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            return 4 * self.expand * width * self.state_dim + itemsize * (self.conv_size - 1) * self.conv_width(width)

        def saved_channels(self, width: int) -> int:
            inner = self.expand * width
            # The convolution's input and output, z, dt x, the memory's output, with the skip, gated, and normed; a memory in some chunks.
            return 2 * self.conv_width(width) + 6 * inner + inner * self.state_dim // 64

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.inner, self.heads = config.expand * width, config.heads(width)
        self.in_proj = nn.Linear(width, self.inner + config.conv_width(width) + self.heads, bias=False)
        self.conv = ShortConv(config.conv_width(width), config.conv_size, "silu", bias=config.conv_bias)
        self.A_log = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(self.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(self.heads))
        for parameter in (self.A_log, self.dt_bias, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = RMSNorm(self.inner, config.norm_eps)
        self.out_proj = nn.Linear(self.inner, width, bias=False)
        self.reset_parameters()

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        shared = self.config.groups * self.config.state_dim
        return {"in_proj": (self.inner, self.inner, shared, shared, self.heads)}

    def reset_parameters(self) -> None:
        """The official initialisation: PyTorch's for matrices and convolution, uniform decay rates, log-uniform time steps, D = 1."""
        draw_rate(self.A_log, *self.config.decay_range)
        draw_time_step(self.dt_bias, *self.config.dt_range)
        nn.init.ones_(self.D)

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        c, weight = self.config, self.in_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        memory = torch.zeros(batch, self.heads, c.state_dim, c.head_dim, device=device, dtype=wide)
        conv = torch.zeros(batch, c.conv_size - 1, self.conv.weight.shape[0], device=device, dtype=dtype)
        return MixerState({"memory": memory, "conv": conv})

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
        z, xbc, dt = self.in_proj(x).split((self.inner, self.conv.weight.shape[0], self.heads), dim=-1)
        if mask is not None:
            # Padding must write nothing and forget nothing: zero inputs to the convolution, a time step of zero.
            hidden = ~mask.unsqueeze(-1)
            xbc, dt = xbc.masked_fill(hidden, 0), dt.masked_fill(hidden, -math.inf)
        after: dict[str, Tensor] = {}
        if state is not None and in_place(x, state):
            xbc = self.conv.step(xbc, state["conv"], mask)
        else:
            xbc, after["conv"] = self.conv(xbc, state=None if state is None else state["conv"], packing=packing, mask=mask)
        y, skipped, memory = self._scan(xbc, dt, None if state is None else state["memory"], packing)
        if state is not None and memory is not None:
            state = state.update(memory=memory, **after)
        groups, eps = self.config.groups, self.norm.eps
        return self.out_proj(skip_gated_rms_norm(y, skipped, self.D, z, self.norm.weight, groups=groups, eps=eps)), state

    def _scan(self, xbc: Tensor, dt: Tensor, memory: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the memory gives and x, which skips it, both `[B, T, heads, P]`; the memory after the last token."""
        c = self.config
        x, b, c_ = xbc.split((self.inner, c.groups * c.state_dim, c.groups * c.state_dim), dim=-1)
        x, b, c_ = x.unflatten(-1, (self.heads, -1)), b.unflatten(-1, (c.groups, -1)), c_.unflatten(-1, (c.groups, -1))
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias, threshold=LINEAR)
        written = scale_heads(x, dt.to(accumulate_dtype(x.dtype)))
        y, memory = PER_HEAD(c_, b, written, -self.A_log.exp() * dt, scale=1.0, state=memory, packing=packing)
        return y, x, memory
