"""TransMamba (arXiv 2503.24067): one set of projections read as attention up to a place in the text and as Mamba2 after it.

    C, B, x = silu(conv(W u))           dt = softplus(W_dt u + dt_bias)          g = -exp(A_log) dt
    up to `transpoint` tokens:          o = softmax attention with queries rope(C), keys rope(B), values x       y = W_o o
    after them:                         h = exp(g) h + B (dt x)^T      o = C^T h + D x      y = W_o rms_norm(o * silu(W_z u))

At the transpoint the memory converter makes h from the keys and values of the tokens before: exactly what Mamba2 would remember of them. A
transpoint of 0 is a Mamba2 layer whose heads each have their own B and C; one beyond the text is an attention layer. Layers differ in it: a
schedule is a pattern of configurations (`schedule`). Every document begins with attention.

The paper leaves open, and this file decides: short convolution and SiLU come before both readings; the rotary embedding is in attention
only, so that keys enter the memory unturned; gate, norm and D belong to the Mamba2 reading.

The state holds keys and values until the shortest sequence has passed the transpoint, and then drops them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.core.checks import accumulate_dtype
from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.attention import mean_context, remember, token_positions
from gdn.mixers.base import Mixer, MixerConfig, MixerState
from gdn.nn import RMSNorm, Rotary, ShortConv, cache
from gdn.nn.decay import draw_rate, draw_time_step
from gdn.nn.rotary import rotated_channels
from gdn.ops import causal_attention, linear_attention, linear_attention_step

LINEAR = 40.0
"""softplus(z) = z above this, as in `gdn.ops.decay_gate`."""


@dataclass(eq=False)
class SwitchingState(MixerState):
    """A state whose keys and values go when they are no longer needed."""

    shortest: int = 0
    """Tokens of the shortest sequence; the host knows them without asking the device."""
    longest: int = 0
    """Tokens of the longest sequence."""

    def copy_(self, other: MixerState) -> None:
        super().copy_(other)
        assert isinstance(other, SwitchingState)
        self.shortest, self.longest = other.shortest, other.longest

    def _put(self, name: str, tensor: Tensor) -> None:
        if self.tensors[name].shape == tensor.shape:
            super()._put(name, tensor)
        else:
            self.tensors[name] = tensor.detach().clone()


@dataclass(frozen=True)
class Projections:
    """What both readings are made of, `[B, T, heads, head_dim]`, and the gates `[B, T, heads]` in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    dt: Tensor
    g: Tensor

    @property
    def written(self) -> Tensor:
        """What Mamba2 adds to the memory beside the key: dt x."""
        return (self.v * self.dt.unsqueeze(-1)).to(self.v.dtype)

    def part(self, tokens: slice) -> Projections:
        return Projections(*(x[:, tokens] for x in (self.q, self.k, self.v, self.dt, self.g)))


class TransMamba(Mixer):
    """See the module's docstring."""

    class Config(MixerConfig):
        heads: int = 16
        """Heads of queries (C), keys (B) and values (x)."""
        head_dim: int = 64
        """Width of a head."""
        transpoint: int = 2048
        """Tokens of a document that are attended to; the ones after them are remembered."""
        conv_size: int = 4
        """Taps of the convolution."""
        conv_bias: bool = True
        """Bias of the convolution."""
        rope_base: float = 10000.0
        """Base of the rotary embedding's frequencies."""
        rope_fraction: float = 1.0
        """Part of each head that is turned; 0 is no rotary embedding."""
        norm_eps: float = 1e-5
        """Epsilon of the output norm."""
        decay_range: tuple[float, float] = (1.0, 16.0)
        """exp(A_log) is drawn uniformly from this range."""
        dt_range: tuple[float, float] = (1e-3, 0.1)
        """softplus(dt_bias) is drawn log-uniformly from this range."""

        def check(self) -> None:
            for name, least in (("heads", 1), ("head_dim", 1), ("conv_size", 1), ("transpoint", 0)):
                if getattr(self, name) < least:
                    raise ConfigError(f"{name}: expected at least {least}, got {getattr(self, name)}")
            for name in ("decay_range", "dt_range"):
                low, high = getattr(self, name)
                if not 0 < low < high:
                    raise ConfigError(f"{name}: expected 0 < low < high, got {(low, high)}")
            rotated_channels(self.head_dim, self.rope_fraction)

        @property
        def inner(self) -> int:
            """Channels of all heads together."""
            return self.heads * self.head_dim

        def build(self, width: int) -> TransMamba:
            return TransMamba(self, width)

        def num_parameters(self, width: int) -> int:
            matrices = width * (5 * self.inner + self.heads)  # qkv_proj, z_proj, o_proj, dt_proj
            return matrices + 3 * self.inner * (self.conv_size + self.conv_bias) + 3 * self.heads + self.inner

        def flops_per_token(self, width: int, length: int) -> int:
            attending = min(self.transpoint, length)
            scores_and_reads = 2 * self.inner * mean_context(attending, None) * attending / max(length, 1)
            write_and_read = 2 * self.inner * self.head_dim
            return int(2 * (self.num_parameters(width) + scores_and_reads + write_and_read))

        def state_bytes(self, width: int, length: int, itemsize: int = 4) -> int:
            slots = self.transpoint if length < self.transpoint else 0
            memory = 8 + 4 * self.inner * self.head_dim
            return memory + itemsize * self.inner * (3 * (self.conv_size - 1) + 2 * slots)

        def saved_channels(self, width: int) -> int:
            # The convolution's input and output, turned q and k, dt x, the two outputs, z, gated, normed; a memory in some chunks.
            return 14 * self.inner + self.inner * self.head_dim // 64

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        self.config = config
        self.qkv_proj = nn.Linear(width, 3 * config.inner, bias=False)
        self.z_proj = nn.Linear(width, config.inner, bias=False)
        self.dt_proj = nn.Linear(width, config.heads, bias=False)
        self.conv = ShortConv(3 * config.inner, config.conv_size, "silu", bias=config.conv_bias)
        self.A_log = nn.Parameter(torch.empty(config.heads, dtype=torch.float32))
        self.dt_bias = nn.Parameter(torch.empty(config.heads, dtype=torch.float32))
        self.D = nn.Parameter(torch.ones(config.heads))
        for parameter in (self.A_log, self.dt_bias, self.D):
            parameter._no_weight_decay = True  # type: ignore[attr-defined]
        self.norm = RMSNorm(config.inner, config.norm_eps)
        self.o_proj = nn.Linear(config.inner, width, bias=False)
        self.rotary = Rotary(config.head_dim, config.rope_base, config.rope_fraction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Mamba2's initialisation: PyTorch's for matrices and convolution, uniform decay rates, log-uniform time steps, D = 1."""
        draw_rate(self.A_log, *self.config.decay_range)
        draw_time_step(self.dt_bias, *self.config.dt_range)
        nn.init.ones_(self.D)

    @property
    def stacked_rows(self) -> dict[str, tuple[int, ...]]:
        return {"qkv_proj": (self.o_proj.in_features,) * 3}

    def init_state(self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> MixerState:
        c, weight = self.config, self.qkv_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        tensors = {name: torch.zeros(batch, c.transpoint, c.heads, c.head_dim, device=device, dtype=dtype) for name in ("keys", "values")}
        tensors["memory"] = torch.zeros(batch, c.heads, c.head_dim, c.head_dim, device=device, dtype=accumulate_dtype(dtype))
        tensors["conv"] = torch.zeros(batch, c.conv_size - 1, 3 * c.inner, device=device, dtype=dtype)
        tensors["seen"] = torch.zeros(batch, device=device, dtype=torch.int64)
        state = SwitchingState(tensors)
        _drop_cache(state, c.transpoint)
        return state

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
        assert state is None or isinstance(state, SwitchingState)
        positions = token_positions(x, None if state is None else state["seen"], packing, mask)
        p, conv = self._project(x, state, packing, mask)
        ragged = packing is not None or mask is not None or (state is not None and state.shortest != state.longest)
        if ragged:
            o, state = self._everywhere(p, self.z_proj(x), positions, state, packing, mask)
        else:
            o, state = self._one_after_the_other(p, x, positions, state)
        if state is not None:
            state = state if conv is None else _same_kind(state.update(conv=conv))
            _drop_cache(state, self.config.transpoint)
        return self.o_proj(o), state

    def _project(
        self, x: Tensor, state: MixerState | None, packing: Packing | None, mask: Tensor | None
    ) -> tuple[Projections, Tensor | None]:
        """The projections and the convolution's new state, None when that was updated in place."""
        qkv, dt, conv = self.qkv_proj(x), self.dt_proj(x), None
        if mask is not None:
            # Padding must write nothing and forget nothing: zero inputs to the convolution, a time step of zero.
            hidden = ~mask.unsqueeze(-1)
            qkv, dt = qkv.masked_fill(hidden, 0), dt.masked_fill(hidden, -math.inf)
        if state is not None and x.shape[1] == 1 and not torch.is_grad_enabled():
            qkv = self.conv.step(qkv, state["conv"], mask)
        else:
            qkv, conv = self.conv(qkv, state=None if state is None else state["conv"], packing=packing, mask=mask)
        q, k, v = qkv.unflatten(-1, (3, self.config.heads, self.config.head_dim)).unbind(2)
        dt = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias, threshold=LINEAR)
        return Projections(q, k, v, dt, -self.A_log.exp() * dt), conv

    def _one_after_the_other(
        self, p: Projections, x: Tensor, positions: Tensor, state: SwitchingState | None
    ) -> tuple[Tensor, SwitchingState | None]:
        """Sequences that are all equally long: attention for the tokens before the transpoint, the converter, Mamba2 for the rest."""
        length, before = x.shape[1], 0 if state is None else state.longest
        attending = min(max(self.config.transpoint - before, 0), length)
        first, rest = p.part(slice(0, attending)), p.part(slice(attending, length))
        memory = None if state is None else state["memory"]
        outputs = []
        if attending:
            q, k = self.rotary(positions[..., :attending], first.q, first.k)
            keys, values = k, first.v
            if state is not None:
                state = _same_kind(remember(state, k, first.v, None))
                keys, values = (state[name][:, : before + attending].to(q.dtype) for name in ("keys", "values"))
            outputs.append(causal_attention(q, keys, values).flatten(2))
            if state is not None or attending < length:
                memory = convert(first.k, first.written, first.g, memory)
        if attending < length or not outputs:
            o, memory = self._remembered(rest, self.z_proj(x[:, attending:]), memory, None)
            outputs.append(o)
        if state is not None:
            changes = {} if memory is None or memory is state["memory"] else {"memory": memory}
            state = _same_kind(state.update(seen=state["seen"] + (length - attending), **changes))
            state.shortest = state.longest = before + length
        return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0], state

    def _everywhere(
        self,
        p: Projections,
        z: Tensor,
        positions: Tensor,
        state: SwitchingState | None,
        packing: Packing | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, SwitchingState | None]:
        """Documents and sequences that switch at different tokens: both readings of all tokens, and of each token the one that counts."""
        transpoint, memory = self.config.transpoint, None if state is None else state["memory"]
        o, memory = self._remembered(p, z, memory, packing)
        pads = None if mask is None else (~mask).sum(1)
        if transpoint and (state is None or state["keys"].shape[1]):
            # A window of `transpoint` changes nothing for the tokens that count, and keeps the others cheap.
            q, k = self.rotary(positions, p.q, p.k)
            start, keys, values = pads, k, p.v
            if state is not None:
                seen, past = state["seen"].clone(), transpoint - 1
                keys, values = (cache.lined_up(state[n], seen, new, past, pads) for n, new in (("keys", k), ("values", p.v)))
                start = cache.line_start(seen, past, pads)
                state = _same_kind(remember(state, k, p.v, pads))
            attended = causal_attention(q, keys, values, window=transpoint, start=start, packing=packing).flatten(2)
            o = torch.where((positions < transpoint).unsqueeze(-1), attended, o)
        elif state is not None:
            state = _same_kind(state.update(seen=state["seen"] + (p.q.shape[1] if pads is None else p.q.shape[1] - pads)))
        if state is not None:
            state = state if memory is state["memory"] else _same_kind(state.update(memory=memory))
            state.shortest, state.longest = int(state["seen"].min()), int(state["seen"].max())
        return o, state

    def _remembered(self, p: Projections, z: Tensor, memory: Tensor | None, packing: Packing | None) -> tuple[Tensor, Tensor]:
        """The Mamba2 reading `[B, T, inner]` and the memory after it; that of a single token without gradients is updated in place."""
        if memory is not None and p.q.shape[1] == 1 and not torch.is_grad_enabled():
            after, o = memory, linear_attention_step(p.q, p.k, p.written, p.g, memory, scale=1.0)
        else:
            o, after = linear_attention(p.q, p.k, p.written, p.g, scale=1.0, initial_state=memory, packing=packing)
        o = o + (self.D.unsqueeze(-1) * p.v).to(o.dtype)
        return self.norm(o.flatten(2) * F.silu(z)), after


def convert(k: Tensor, written: Tensor, g: Tensor, memory: Tensor | None = None) -> Tensor:
    """The memory converter: what Mamba2 remembers after some tokens, in parallel.

        h_P = exp(sum_j g_j) h_0 + sum_t exp(sum_{j > t} g_j) k_t (dt_t x_t)^T

    Args:
        k: keys `[B, T, H, K]`, not turned by a rotary embedding.
        written: dt x, `[B, T, H, V]`.
        g: log decay `[B, T, H]`.
        memory: h_0 `[B, H, K, V]`; None is zero.

    Returns:
        h_P `[B, H, K, V]` in float32 (float64 with float64 inputs).
    """
    wide = accumulate_dtype(k.dtype)
    behind = g.to(wide).flip(1).cumsum(1).flip(1)  # sums from the end: exact where they are small, and those that are large vanish
    after = torch.cat([behind[:, 1:], torch.zeros_like(behind[:, :1])], dim=1)
    with torch.autocast(k.device.type, enabled=False):
        added = torch.einsum("bthk,bthv->bhkv", k.to(wide) * after.exp().unsqueeze(-1), written.to(wide))
    return added if memory is None else added + behind[:, 0].exp()[..., None, None] * memory


def schedule(transpoints: Sequence[int], config: TransMamba.Config | None = None) -> tuple[TransMamba.Config, ...]:
    """A pattern of layers for `LM.Config`: layer l switches at `transpoints[l mod len(transpoints)]`."""
    base = config or TransMamba.Config()
    return tuple(base.with_(transpoint=transpoint) for transpoint in transpoints)


PUBLISHED_SCHEDULE = (0, 128, 256, 512, 1024, 2048, 4096, 8192)
"""The paper's best (V9), for texts of 8192 tokens."""


def _same_kind(state: MixerState) -> SwitchingState:
    assert isinstance(state, SwitchingState)
    return state


def _drop_cache(state: MixerState, transpoint: int) -> None:
    """Let go of keys and values when no sequence attends any more."""
    if _same_kind(state).shortest >= transpoint and state["keys"].shape[1]:
        for name in ("keys", "values"):
            state.tensors[name] = state[name].new_zeros(state[name].shape[0], 0, *state[name].shape[2:])
