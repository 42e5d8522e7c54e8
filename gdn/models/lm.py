"""The language model: embedding, blocks by pattern, norm, head. It knows no mixer by name."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.utils._pytree import register_dataclass
from torch.utils.checkpoint import checkpoint

from gdn.core import checks
from gdn.core.config import Config as BaseConfig
from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer, MixerConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.block import Block
from gdn.models.start import Start
from gdn.models.state import LMState
from gdn.nn import RMSNorm
from gdn.nn.linear import is_hooked
from gdn.nn.norm import add_and_norm
from gdn.ops import linear_cross_entropy


@dataclass(frozen=True)
class LMOutput:
    """What a forward pass gives: a loss with targets, logits without."""

    loss: Tensor | None = None
    """Mean cross-entropy over the valid targets, nats per token, float32."""
    logits: Tensor | None = None
    """`[B, T, vocab]`."""
    state: LMState | None = None
    """The state after the last token, when one was given."""


# Else FSDP finds no tensor in it before torch 2.13, and where the model is one part it never sums gradients.
register_dataclass(LMOutput, serialized_type_name="gdn.models.lm.LMOutput")


class LM(nn.Module):
    """A causal language model.

    Example:
        >>> model = LM(LM.Config(vocab=256, width=64, layers=2, mlp=128, pattern=(GatedDeltaNet.Config(heads=2, head_dim=16),)))
        >>> tokens = torch.zeros(1, 8, dtype=torch.int64)
        >>> model(tokens).logits.shape
        torch.Size([1, 8, 256])
    """

    class Config(BaseConfig):
        vocab: int
        """Size of the vocabulary."""
        width: int
        """Channels of the residual stream."""
        layers: int
        """Number of blocks."""
        mlp: int
        """Inner width of each block's SwiGLU; 0 for blocks without one."""
        pattern: tuple[MixerConfig, ...] = (GatedDeltaNet.Config(),)
        """The mixers of the blocks, repeated in order until there are `layers` of them."""
        norm_eps: float = 1e-5
        """Epsilon of the block norms."""
        norm_offset: float = 0.0
        """Added to the weights of the block norms: 1 for checkpoints that store them around zero, as Qwen3-Next and Qwen3.5 do."""
        norm_after: tuple[str, ...] = ()
        """Types of mixers whose blocks norm what mixer and MLP give instead of what they get, as OLMo's attention blocks do."""
        tie_embeddings: bool = True
        """Use the embedding matrix as the head."""

        def check(self) -> None:
            for name in ("vocab", "width", "layers"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}: expected at least 1, got {getattr(self, name)}")
            if self.mlp < 0:
                raise ConfigError(f"mlp: expected 0 or more, got {self.mlp}")
            if not self.pattern:
                raise ConfigError("pattern: expected at least one mixer")
            absent = set(self.norm_after) - {m.tag() for m in self.pattern}
            if absent:
                raise ConfigError(f"norm_after: expected mixers of the pattern, got {', '.join(sorted(absent))}")

        @property
        def mixers(self) -> list[MixerConfig]:
            """The mixer of each block."""
            return [self.pattern[i % len(self.pattern)] for i in range(self.layers)]

        def num_parameters(self, *, embeddings: bool = True) -> int:
            """Exact number of parameters, with or without embedding and head."""
            blocks = sum(m.num_parameters(self.width) for m in self.mixers)
            blocks += self.layers * (self.width + (3 * self.width * self.mlp + self.width if self.mlp else 0)) + self.width
            return blocks + self.vocab * self.width * (2 - self.tie_embeddings) * embeddings

        def flops_per_token(self, length: int) -> int:
            """Floating-point operations of a forward pass per token at context `length`; a training step takes three times as many."""
            mixers = sum(m.flops_per_token(self.width, length) for m in self.mixers)
            return mixers + 2 * (3 * self.width * self.mlp * self.layers + self.vocab * self.width)

        def state_bytes(self, length: int, itemsize: int = 4) -> int:
            """Bytes of state per sequence after `length` tokens."""
            return sum(m.state_bytes(self.width, length, itemsize) for m in self.mixers)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab, config.width)
        self.blocks = nn.ModuleList(
            Block(m, config.width, config.mlp, config.norm_eps, norm_offset=config.norm_offset, norm_after=m.tag() in config.norm_after)
            for m in config.mixers
        )
        mixers = [block.mixer for block in self._blocks()]
        for mixer in mixers:
            mixer.join(mixers)
        self.norm = RMSNorm(config.width, config.norm_eps, config.norm_offset)
        if not config.tie_embeddings:
            self.head = nn.Linear(config.width, config.vocab, bias=False)
        self.recompute: Literal["none", "block"] = "none"
        """"block" keeps only each block's input for the backward pass and computes the rest again."""
        self.start: Start | None = None
        """The memories that every text begins with, where they were tuned (`gdn.models.start`)."""
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The official initialisation on top of each module's own: embeddings and an untied head N(0, 0.02^2), the output matrices of MLPs
        and of attention divided by sqrt(2 layers)."""
        nn.init.normal_(self.embedding.weight, std=0.02)
        if not self.config.tie_embeddings:
            nn.init.normal_(self.head.weight, std=0.02)
        for block in self._blocks():
            outputs = (block.mlp.down.weight,) if block.has_mlp else ()
            for weight in (*outputs, *block.mixer.scaled_by_depth()):
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
                with torch.no_grad():
                    weight.div_(math.sqrt(2 * self.config.layers))

    @property
    def head_weight(self) -> Tensor:
        """`[vocab, width]`: the matrix that turns hidden states into logits."""
        return self.embedding.weight if self.config.tie_embeddings else self.head.weight

    def init_state(
        self, batch: int, *, room: int | None = None, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> LMState:
        """An empty decoding state for `batch` sequences. With `room` for so many tokens a step changes nothing but tensors in place, and
        can be captured as a CUDA graph."""
        dtype = dtype or self.embedding.weight.dtype  # of the activations; a quantised projection's weight may be of bytes
        if room is None:
            layers = [mixer.init_state(batch, device=device, dtype=dtype) for mixer in self.mixers()]
        else:
            layers = [mixer.fixed_state(batch, room, device=device, dtype=dtype) for mixer in self.mixers()]
        state = LMState(layers, model=self)
        return state if self.start is None else self.start.fill(state)

    def hidden(
        self,
        tokens: Tensor,
        *,
        packing: Packing | None = None,
        state: LMState | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, LMState | None]:
        """The normed output of the last block, `[B, T, width]`, and the state. Arguments as in `forward`."""
        if tokens.ndim != 2 and not (tokens.ndim == 3 and tokens.is_floating_point()):
            raise ArgumentError(f"tokens: expected [B, T], got {list(tokens.shape)}")
        checks.padding(mask, *tokens.shape[:2])
        if state is not None and state.pending is not None:
            state.take_pending(tokens)
        x = self.embedding(tokens) if tokens.ndim == 2 else tokens
        wanted = state is not None
        if self.start is not None and state is None:
            if packing is not None:
                raise ArgumentError("packing: documents of a packed batch begin empty, but this model has a first memory (start)")
            state = self.init_state(x.shape[0], device=x.device)
        layers, added = [], None
        for i, block in enumerate(self._blocks()):
            layer = None if state is None else state.layers[i]
            again = self.recompute == "block" and state is None and torch.is_grad_enabled()
            if again or is_hooked(block):
                x, added = x if added is None else x + added, None
            if again:
                x = checkpoint(_without_state, block, x, packing, mask, use_reentrant=False)
            elif is_hooked(block):
                x, layer = block(x, layer, packing, mask)
            else:  # its last addition is left to the norm that follows
                x, added, layer = block.terms(x, added, layer, packing, mask)
            layers.append(layer)
        after = None if state is None or not wanted else LMState(layers, state.length + tokens.shape[1], self)
        if after is not None and state is not None and not is_compiling() and all(map(operator.is_, layers, state.layers)):
            state.length = after.length  # the same memories, whichever of the two is held
        return add_and_norm(self.norm, x, added)[0], after

    def forward(
        self,
        tokens: Tensor,
        *,
        targets: Tensor | None = None,
        packing: Packing | None = None,
        state: LMState | None = None,
        mask: Tensor | None = None,
    ) -> LMOutput:
        """
        Args:
            tokens: int64 `[B, T]`, or embeddings `[B, T, width]`.
            targets: int64 `[B, T]`, the token to predict at each place, -100 where there is none. Gives a loss and no logits.
            packing: boundaries of packed documents.
            state: continue from here (`init_state`). Where no gradient flows it is updated in place: to ask one document twice give `fork`s
                of its state. Tokens begin with those that it has still to read, if any.
            mask: bool `[B, T]`, False at padding on the left.
        """
        x, state = self.hidden(tokens, packing=packing, state=state, mask=mask)
        weight = self.head_weight.to(x.dtype)
        if targets is None:
            return LMOutput(logits=F.linear(x, weight), state=state)
        return LMOutput(loss=linear_cross_entropy(x, weight, targets), state=state)

    @property
    def joined(self) -> bool:
        """Whether layers know each other (`Mixer.join`), so that one block reads parameters of another."""
        return any(type(mixer).join is not Mixer.join for mixer in self.mixers())

    def compile_blocks(self) -> None:
        """Compile in place with torch.compile, one block at a time: equal blocks run what was compiled for the first of them, so that
        a deep model is traced in the time of one block. `compile()` traces all, as one graph.

        One graph it is here too where layers know each other, since then no two blocks are equal, and with several kinds of mixers, for
        the compiler keeps eight versions of a function at most: packed or not, sizes fixed or not, training or not make five of one kind.
        And where somebody listens to a part of a block, or has put another `forward` in its place: the compiler takes two blocks for equal
        without looking at that. As with `compile()`, whoever begins to listen to a part later is not heard.
        """
        heard = any(is_hooked(part) for block in self._blocks() for child in block.children() for part in child.modules())
        if len(set(self.config.mixers)) > 1 or self.joined or heard:
            self.compile()
            return
        for block in self._blocks():
            block.compiled = True

    def mixers(self) -> Iterator[Mixer]:
        """The mixer of each block."""
        for block in self._blocks():
            yield block.mixer

    def _blocks(self) -> Iterator[Block]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block


def _without_state(block: Block, x: Tensor, packing: Packing | None, mask: Tensor | None) -> Tensor:
    return block(x, None, packing, mask)[0]
