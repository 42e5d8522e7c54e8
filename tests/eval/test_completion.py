"""Completions of many prompts at once against each prompt by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from text_models import PATTERNS, WORDS, model, tokenizer

from gdn.core.errors import ArgumentError
from gdn.data.tokenizer import Tokenizer
from gdn.eval import completion
from gdn.eval.completion import complete
from gdn.models.lm import LM
from gdn.models.sampling import Sampling

PROMPTS = ["one", "one two three four five", "six", "and so it goes on", "t"]


def directly(lm: LM, text: Tokenizer, prompt: list[int], tokens: int) -> str:
    """Greedy, the whole text read anew for each token."""
    found: list[int] = []
    with torch.no_grad():
        while len(found) < tokens:
            found.append(int(lm(torch.tensor([prompt + found])).logits[0, -1].argmax()))
            if found[-1] == text.end_id:
                break
    return text.decode(found)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_each_prompt_is_completed_as_if_alone(tmp_path: Path, pattern: str, kind: str) -> None:
    text = tokenizer(kind, tmp_path)
    lm = model(pattern, text.vocab_size).double()
    prompts = [text.encode(p).tolist() for p in PROMPTS]
    whole = [directly(lm, text, p, 12) for p in prompts]
    assert complete(lm, text, prompts, tokens=12, batch=3) == whole
    stops = [w[4:6] for w in whole if len(w) > 6] + [""]
    cut = [min((w[: w.index(s)] for s in stops if s and s in w), key=len, default=w) for w in whole]
    assert any(c != w for c, w in zip(cut, whole))
    assert complete(lm, text, prompts, until=stops, tokens=12, batch=3) == cut


def test_nothing_is_read_after_a_stop_that_spans_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tokenizer("bytes", tmp_path)
    lm = model(vocab=text.vocab_size, seed=3).double()
    whole, steps = directly(lm, text, list(b"one"), 12), []
    assert len(set(whole)) > 3
    prefill = completion.prefill
    monkeypatch.setattr(completion, "prefill", lambda *given: steps.append(1) or prefill(*given))
    assert complete(lm, text, [list(b"one")], until=[whole[2:5]], tokens=12) == [whole[:2]]
    assert len(steps) == 5


def test_the_end_of_a_document_ends_a_completion(tmp_path: Path) -> None:
    text = tokenizer("bytes", tmp_path)
    lm = model(vocab=text.vocab_size).double()
    prompts = [text.encode(WORDS[i : i + 9]).tolist() for i in range(0, 60, 3)]
    with torch.no_grad():  # the end wins after some prompts, not after others
        scores = [lm(torch.tensor([p])).logits[0, -1] for p in prompts]
        lift = sum(sorted(float(s.max() - s[text.end_id]) for s in scores)[9:11]) / 2
        lm.head.weight[text.end_id] += lift * torch.linalg.lstsq(
            torch.stack([lm.hidden(torch.tensor([p]))[0][0, -1] for p in prompts]), torch.ones(20, 1, dtype=torch.float64)
        ).solution.squeeze(1)
    found, whole = complete(lm, text, prompts, tokens=4), [directly(lm, text, p, 4) for p in prompts]
    assert found == whole
    assert 0 < sum(not f for f in found) < 20


def test_draws_depend_on_the_seed(tmp_path: Path) -> None:
    text = tokenizer("bytes", tmp_path)
    lm, prompts = model(vocab=text.vocab_size), [[1, 2], [1, 2], [3]]
    drawn = [complete(lm, text, prompts, tokens=20, sampling=Sampling(temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    text = tokenizer("bytes", tmp_path)
    with pytest.raises(ArgumentError, match="prompts: expected at least one token"):
        complete(model(), text, [[]])
    with pytest.raises(ArgumentError, match="tokens: expected at least 1, got 0"):
        complete(model(), text, [[1]], tokens=0)
