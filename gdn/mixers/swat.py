"""SWAT (arXiv 2502.18845): sliding-window attention with sigmoid weights, balanced ALiBi slopes and a rotary embedding.

    q, k = rope(W x)      v = W x
    o_m = sum over the last `window` tokens n of sigmoid(q_m^T k_n / sqrt(head_dim) + s_h (m - n)) v_n         y = W_o o

Half of the heads have slopes -2^-k, which favour recent tokens, the others +2^-k, which favour the oldest tokens in the window, with
k = 1, 2, ... in each half. The equations are the paper's; its public code never has this operator as the default. The default window
is that of its published ablation (row "AliRope-6:6"), which trained on 8 windows a sequence. The state is a rolling cache of fixed size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.attention import mean_context, remember, token_positions
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import Rotary, cache
from gdn.nn.rotary import rotated_channels
from gdn.ops import windowed_sigmoid_attention


class Swat(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 16
        """Heads of queries, keys and values."""
        head_dim: int = 64
        """Width of a head."""
        window: int = 128
        """How many tokens a query sees, itself included."""
        recent_heads: int | None = None
        """Heads with a negative slope, which favour recent tokens; the others favour old ones. None: half of them, rounded up. All of them
        is the paper's SWAT(-), none SWAT(+)."""
        alibi: bool = True
        """Add the slopes to the scores."""
        rope_base: float = 10000.0
        """Base of the rotary embedding's frequencies."""
        rope_fraction: float = 1.0
        """Part of each head that is turned; 0 is no rotary embedding."""

        def check(self) -> None:
            for name in ("heads", "head_dim", "window"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
            if self.recent_heads is not None and not 0 <= self.recent_heads <= self.heads:
                raise ConfigError(f"recent_heads: expected 0 to heads={self.heads}, got {self.recent_heads}")
            rotated_channels(self.head_dim, self.rope_fraction)

        @property
        def num_recent_heads(self) -> int:
            return (self.heads + 1) // 2 if self.recent_heads is None else self.recent_heads

        def build(self, width: int) -> Swat:
            return Swat(self, width)

        def num_parameters(self, width: int) -> int:
            return 4 * width * self.heads * self.head_dim

        def flops_per_token(self, width: int, length: int) -> int:
            scores_and_reads = 2 * self.heads * self.head_dim * mean_context(length, self.window)
            return int(2 * (self.num_parameters(width) + scores_and_reads))

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            return 8 + itemsize * self.window * 2 * self.heads * self.head_dim

        def saved_channels(self, width: int) -> int:
            # q, k, v before and after the rotary embedding and the output; the weights are computed again.
            return 7 * self.heads * self.head_dim

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.qkv_proj = nn.Linear(width, 3 * inner, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        self.rotary = Rotary(config.head_dim, config.rope_base, config.rope_fraction)

    def scaled_by_depth(self) -> tuple[Tensor, ...]:
        return (self.o_proj.weight,)

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qkv_proj": (self.o_proj.in_features,) * 3}

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        c = self.config
        device, dtype = device or self.qkv_proj.weight.device, dtype or self.qkv_proj.weight.dtype
        shape = (batch, c.window, c.heads, c.head_dim)
        tensors = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("keys", "values")}
        return MixerState({**tensors, "seen": torch.zeros(batch, device=device, dtype=torch.int64)})

    def forward(
        self,
        x: Tensor,
        *,
        state: MixerState | None = None,
        packing: Packing | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, MixerState | None]:
        if packing is not None and (state is not None or mask is not None):
            name = "mask" if state is None else "state"
            raise ArgumentError(f"{name}: cannot be given together with packing; packed documents begin empty and have no padding")
        positions = token_positions(x, None if state is None else state["seen"], packing, mask)
        pads = None if mask is None else (~mask).sum(1)
        q, k, v = self.qkv_proj(x).unflatten(-1, (3, self.config.heads, self.config.head_dim)).unbind(2)
        q, k = self.rotary(positions, q, k)
        start, keys, values = pads, k, v
        if state is not None:
            past = self.config.window - 1
            keys, values = (cache.lined_up(state[name], state["seen"], new, past, pads) for name, new in (("keys", k), ("values", v)))
            start = cache.line_start(state["seen"], past, pads)
            state = remember(state, k, v, pads)
        o = windowed_sigmoid_attention(q, keys, values, self._slopes(x), window=self.config.window, start=start, packing=packing)
        return self.o_proj(o.flatten(2)), state

    def _slopes(self, x: Tensor) -> Tensor:
        """`[H]` in float32: exact powers of two."""
        c = self.config
        if not c.alibi:
            return torch.zeros(c.heads, device=x.device)
        recent, old = (2.0 ** -torch.arange(1, n + 1, device=x.device) for n in (c.num_recent_heads, c.heads - c.num_recent_heads))
        return torch.cat([-recent, old])
