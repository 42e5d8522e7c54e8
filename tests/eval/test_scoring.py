"""Scores of continuations against the whole text read at once."""

from __future__ import annotations

import pytest
import torch
from text_models import PATTERNS, model

from gdn.core.errors import ArgumentError
from gdn.eval import scoring
from gdn.eval.scoring import score
from gdn.models import sampling
from gdn.models.lm import LM


def directly(lm: LM, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    with torch.no_grad():
        logits = lm(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    target = torch.tensor(continuation)
    return float(logits.log_softmax(-1).gather(1, target[:, None]).sum()), bool((logits.argmax(-1) == target).all())


def texts() -> list[tuple[list[int], list[int]]]:
    """Contexts of many lengths, some shared, continuations of many lengths, one of them greedy."""
    random = torch.Generator().manual_seed(0)

    def some(length: int) -> list[int]:
        return torch.randint(300, (length,), generator=random).tolist()

    contexts = [some(n) for n in (1, 2, 9, 10, 11, 40, 3, 1)]
    return [(contexts[i], some(n)) for i, n in ((0, 3), (1, 1), (5, 12), (2, 70), (2, 1), (2, 9), (3, 5), (4, 8), (6, 2), (7, 33), (0, 3))]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_scores_are_those_of_the_whole_text(pattern: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "PREFILL", 16)  # several pieces, of contexts and of continuations
    monkeypatch.setattr(scoring, "PREFILL", 16)
    monkeypatch.setattr(scoring, "LOGITS", 7 * 300)
    lm, pairs = model(pattern).double(), texts()
    with torch.no_grad():
        likeliest = int(lm(torch.tensor([pairs[2][0]])).logits[0, -1].argmax())
    pairs.append((pairs[2][0], [likeliest]))
    found = score(lm.train(), pairs, batch=batch)
    assert lm.training
    for pair, got in zip(pairs, found, strict=True):
        expected = directly(lm.eval(), *pair)
        assert got.loglikelihood == pytest.approx(expected[0], rel=1e-9)
        assert got.greedy is expected[1]
    assert found[-1].greedy and not found[0].greedy


def test_a_context_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, seen = model(), []
    read = sampling.read
    monkeypatch.setattr(scoring, "read", lambda m, tokens, *rest: seen.append(tokens.numel()) or read(m, tokens, *rest))
    score(lm, [(list(range(50)), [i]) for i in range(4)])
    assert sum(seen) == 49 + 4


def test_nothing_to_score_is_certain_and_nothing_before_is_an_error() -> None:
    assert score(model(), []) == []
    assert score(model(), [([1, 2], [])]) == [scoring.Score(0.0, True)]
    with pytest.raises(ArgumentError, match=r"texts\[1\]: expected a context"):
        score(model(), [([1], [2]), ([], [2])])
    with pytest.raises(ArgumentError, match="batch: expected at least 1, got 0"):
        score(model(), [([1], [2])], batch=0)
