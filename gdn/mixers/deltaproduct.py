"""DeltaProduct and Gated DeltaProduct (arXiv 2502.10297): n delta-rule writes a token, one read.

    q = l2norm(silu(conv(W x)))    k_j = l2norm(silu(conv(W_j x)))    v_j = silu(conv(W_j x))    beta_j = sigmoid(W_j x)    for j = 1 .. n
    g = 0, or gated: -exp(A_log) softplus(W_a x + dt_bias)
    o = gated_delta_product(q, k, v, g, beta)                         y = W_o [rms_norm(o) * silu(W_g x)]

The state passes a token through a product of n generalised Householder matrices. With beta up to 2 these can reflect: two make a rotation,
and one layer tracks permutations of n + 1 things. The authors' layer and model disagree about `householders`, `gate` and
`allow_neg_eigval`, which decide what can be computed at all; so these have no default here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import GatedRMSNorm, RMSNorm, ShortConv
from gdn.nn.decay import draw_rate, draw_time_step
from gdn.ops import decay_gate, gated_delta_product, gated_delta_product_step, l2norm, write_gate

STEP_LENGTH = 8
"""Up to this many tokens with a state and no gradients are served by the one-token operators, which update in place."""


class DeltaProduct(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        typical: ClassVar[Mapping[str, Any]] = {"householders": 2, "gate": True, "allow_neg_eigval": True}
        householders: int
        """Writes n of a token. 1 is DeltaNet, or gated Gated DeltaNet."""
        gate: bool
        """Forget by a data-dependent decay, once a token: Gated DeltaProduct."""
        allow_neg_eigval: bool
        """beta in (0, 2) instead of (0, 1), so that a write can reflect (arXiv 2411.12537)."""
        heads: int = 8
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
        output_gate: bool = True
        """Multiply the normed output by silu(W_g x)."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""
        decay_range: tuple[float, float] = (0.0, 16.0)
        """exp(A_log) is drawn uniformly from this range."""
        dt_range: tuple[float, float] = (1e-3, 0.1)
        """softplus(dt_bias) is drawn log-uniformly from this range."""

        def check(self) -> None:
            for name in ("householders", "heads", "head_dim", "conv_size"):
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
            """Channels of the output of all heads, and of the values of one write."""
            return self.num_value_heads * self.value_dim

        @property
        def widths(self) -> tuple[int, int, int]:
            """Channels of queries, of all keys and of all values; together those of the convolution."""
            query = self.heads * self.head_dim
            return query, self.householders * query, self.householders * self.value_width

        def build(self, width: int) -> DeltaProduct:
            return DeltaProduct(self, width)

        def num_parameters(self, width: int) -> int:
            hv = self.num_value_heads
            count = width * (sum(self.widths) + self.value_width)  # qkv_proj, o_proj
            count += width * self.householders * hv + (width * hv + 2 * hv) * self.gate  # b_proj; a_proj, A_log, dt_bias
            count += width * self.value_width * self.output_gate + self.value_dim
            return count + sum(self.widths) * self.conv_size * self.short_conv

        def flops_per_token(self, width: int, length: int) -> int:
            recall_write_read = (2 * self.householders + 1) * self.head_dim * self.value_width
            return 2 * (self.num_parameters(width) + recall_write_read)

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            return 4 * self.head_dim * self.value_width + itemsize * sum(self.widths) * (self.conv_size - 1) * self.short_conv

        def saved_channels(self, width: int) -> int:
            states = self.householders * self.head_dim * self.value_width // 64  # one state in 64 writes
            # The convolution's input and output, normalised q and k, the core's output, the output gate and their product.
            return 2 * sum(self.widths) + sum(self.widths[:2]) + states + 3 * self.value_width

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        hv = config.num_value_heads
        self.qkv_proj = nn.Linear(width, sum(config.widths), bias=False)
        self.b_proj = nn.Linear(width, config.householders * hv, bias=False)
        self.o_proj = nn.Linear(config.value_width, width, bias=False)
        if config.short_conv:
            self.conv = ShortConv(sum(config.widths), config.conv_size, "silu")
        if config.gate:
            self.a_proj = nn.Linear(width, hv, bias=False)
            self.A_log = nn.Parameter(torch.empty(hv, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(hv, dtype=torch.float32))
            self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True  # type: ignore[attr-defined]
        if config.output_gate:
            self.g_proj = nn.Linear(width, config.value_width, bias=False)
        self.o_norm = (GatedRMSNorm if config.output_gate else RMSNorm)(config.value_dim, config.norm_eps)
        self.reset_parameters()

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        c, query = self.config, self.config.widths[0]
        return {"qkv_proj": (query, *c.householders * (query,), *c.householders * (c.value_width,))}

    def reset_parameters(self) -> None:
        """PyTorch's initialisation for the matrices; the decay as in Gated DeltaNet."""
        if self.config.gate:
            draw_rate(self.A_log, *self.config.decay_range)
            draw_time_step(self.dt_bias, *self.config.dt_range)

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        c = self.config
        device = device or self.qkv_proj.weight.device
        dtype = dtype or self.qkv_proj.weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {"memory": torch.zeros(batch, c.num_value_heads, c.head_dim, c.value_dim, device=device, dtype=wide)}
        if c.short_conv:
            tensors["conv"] = torch.zeros(batch, c.conv_size - 1, sum(c.widths), device=device, dtype=dtype)
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
            o = gated_delta_product_step(*self._split(qkv), g, beta, state["memory"])
        else:
            updates = {}
            if self.config.short_conv:
                qkv, updates["conv"] = self.conv(qkv, state=None if state is None else state["conv"], packing=packing, mask=mask)
            else:
                qkv = F.silu(qkv)
            start = None if state is None else state["memory"]
            o, updates["memory"] = gated_delta_product(*self._split(qkv), g, beta, initial_state=start, packing=packing)
            state = None if state is None else state.update(**updates)
        o = self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[2:])) if self.config.output_gate else self.o_norm(o)
        return self.o_proj(o.flatten(2)), state

    def _gates(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """g `[B, T, HV]` and beta `[B, T, n, HV]`; padding forgets nothing and writes nothing."""
        c = self.config
        a, b = (self.a_proj(x) if c.gate else None), self.b_proj(x)
        if mask is not None:
            hidden = ~mask.unsqueeze(-1)
            a = None if a is None else a.masked_fill(hidden, -math.inf)
            b = b.masked_fill(hidden, -math.inf)
        beta = write_gate(b, top=2.0 if c.allow_neg_eigval else 1.0).unflatten(-1, (c.householders, -1))
        g = beta.new_zeros(()).expand_as(beta[:, :, 0]) if a is None else decay_gate(a, self.A_log, self.dt_bias)
        return g, beta

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries `[B, T, H, K]`, keys `[B, T, n, H, K]`, both normalised, and values `[B, T, n, HV, V]`."""
        c = self.config
        q, k, v = qkv.split(c.widths, dim=-1)
        q, k = q.unflatten(-1, (c.heads, -1)), k.unflatten(-1, (c.householders, c.heads, -1))
        return l2norm(q), l2norm(k), v.unflatten(-1, (c.householders, c.num_value_heads, -1))
