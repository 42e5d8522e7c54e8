"""How likely a model finds continuations of given texts: what multiple-choice tasks and perplexities of documents are made of.

A context that several continuations share is read once, and each continuation starts from a copy of the state after it. Long texts are read
in pieces through the state, so that a document of any length costs one pass and constant memory, and every token is predicted from all
tokens before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.errors import ArgumentError
from gdn.eval.perplexity import evaluating
from gdn.models.lm import LM, LMState
from gdn.models.sampling import PREFILL, read

LOGITS = 1 << 26
"""Most logits that are held at once."""

Tokens = Sequence[int]
Item = TypeVar("Item")


@dataclass(frozen=True)
class Score:
    """How a model finds one continuation."""

    loglikelihood: float
    """Sum of the log-probabilities of its tokens, nats."""
    greedy: bool
    """Whether each of its tokens is the likeliest one."""


@torch.no_grad()
def score(model: LM, texts: Sequence[tuple[Tokens, Tokens]], *, batch: int = 16) -> list[Score]:
    """The score of each pair (context, continuation), in order.

    Args:
        model: read in evaluation mode.
        texts: a context has at least one token; an empty continuation is certain.
        batch: texts that are read together, of similar lengths.
    """
    if batch < 1:
        raise ArgumentError(f"batch: expected at least 1, got {batch}")
    places = defaultdict(list)
    for place, (context, _) in enumerate(texts):
        if len(context) < 1:
            raise ArgumentError(f"texts[{place}]: expected a context of at least one token")
        places[tuple(context)].append(place)
    scores = [Score(0.0, True)] * len(texts)
    contexts = sorted(places, key=lambda context: (-len(context), context))
    with evaluating(model):
        for some in in_parts(contexts, batch):
            state = read_contexts(model, [context[:-1] for context in some])
            wanted = [(row, place) for row, context in enumerate(some) for place in places[context]]
            wanted.sort(key=lambda each: -len(texts[each[1]][1]))
            for part in in_parts(wanted, batch):
                rows = torch.tensor([row for row, _ in part])
                pairs = [(some[row][-1], texts[place][1]) for row, place in part]
                for (_, place), found in zip(part, _score_from(model, state.select(rows), pairs), strict=True):
                    scores[place] = found
    return scores


def read_contexts(model: LM, contexts: Sequence[Tokens]) -> LMState:
    """The state after each of some contexts, which may be empty."""
    state, (tokens, mask) = model.init_state(len(contexts)), padded_left(contexts, model.embedding.weight.device)
    read(model, tokens, state, mask)
    return state


def padded_left(texts: Sequence[Tokens], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Texts as `[B, T]` with padding on the left, and the mask that is False there; None if there is no padding."""
    longest = max(map(len, texts))
    tokens = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts], dtype=torch.int64)
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(longest) >= longest - lengths.unsqueeze(1)
    return tokens.to(device), None if bool(mask.all()) else mask.to(device)


def _score_from(model: LM, state: LMState, pairs: Sequence[tuple[int, Tokens]]) -> Iterator[Score]:
    """Scores of (last token of the context, continuation) from the states before that token."""
    device, longest = model.embedding.weight.device, max(len(continuation) for _, continuation in pairs)
    tokens, targets = torch.zeros(len(pairs), longest, dtype=torch.int64), torch.full((len(pairs), longest), -1)
    for row, (last, continuation) in enumerate(pairs):  # padding on the right changes nothing before it
        targets[row, : len(continuation)] = torch.tensor(continuation, dtype=torch.int64)
        tokens[row, : len(continuation)] = torch.tensor([last, *continuation], dtype=torch.int64)[:-1]
    sums, wrong = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.int64)
    for piece, wanted in zip(tokens.split(PREFILL, dim=1), targets.split(PREFILL, dim=1)):
        hidden, at = read(model, piece.to(device), state), wanted >= 0
        found, likeliest = _log_probabilities(model, hidden[at.to(device)], wanted[at].to(device))
        rows = at.nonzero()[:, 0]
        sums.index_add_(0, rows, found)
        wrong.index_add_(0, rows, (likeliest != wanted[at]).long())
    return (Score(float(total), not mistakes) for total, mistakes in zip(sums, wrong))


def _log_probabilities(model: LM, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of hidden states `[n, width]`: the log-probability of each target in float64, and the likeliest token, both on the host."""
    weight = model.head_weight.to(hidden.dtype)
    found, likeliest = [torch.zeros(0, dtype=torch.float64)], [torch.zeros(0, dtype=torch.int64)]
    rows = max(1, LOGITS // weight.shape[0])
    for x, target in zip(hidden.split(rows), targets.split(rows)):
        logits = F.linear(x, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chosen = logits.gather(1, target.unsqueeze(1)).squeeze(1)
        found.append((chosen - logits.logsumexp(1)).double().cpu())
        likeliest.append(logits.argmax(1).cpu())
    return torch.cat(found), torch.cat(likeliest)


def in_parts(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """Consecutive parts of at most `size`."""
    return (items[begin : begin + size] for begin in range(0, len(items), size))
