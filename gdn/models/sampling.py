"""Generating tokens one at a time from a state of fixed size: memory does not grow with the text."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gdn.core.config import Config
from gdn.core.errors import ArgumentError, ConfigError
from gdn.models.lm import LM, LMState

PREFILL = 2048
"""Tokens of a prompt that are read at once."""


class Sampling(Config):
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Draw from the smallest set of tokens with at least this probability in all."""
    top_k: int = 0
    """Draw from this many of the likeliest tokens; 0 is no limit."""
    seed: int = 0
    """Seed of the draws."""

    def check(self) -> None:
        if self.temperature < 0:
            raise ConfigError(f"temperature: expected 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: expected above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k: expected 0 or more, got {self.top_k}")


@torch.no_grad()
def generate(model: LM, prompt: Tensor, sampling: Sampling | None = None, *, state: LMState | None = None) -> Iterator[Tensor]:
    """Yield next tokens int64 `[B]` for ever, each drawn after the ones before it.

    Args:
        prompt: int64 `[B, T]`, T at least 1; read in pieces, so that a long prompt needs no more memory than a short one. Of a state with
            pending tokens it begins with those (`resume`).
        state: continue from here; updated in place.
    """
    if prompt.ndim != 2 or prompt.shape[1] < 1:
        raise ArgumentError(f"prompt: expected [B, T] with at least one token, got {list(prompt.shape)}")
    sampling = sampling or Sampling()
    state = state or model.init_state(prompt.shape[0])
    random = torch.Generator(device=prompt.device).manual_seed(sampling.seed)
    logits = prefill(model, prompt, state)
    while True:
        token = draw(logits, sampling, random)
        yield token
        logits = prefill(model, token.unsqueeze(1), state)


@torch.no_grad()
def resume(model: LM, prompt: Tensor, state: LMState | None = None) -> tuple[Tensor, LMState]:
    """Read a prompt `[B, T]` but for its last token, and give that token and the state, which can be saved and gone on from.

    The state's pending tokens come before the prompt; the last token becomes pending. Going on from a saved state gives the tokens that
    going on here gives, because both read the same tokens in the same pieces.
    """
    state = state or model.init_state(prompt.shape[0])
    if state.pending is not None:
        prompt = torch.cat([state.pending.expand(prompt.shape[0], -1), prompt], dim=1)
    if prompt.shape[1] < 1:
        raise ArgumentError("prompt: expected at least one token, or a state with a pending one")
    state.pending = None
    if prompt.shape[1] > 1:
        read(model, prompt[:, :-1], state)
    state.pending = prompt[:, -1:]
    return state.pending, state


@torch.no_grad()
def prefill(model: LM, prompt: Tensor, state: LMState, mask: Tensor | None = None) -> Tensor:
    """Read a prompt `[B, T]` into the state in pieces; logits `[B, vocab]` after its last token. `mask` is False at padding on the left."""
    last = read(model, prompt, state, mask)[:, -1]
    return torch.nn.functional.linear(last, model.head_weight.to(last.dtype))


@torch.no_grad()
def read(model: LM, tokens: Tensor, state: LMState, mask: Tensor | None = None) -> Tensor:
    """Read tokens `[B, T]` into the state in pieces; the hidden states `[B, t, width]` of the last piece."""
    x = model.embedding.weight.new_empty(tokens.shape[0], 0, model.config.width)
    for begin in range(0, tokens.shape[1], PREFILL):
        piece = slice(begin, begin + PREFILL)
        x, after = model.hidden(tokens[:, piece], state=state, mask=None if mask is None else mask[:, piece])
        assert after is not None
        state.length, state.pending = after.length, None
    return x


def draw(logits: Tensor, sampling: Sampling, random: torch.Generator) -> Tensor:
    """One token for each row of `logits [B, vocab]`, int64 `[B]`."""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits / sampling.temperature).softmax(-1)
    if sampling.top_k:
        least = probabilities.topk(min(sampling.top_k, logits.shape[-1])).values[:, -1:]
        probabilities = probabilities.where(probabilities >= least, 0)
    if sampling.top_p < 1:
        ordered, places = probabilities.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.where(before < sampling.top_p * ordered.sum(-1, keepdim=True), 0)
        probabilities = torch.zeros_like(probabilities).scatter_(-1, places, kept)
    return torch.multinomial(probabilities, 1, generator=random).squeeze(1)
