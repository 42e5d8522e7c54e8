"""HGRN2 (arXiv 2404.07904): gated linear attention whose keys are what the forget gate lets go.

    q = silu(W_q x)       i = W_i x       f = b + (1 - b) sigmoid(W_f x)       o = gated_linear_attention(q, k=1 - f, v=i, g=log f)
    y = W_o rms_norm(o)

The forget gate has a lower bound b for each channel, which rises from layer to layer. With L layers and their learned rows as matrix
`[L, width]`, `p` its softmax over the layers,

    b_l = p_1 + ... + p_l,        b_0 = 0

so the first layer may forget everything at once and the last remembers for long. The layers of one model share this (`join`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import RMSNorm
from gdn.nn.decay import log_sigmoid
from gdn.nn.memory import PER_KEY
from gdn.ops import write_gate


class HGRN2(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        head_dim: int = 128
        """Width of a head, of keys and of values ("expansion ratio"); the residual stream's is a multiple of it."""
        lower_bound: bool = True
        """Learn lower bounds of the forget gates."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm, which spans all heads."""

        def check(self) -> None:
            if self.head_dim < 1:
                raise ConfigError(f"head_dim: expected at least 1, got {self.head_dim}")

        def heads(self, width: int) -> int:
            """Number of heads."""
            if width % self.head_dim:
                raise ConfigError(f"head_dim: expected a divisor of the width {width}, got {self.head_dim}")
            return width // self.head_dim

        def build(self, width: int) -> HGRN2:
            return HGRN2(self, width)

        def num_parameters(self, width: int) -> int:
            return 4 * width * width + width + width * self.lower_bound

        def flops_per_token(self, width: int, length: int) -> int:
            return 2 * (self.num_parameters(width) + 2 * width * self.head_dim)  # write and read

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            return 4 * width * self.head_dim

        def saved_channels(self, width: int) -> int:
            # q and f before and after their gates, the log decay, i, the memory's output and its norm; a memory in some chunks.
            return 8 * width + width * self.head_dim // 64

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.heads = config.heads(width)
        self.qfi_proj = nn.Linear(width, 3 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.o_norm = RMSNorm(width, config.norm_eps)
        if config.lower_bound:
            self.bound = nn.Parameter(torch.zeros(width))
        self.layers: tuple[HGRN2, ...] = (self,)

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qfi_proj": (self.o_proj.in_features,) * 3}

    def join(self, layers: Sequence[Mixer]) -> None:
        """Share the lower bounds with the other layers of this kind."""
        self.layers = tuple(m for m in layers if isinstance(m, HGRN2) and m.config.lower_bound)

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        weight, width = self.qfi_proj.weight, self.config.head_dim
        device, dtype = device or weight.device, accumulate_dtype(dtype or weight.dtype)
        return MixerState({"memory": torch.zeros(batch, self.heads, width, width, device=device, dtype=dtype)})

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
        q, f, i = self.qfi_proj(x).chunk(3, dim=-1)
        g, k = self._gates(f)
        if mask is not None:  # padding must write nothing (zero keys) and forget nothing
            hidden = ~mask.unsqueeze(-1)
            g, k = g.masked_fill(hidden, 0), k.masked_fill(hidden, 0)
        q, k, v, g = (t.unflatten(-1, (self.heads, -1)) for t in (F.silu(q), k, i, g))
        o, memory = PER_KEY(q, k, v, g, state=None if state is None else state["memory"], packing=packing)
        if state is not None and memory is not None:
            state = state.update(memory=memory)
        return self.o_proj(self.o_norm(o.flatten(2))), state

    def _gates(self, f: Tensor) -> tuple[Tensor, Tensor]:
        """The log decay and the keys, `[B, T, width]`, from the projection to the forget gate."""
        bound = self.lower_bounds()
        if bound is None:
            return log_sigmoid(f), write_gate(-f).to(f.dtype)
        wide = f.to(accumulate_dtype(f.dtype))
        g = torch.logaddexp(bound.log(), torch.log1p(-bound) + F.logsigmoid(wide))
        return g.clamp(max=0), ((1 - bound) * torch.sigmoid(-wide)).to(f.dtype)

    def lower_bounds(self) -> Tensor | None:
        """b of this layer `[width]`; None for zero: in the first layer, and without lower bounds."""
        depth = next((place for place, layer in enumerate(self.layers) if layer is self), 0) if self.config.lower_bound else 0
        if depth == 0:
            return None
        rows = torch.stack([layer.bound for layer in self.layers])
        return rows.to(accumulate_dtype(rows.dtype)).softmax(0)[1 : depth + 1].sum(0)
