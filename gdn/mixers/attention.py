"""Softmax attention with a rotary embedding, to the whole past or through a sliding window: the attention layer of Transformer++, Samba and
of the Gated DeltaNet hybrids H1 and H2.

    q, k = rope(W x)      v = W x      o = causal_attention(q, k, v)      y = W_o o

The defaults are Transformer++; `window=2048` is the official hybrids' layer. Optional are RMS norms of queries and keys, and a sigmoid gate
on the output as in Qwen3-Next. With a window the state is a rolling cache of fixed size. Without one it grows with the text.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import FixedState, GrowingState, Mixer, MixerConfig, MixerState, room
from gdn.nn import RMSNorm, Rotary, cache
from gdn.nn.rotary import rotated_channels
from gdn.ops import causal_attention


class Attention(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 16
        """Query heads."""
        kv_heads: int | None = None
        """Key/value heads, a divisor of `heads` (grouped queries). None: as many as `heads`."""
        head_dim: int = 64
        """Width of a head."""
        window: int | None = None
        """How many tokens a query sees, itself included. None is the whole past."""
        rope_base: float = 10000.0
        """Base of the rotary embedding's frequencies."""
        rope_fraction: float = 1.0
        """Part of each head that is turned; 0 is no rotary embedding."""
        qk_norm: bool = False
        """RMS norm of each query and key head before the rotary embedding."""
        output_gate: bool = False
        """Multiply the output by sigmoid(W_g x)."""
        norm_eps: float = 1e-6
        """Epsilon of the query and key norms."""
        norm_all_heads: bool = False
        """Norm the queries, and the keys, of all heads as one vector (OLMo), not each head by itself."""
        norm_offset: float = 0.0
        """Added to the weights of the query and key norms, as `LM.Config.norm_offset`."""

        def check(self) -> None:
            for name in ("heads", "head_dim"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
            if self.num_kv_heads < 1 or self.heads % self.num_kv_heads:
                raise ConfigError(f"kv_heads: expected a divisor of heads={self.heads}, got {self.kv_heads}")
            if self.window is not None and self.window < 1:
                raise ConfigError(f"window: expected at least 1 or None, got {self.window}")
            rotated_channels(self.head_dim, self.rope_fraction)

        @property
        def num_kv_heads(self) -> int:
            return self.heads if self.kv_heads is None else self.kv_heads

        @property
        def qkv_width(self) -> int:
            return (self.heads + 2 * self.num_kv_heads) * self.head_dim

        @property
        def norm_widths(self) -> tuple[int, int]:
            """Widths of the norms of queries and keys."""
            heads = (self.heads, self.num_kv_heads) if self.norm_all_heads else (1, 1)
            return heads[0] * self.head_dim, heads[1] * self.head_dim

        @property
        def state_grows(self) -> bool:
            return self.window is None

        def build(self, width: int) -> Attention:
            return Attention(self, width)

        def num_parameters(self, width: int) -> int:
            inner = self.heads * self.head_dim
            normed = sum(self.norm_widths) * self.qk_norm
            return width * (self.qkv_width + inner * (1 + self.output_gate)) + normed

        def flops_per_token(self, width: int, length: int) -> int:
            scores_and_reads = 2 * self.heads * self.head_dim * mean_context(length, self.window)
            return int(2 * (self.num_parameters(width) + scores_and_reads))

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            slots = room(length) if self.window is None else self.window
            return 8 + itemsize * slots * 2 * self.num_kv_heads * self.head_dim

        def saved_channels(self, width: int) -> int:
            # q, k, v before and after the rotary embedding, the output, and with a gate that and the product.
            return 2 * self.qkv_width + self.heads * self.head_dim * (1 + 2 * self.output_gate)

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        inner = config.heads * config.head_dim
        self.qkv_proj = nn.Linear(width, config.qkv_width, bias=False)
        self.o_proj = nn.Linear(inner, width, bias=False)
        if config.output_gate:
            self.g_proj = nn.Linear(width, inner, bias=False)
        if config.qk_norm:
            queries, keys = config.norm_widths
            self.q_norm = RMSNorm(queries, config.norm_eps, config.norm_offset)
            self.k_norm = RMSNorm(keys, config.norm_eps, config.norm_offset)
        self.rotary = Rotary(config.head_dim, config.rope_base, config.rope_fraction)

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        keys = self.config.num_kv_heads * self.config.head_dim
        return {"qkv_proj": (self.config.heads * self.config.head_dim, keys, keys)}

    def scaled_by_depth(self) -> tuple[Tensor, ...]:
        return (self.o_proj.weight,)

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        c = self.config
        device, dtype = device or self.qkv_proj.weight.device, dtype or self.qkv_proj.weight.dtype
        shape = (batch, room(0) if c.window is None else c.window, c.num_kv_heads, c.head_dim)
        tensors = {name: torch.zeros(shape, device=device, dtype=dtype) for name in ("keys", "values")}
        tensors["seen"] = torch.zeros(batch, device=device, dtype=torch.int64)
        return GrowingState(tensors) if c.window is None else MixerState(tensors)

    def fixed_state(
        self, batch: int, room: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> MixerState:
        state = self.init_state(batch, device=device, dtype=dtype)
        if self.config.window is not None:
            return state
        caches = {n: state[n].new_zeros(batch, room, *state[n].shape[2:]) for n in ("keys", "values")}
        return FixedState({**caches, "seen": state["seen"]})

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
        q, k, v = self._heads(x, positions)
        if state is None:
            o = causal_attention(q, k, v, window=self.config.window, start=pads, packing=packing)
        elif x.shape[1] == 1 and pads is None and not torch.is_grad_enabled():
            o = self._step(q, k, v, state)
        else:
            o, state = self._continue(q, k, v, state, pads)
        o = o.flatten(2)
        return self.o_proj(o * self.g_proj(x).sigmoid() if self.config.output_gate else o), state

    def _heads(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        heads = self.qkv_proj(x).unflatten(-1, (-1, c.head_dim))
        q, k, v = heads.split([c.heads, c.num_kv_heads, c.num_kv_heads], dim=2)
        if c.qk_norm and c.norm_all_heads:
            q, k = self.q_norm(q.flatten(2)).view_as(q), self.k_norm(k.flatten(2)).view_as(k)
        elif c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotary(positions, q, k)
        return q, k, v

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, state: MixerState, pads: Tensor | None) -> tuple[Tensor, MixerState]:
        """Some tokens of sequences already begun: attend to the past and the new ones in one row, then keep the new ones."""
        seen = state["seen"]
        past = tokens_before(state)
        keys, values = (cache.lined_up(state[name], seen, new, past, pads) for name, new in (("keys", k), ("values", v)))
        start = pads if past == 0 else cache.line_start(seen, past, pads)
        o = causal_attention(q, keys, values, window=self.config.window, start=start)
        return o, remember(state, k, v, pads)

    def _step(self, q: Tensor, k: Tensor, v: Tensor, state: MixerState) -> Tensor:
        """One token without gradients: keep it first, then attend to the slots as they lie."""
        last = state["seen"].clone()
        remember(state, k, v, None)
        slots = state.tokens if isinstance(state, GrowingState) else state["keys"].shape[1]
        mask = (cache.held(last, slots) >= 0)[:, None, None]
        keys, values = (state[name][:, :slots].to(q.dtype).transpose(1, 2) for name in ("keys", "values"))
        queries = q.squeeze(1).unflatten(1, (keys.shape[1], -1))  # the query heads of a group are its rows: no key is read twice
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).flatten(1, 2).unsqueeze(1)


def remember(state: MixerState, k: Tensor, v: Tensor, pads: Tensor | None) -> MixerState:
    """The state with the keys and values of some more tokens: in place, or a new one where a gradient flows."""
    seen, length = state["seen"], k.shape[1]
    after = seen + (length if pads is None else length - pads)
    tokens = 0
    if isinstance(state, GrowingState):
        tokens = state.tokens + length if pads is None else int(after.max())
    if isinstance(state, FixedState):
        _check_room(state, after, length)
        state.begun = True
    caches = {n: state.with_room(n, tokens) if isinstance(state, GrowingState) else state[n] for n in ("keys", "values")}
    if pads is None and not torch.is_grad_enabled():
        for name, new in (("keys", k), ("values", v)):
            state.tensors[name] = caches[name]
            cache.append_(caches[name], seen, new, wraps=not isinstance(state, FixedState))
        seen.copy_(after)
    else:
        news = {"keys": k, "values": v}
        state = state.update(**{n: cache.written(caches[n], seen, news[n], pads) for n in caches}, seen=after)
    if isinstance(state, GrowingState):
        state.tokens = tokens
    return state


def _check_room(state: FixedState, after: Tensor, length: int) -> None:
    """Of a step on a GPU nothing is asked, it would wait for the device: a place outside of the tensor is an error of its own there."""
    slots, asked = state["keys"].shape[1], (length > 1 or after.device.type == "cpu") and not torch.compiler.is_compiling()
    if length > slots or (asked and int(after.max()) > slots):
        raise ArgumentError(f"state: has room for {slots} tokens, fewer than those read before and the {length} given")


def tokens_before(state: MixerState) -> int:
    """How many tokens before the new ones may have to be looked at."""
    if isinstance(state, GrowingState):
        return state.tokens
    slots = state["keys"].shape[1]
    return slots * state.begun if isinstance(state, FixedState) else slots - 1


def token_positions(x: Tensor, seen: Tensor | None, packing: Packing | None, mask: Tensor | None) -> Tensor:
    """The place of each token in its document or sequence, `[T]` or `[B, T]`; padding is not counted."""
    batch, length = x.shape[:2]
    if packing is not None:
        packing.check(batch, length, x.device)
        return packing.positions.view(batch, length)
    positions = torch.arange(length, device=x.device) if mask is None else (mask.cumsum(1) - 1).clamp(min=0)
    return positions if seen is None else seen.unsqueeze(1) + positions


def mean_context(length: int, window: int | None) -> float:
    """How many tokens a token sees in the mean over a sequence of `length`, itself included."""
    if length < 1:
        return 0.0
    window = length if window is None else min(window, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
