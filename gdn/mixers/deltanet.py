"""DeltaNet (arXiv 2406.06484): short convolutions, the delta rule without decay, a norm.

    q, k = l2norm(silu(conv(W x)))      v = silu(conv(W x))        beta = sigmoid(W_b x)
    o = gated_delta_rule(q, k, v, 0, beta)                         y = W_o rms_norm(o)

The defaults are the layer of the paper's language models with convolution; the rows of its ablation (feature map, norm, convolution) and
the options of its code are fields. Nothing is ever forgotten except by overwriting.
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
from gdn.nn.qk import ACTIVATIONS, QKActivation, QKNorm, normalise
from gdn.ops import gated_delta_rule, gated_delta_step, write_gate

STEP_LENGTH = 8
"""Up to this many tokens with a state and no gradients are served by the one-token operators, which update in place."""


class DeltaNet(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 8
        """Heads; the paper's models have `width / 128`."""
        head_dim: int = 128
        """Width K of a query/key head."""
        expand_v: float = 1.0
        """Width of a value head over that of a key head."""
        short_conv: bool = True
        """Causal convolution over q, k and v."""
        conv_size: int = 4
        """Taps of the convolution."""
        qk_activation: QKActivation = "silu"
        """Activation of queries and keys. Values always have SiLU."""
        qk_norm: QKNorm = "l2"
        """Normalisation of queries and keys."""
        beta: bool = True
        """Write with a data-dependent strength. False writes every token at full strength."""
        allow_neg_eigval: bool = False
        """Twice the writing strength, so that the transition can reflect (arXiv 2411.12537)."""
        output_gate: bool = False
        """Multiply the normed output by silu(W_g x)."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""

        def check(self) -> None:
            for name in ("heads", "head_dim", "conv_size"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
            if self.head_dim * self.expand_v != self.value_dim or self.value_dim < 1:
                raise ConfigError(f"expand_v: expected head_dim * expand_v to be a whole number, got {self.head_dim * self.expand_v}")

        @property
        def value_dim(self) -> int:
            """Width V of a value head."""
            return int(self.head_dim * self.expand_v)

        @property
        def value_width(self) -> int:
            """Channels of all values together."""
            return self.heads * self.value_dim

        @property
        def qkv_width(self) -> int:
            """Channels of queries, keys and values together: those of the convolution."""
            return 2 * self.heads * self.head_dim + self.value_width

        def build(self, width: int) -> DeltaNet:
            return DeltaNet(self, width)

        def num_parameters(self, width: int) -> int:
            count = width * (self.qkv_width + self.value_width)  # qkv_proj, o_proj
            count += width * self.heads * self.beta + width * self.value_width * self.output_gate
            return count + self.value_dim + self.qkv_width * self.conv_size * self.short_conv

        def flops_per_token(self, width: int, length: int) -> int:
            recall_write_read = 3 * self.head_dim * self.value_width
            return 2 * (self.num_parameters(width) + recall_write_read)

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            return 4 * self.head_dim * self.value_width + itemsize * self.qkv_width * (self.conv_size - 1) * self.short_conv

        def saved_channels(self, width: int) -> int:
            states = self.head_dim * self.value_width // 64  # one state a chunk of 64 tokens
            # The convolution's input and output, normalised q and k, the core's output and its normed copy, the gate.
            return 2 * self.qkv_width + 2 * self.heads * self.head_dim + states + (2 + self.output_gate) * self.value_width

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = nn.Linear(width, config.qkv_width, bias=False)
        self.o_proj = nn.Linear(config.value_width, width, bias=False)
        if config.beta:
            self.b_proj = nn.Linear(width, config.heads, bias=False)
        if config.short_conv:
            self.conv = ShortConv(config.qkv_width, config.conv_size, "silu" if config.qk_activation == "silu" else None)
        if config.output_gate:
            self.g_proj = nn.Linear(width, config.value_width, bias=False)
        self.o_norm = (GatedRMSNorm if config.output_gate else RMSNorm)(config.value_dim, config.norm_eps)

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        keys = self.config.heads * self.config.head_dim
        return {"qkv_proj": (keys, keys, self.config.value_width)}

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        c = self.config
        device = device or self.qkv_proj.weight.device
        dtype = dtype or self.qkv_proj.weight.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        tensors = {"memory": torch.zeros(batch, c.heads, c.head_dim, c.value_dim, device=device, dtype=wide)}
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
        qkv, beta = self.qkv_proj(x), self._strength(x, mask)
        if mask is not None:
            qkv = qkv.masked_fill(~mask.unsqueeze(-1), 0)
        g = beta.new_zeros(()).expand_as(beta)
        if state is not None and x.shape[1] <= STEP_LENGTH and not torch.is_grad_enabled():
            qkv = self.conv.step(qkv, state["conv"], mask) if self.config.short_conv else qkv
            o = gated_delta_step(*self._split(qkv), g, beta, state["memory"])
        else:
            updates = {}
            if self.config.short_conv:
                qkv, updates["conv"] = self.conv(qkv, state=None if state is None else state["conv"], packing=packing, mask=mask)
            start = None if state is None else state["memory"]
            o, updates["memory"] = gated_delta_rule(*self._split(qkv), g, beta, initial_state=start, packing=packing)
            state = None if state is None else state.update(**updates)
        o = self.o_norm(o, self.g_proj(x).unflatten(-1, o.shape[2:])) if self.config.output_gate else self.o_norm(o)
        return self.o_proj(o.flatten(2)), state

    def _strength(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """beta `[B, T, H]`, 0 at padding, which must write nothing."""
        top = 2.0 if self.config.allow_neg_eigval else 1.0
        if self.config.beta:
            b = self.b_proj(x)
            return write_gate(b if mask is None else b.masked_fill(~mask.unsqueeze(-1), -math.inf), top=top)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        full = torch.full((*x.shape[:2], self.config.heads), top, dtype=wide, device=x.device)
        return full if mask is None else full.masked_fill(~mask.unsqueeze(-1), 0)

    def _split(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys `[B, T, H, K]`, activated and normalised, and values `[B, T, H, V]`."""
        c = self.config
        width = c.heads * c.head_dim
        q, k, v = qkv.split((width, width, c.value_width), dim=-1)
        if not (c.short_conv and c.qk_activation == "silu"):
            q, k, v = ACTIVATIONS[c.qk_activation](q), ACTIVATIONS[c.qk_activation](k), F.silu(v)
        q, k, v = (x.unflatten(-1, (c.heads, -1)) for x in (q, k, v))
        return normalise(q, c.qk_norm), normalise(k, c.qk_norm), v
