"""Many prompts completed at once, each until it says stop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gdn.core.errors import ArgumentError
from gdn.eval.perplexity import evaluating
from gdn.eval.scoring import Tokens, in_parts, padded_left
from gdn.models.lm import LM
from gdn.models.sampling import Sampling, draw, prefill


@torch.no_grad()
def complete(
    model: LM,
    tokenizer: Any,
    prompts: Sequence[Tokens],
    *,
    until: Sequence[str] = (),
    tokens: int = 256,
    sampling: Sampling | None = None,
    batch: int = 16,
) -> list[str]:
    """The text that follows each prompt, up to the first of the stop texts or the end of the document, without either.

    Args:
        model: read in evaluation mode.
        tokenizer: of the model.
        prompts: each at least one token.
        until: texts that end a completion; an empty one never does.
        tokens: at most so many for each prompt.
        sampling: how tokens are drawn; the likeliest ones by default.
        batch: prompts that are completed together, of similar lengths.
    """
    for name, value in (("tokens", tokens), ("batch", batch)):
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
    if any(len(prompt) < 1 for prompt in prompts):
        raise ArgumentError("prompts: expected at least one token in each")
    stops, sampling = [text for text in until if text], sampling or Sampling(temperature=0)
    random = torch.Generator(device=model.embedding.weight.device).manual_seed(sampling.seed)
    texts = [""] * len(prompts)
    with evaluating(model):
        for places in in_parts(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])), batch):
            rows = [_Row(tokenizer, stops) for _ in places]
            _run(model, [prompts[i] for i in places], rows, tokens, sampling, random)
            for place, row in zip(places, rows):
                texts[place] = row.text()
    return texts


def _run(model: LM, prompts: Sequence[Tokens], rows: list[_Row], tokens: int, sampling: Sampling, random: torch.Generator) -> None:
    """Draw tokens for every row, without those that have stopped."""
    prompt, mask = padded_left(prompts, model.embedding.weight.device)
    state = model.init_state(len(rows))
    logits = prefill(model, prompt, state, mask)
    for count in range(tokens):
        drawn = draw(logits, sampling, random)
        going = [i for i, (row, token) in enumerate(zip(rows, drawn.tolist())) if not row.stopped_by(token)]
        if not going or count == tokens - 1:
            return
        if len(going) < len(rows):
            kept = torch.tensor(going, device=drawn.device)
            rows, drawn, state = [rows[i] for i in going], drawn[kept], state.select(kept)
        logits = prefill(model, drawn.unsqueeze(1), state)


class _Row:
    """The completion of one prompt as it grows."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, stops
        self._tokens: list[int] = []
        self._stream = tokenizer.stream()
        self._tail = ""
        self._reach = max(map(len, stops), default=1) - 1

    def stopped_by(self, token: int) -> bool:
        """Take one more token, and say whether the completion ends with it."""
        if token == self._tokenizer.end_id:
            return True
        self._tokens.append(token)
        self._tail += self._stream(token)
        if any(stop in self._tail for stop in self._stops):
            return True
        self._tail = self._tail[len(self._tail) - self._reach :] if self._reach else ""
        return False

    def text(self) -> str:
        text = self._tokenizer.decode(self._tokens)
        return text[: min((text.index(stop) for stop in self._stops if stop in text), default=len(text))]
