"""Gated DeltaNet (arXiv 2412.06464): short convolutions, the gated delta rule, a gated norm.

    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))        beta = sigmoid(W_b x)        g = -exp(A_log) softplus(W_a x + dt_bias)
    o = gated_delta_rule(q, k, v, g, beta)                         y = W_o [rms_norm(o) * silu(W_g x)]

The defaults are the paper's layer; every row of its ablation (Table S.1) is a field.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import GatedRMSNorm, RMSNorm, ShortConv
from gdn.nn.decay import draw_rate, draw_time_step
from gdn.nn.linear import is_hooked, projections
from gdn.nn.norm import norm_and_project
from gdn.nn.qk import ACTIVATIONS, QKActivation, QKNorm, normalise
from gdn.ops import GateParameters, decay_gate, delta_core, gated_delta_rule, gated_delta_step, write_gate

STEP_LENGTH = 8
"""Up to this many tokens with a state and no gradients are served by the one-token operators, which update in place."""


class GatedDeltaNet(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 6
        """Query/key heads."""
        head_dim: int = 128
        """Width K of a query/key head."""
        value_heads: int | None = None
        """Value heads, a multiple of `heads` (grouped values). None: as many as `heads`."""
        expand_v: float = 2.0
        """Width of a value head over that of a key head."""
        short_conv: bool = True
        """Causal convolution over q, k and v."""
        conv_size: int = 4
        """Taps of the convolution."""
        qk_activation: QKActivation = "silu"
        """Activation of queries and keys."""
        qk_norm: QKNorm = "l2"
        """Normalisation of queries and keys."""
        gate: bool = True
        """Forget by a data-dependent decay. False is DeltaNet with the rest unchanged."""
        allow_neg_eigval: bool = False
        """beta in (0, 2) instead of (0, 1), so that the transition can reflect."""
        beta_bias: bool = True
        """Bias in the projection to beta, as in the official code."""
        output_gate: bool = True
        """Multiply the output by silu(W_g x)."""
        output_norm: bool = True
        """RMS norm of each head's output."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""
        decay_range: tuple[float, float] = (0.0, 16.0)
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
        def qkv_width(self) -> int:
            """Channels of queries, keys and values together: those of the convolution."""
            return 2 * self.heads * self.head_dim + self.num_value_heads * self.value_dim

        def build(self, width: int) -> GatedDeltaNet:
            return GatedDeltaNet(self, width)

        def num_parameters(self, width: int) -> int:
            hv, value_width = self.num_value_heads, self.num_value_heads * self.value_dim
            count = width * (self.qkv_width + value_width)  # qkv_proj, o_proj
            count += width * hv + hv * self.beta_bias  # b_proj
            count += (width * hv + 2 * hv) * self.gate  # a_proj, A_log, dt_bias
            count += width * value_width * self.output_gate  # g_proj
            count += self.value_dim * self.output_norm
            return count + self.qkv_width * self.conv_size * self.short_conv

        def flops_per_token(self, width: int, length: int) -> int:
            recall_write_read = 3 * self.num_value_heads * self.head_dim * self.value_dim
            return 2 * (self.num_parameters(width) + recall_write_read)

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            memory = self.num_value_heads * self.head_dim * self.value_dim
            return 4 * memory + itemsize * self.qkv_width * (self.conv_size - 1) * self.short_conv

        def saved_channels(self, width: int) -> int:
            # Of the core: errors, inverses of chunks of 32 tokens, and a state for each 64 tokens at most.
            core = self.num_value_heads * (self.value_dim + 32 + self.head_dim * self.value_dim // 64)
            # The convolution's input and output, normalised q and k, the core's output and the output gate.
            return 2 * self.qkv_width + 2 * self.heads * self.head_dim + core + 2 * self.num_value_heads * self.value_dim

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        hv, value_width = config.num_value_heads, config.num_value_heads * config.value_dim
        self.qkv_proj = nn.Linear(width, config.qkv_width, bias=False)
        self.b_proj = nn.Linear(width, hv, bias=config.beta_bias)
        self.o_proj = nn.Linear(value_width, width, bias=False)
        if config.short_conv:
            fused = "silu" if config.qk_activation == "silu" else None
            self.conv = ShortConv(config.qkv_width, config.conv_size, fused)
        if config.gate:
            self.a_proj = nn.Linear(width, hv, bias=False)
            self.A_log = nn.Parameter(torch.empty(hv, dtype=torch.float32))
            self.dt_bias = nn.Parameter(torch.empty(hv, dtype=torch.float32))
            self.A_log._no_weight_decay = self.dt_bias._no_weight_decay = True  # type: ignore[attr-defined]
        if config.output_gate:
            self.g_proj = nn.Linear(width, value_width, bias=False)
        if config.output_norm:
            norm = GatedRMSNorm if config.output_gate else RMSNorm
            self.o_norm = norm(config.value_dim, config.norm_eps)
        self.reset_parameters()

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        keys = self.config.heads * self.config.head_dim
        return {"qkv_proj": (keys, keys, self.config.num_value_heads * self.config.value_dim)}

    def reset_parameters(self) -> None:
        """The official initialisation: PyTorch's for the matrices, zero biases, log-uniform time steps, uniform decay rates."""
        if self.config.beta_bias:
            nn.init.zeros_(self.b_proj.bias)
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
        qkv, b, a, gate = self._project(x)
        if mask is not None:
            # Padding must write nothing and forget nothing: zero inputs to the convolution, beta = 0, g = 0.
            hidden = ~mask.unsqueeze(-1)
            qkv, b = qkv.masked_fill(hidden, 0), b.masked_fill(hidden, -math.inf)
            a = None if a is None else a.masked_fill(hidden, -math.inf)
        if state is not None and x.shape[1] <= STEP_LENGTH and not torch.is_grad_enabled():
            o = self._step(qkv, a, b, state, mask)
        else:
            o, state = self._sequence(qkv, a, b, state, packing, mask)
        return self._output(o, gate), state

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Queries, keys and values side by side, b, a if there is a decay, and the output gate if there is one."""
        c = self.config
        wide = [self.qkv_proj, self.g_proj] if c.output_gate else [self.qkv_proj]
        found = projections(x, wide, [self.b_proj, self.a_proj] if c.gate else [self.b_proj])
        b, *a = found[len(wide) :]
        return found[0], b, a[0] if c.gate else None, found[1] if c.output_gate else None

    def _sequence(
        self, qkv: Tensor, a: Tensor | None, b: Tensor, state: MixerState | None, packing: Packing | None, mask: Tensor | None
    ) -> tuple[Tensor, MixerState | None]:
        c = self.config
        if state is None and c.short_conv and c.qk_activation == "silu" and c.qk_norm == "l2" and not is_hooked(self.conv):
            q, k, v = self.conv.qkv(qkv, c.heads, c.head_dim, packing)
            g, beta = self._gates(a, b)
            return gated_delta_rule(q, k, v.unflatten(-1, (c.num_value_heads, -1)), g, beta, packing=packing)[0], None
        conv = memory = None
        if c.short_conv:
            qkv, conv = self.conv(qkv, state=None if state is None else state["conv"], packing=packing, mask=mask)
        q, k, v = self._split(qkv)
        start = None if state is None else state["memory"]
        if a is not None and c.qk_norm == "l2":
            gates = GateParameters(self.A_log, self.dt_bias, self._top)
            o, memory = delta_core(q, k, v, a, b, gates, initial_state=start, packing=packing)
        else:
            g, beta = self._gates(a, b)
            o, memory = gated_delta_rule(self._norm(q), self._norm(k), v, g, beta, initial_state=start, packing=packing)
        if state is not None:
            state = state.update(memory=memory, **({} if conv is None else {"conv": conv}))
        return o, state

    def _step(self, qkv: Tensor, a: Tensor | None, b: Tensor, state: MixerState, mask: Tensor | None) -> Tensor:
        if self.config.short_conv:
            qkv = self.conv.step(qkv, state["conv"], mask)
        q, k, v = self._split(qkv)
        g, beta = self._gates(a, b)
        return gated_delta_step(self._norm(q), self._norm(k), v, g, beta, state["memory"])

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys `[B, T, H, K]` and values `[B, T, HV, V]`, activated."""
        c = self.config
        width = c.heads * c.head_dim
        q, k, v = qkv.split((width, width, qkv.shape[-1] - 2 * width), dim=-1)
        if not (c.short_conv and c.qk_activation == "silu"):
            q, k, v = ACTIVATIONS[c.qk_activation](q), ACTIVATIONS[c.qk_activation](k), F.silu(v)
        return q.unflatten(-1, (c.heads, -1)), k.unflatten(-1, (c.heads, -1)), v.unflatten(-1, (c.num_value_heads, -1))

    def _gates(self, a: Tensor | None, b: Tensor) -> tuple[Tensor, Tensor]:
        beta = write_gate(b, top=self._top)
        return (torch.zeros_like(beta) if a is None else decay_gate(a, self.A_log, self.dt_bias)), beta

    @property
    def _top(self) -> float:
        return 2.0 if self.config.allow_neg_eigval else 1.0

    def _norm(self, x: Tensor) -> Tensor:
        return normalise(x, self.config.qk_norm)

    def _output(self, o: Tensor, gate: Tensor | None) -> Tensor:
        """The four combinations of output norm and output gate on `[B, T, HV, V]`, and the projection."""
        gate = None if gate is None else gate.unflatten(-1, o.shape[2:])
        if gate is not None and self.config.output_norm:
            return norm_and_project(self.o_norm, o, gate, self.o_proj)
        if self.config.output_norm:
            o = self.o_norm(o)
        return self.o_proj((o if gate is None else o * F.silu(gate)).flatten(2))
