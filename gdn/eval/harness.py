"""A model of ours as lm-evaluation-harness sees it; importing this file registers it there as "gdn".

Needs the extra `eval`. The command is `gdn eval RUN --tasks ...` (`gdn.eval.tasks`); from Python also

    lm_eval.simple_evaluate(model="gdn", model_args="run=runs/demo", tasks=["lambada_openai"])

What it does as the harness's own class for Hugging Face models does: trailing spaces of a context belong to the continuation; context and
continuation are tokenised together; an empty context is the token that begins a document; with a `max_length`, contexts are cut on the left
and documents are read in windows. What it does not need: without a `max_length` nothing is cut, and a document is read once.

What a text begins with (`bos`): in training every document follows the token that ends the one before it, so that token also stands before
each context here. Checkpoints that were converted from another family begin with what their tokenizer puts there, if anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lm_eval.api.model import LM as HarnessLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gdn.core.device import named_device
from gdn.core.errors import ArgumentError
from gdn.data import load_tokenizer
from gdn.eval.completion import complete
from gdn.eval.scoring import score
from gdn.models.lm import LM
from gdn.models.sampling import Sampling
from gdn.models.store import converted_from, load_model, model_folder

Bos = Literal["auto", "yes", "no"]

TOKENS = 256
"""Tokens that are generated where a task does not say how many."""


class GdnHarness(HarnessLM):
    """A run or model folder, with the interface of lm-evaluation-harness.

    Args:
        run: a training directory or a folder with a model.
        batch_size: texts that are read together.
        device: "auto", "cpu" or "cuda".
        max_length: at most so many tokens of context at once, as for models that cannot read more; 0 is no limit.
        bos: whether each text follows the token that begins documents; "auto" does as the model was trained.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        batch_size: int | str = 16,
        device: str | None = "auto",
        max_length: int = 0,
        bos: Bos = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        folder = model_folder(run)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ArgumentError(f"batch_size: expected at least 1, got {batch_size}")
        if max_length < 0 or max_length == 1:
            raise ArgumentError(f"max_length: expected 0 (no limit) or at least 2, got {max_length}")
        self.model: LM = load_model(folder, device=named_device(device or "auto"))
        self.text = load_tokenizer(folder)
        self.batch_size, self.max_length = int(batch_size), max_length
        self.opening = _opening(self.text, bos, own=converted_from(folder) is None)
        self.first = self.opening or [self.text.end_id]
        """What an empty context is."""

    @property
    def device(self) -> torch.device:
        return self.model.embedding.weight.device

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy decoding gives it) of each (context, continuation)."""
        pairs = [self._split(*request.args) for request in requests]
        scores = score(self.model, [self._cut(*pair) for pair in pairs], batch=self.batch_size)
        answers = [(found.loglikelihood, found.greedy) for found in scores]
        return self._remember("loglikelihood", requests, answers)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each document, every token given all those before it (or those in its window)."""
        windows = [(i, pair) for i, request in enumerate(requests) for pair in self._windows(request.args[0])]
        answers = [0.0] * len(requests)
        for (i, _), found in zip(windows, score(self.model, [pair for _, pair in windows], batch=self.batch_size), strict=True):
            answers[i] += found.loglikelihood
        return self._remember("loglikelihood_rolling", requests, answers)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What follows each context, up to the stop texts that its task names."""
        groups: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            groups[repr(sorted(request.args[1].items()))].append(i)
        answers = [""] * len(requests)
        for places in groups.values():
            until, tokens, sampling = _how(requests[places[0]].args[1])
            room = self.max_length - tokens
            if self.max_length and room < 1:
                raise ArgumentError(f"max_length: expected more than the {tokens} tokens to generate, got {self.max_length}")
            prompts = [(self.opening + self._encode(requests[i].args[0]) or self.first)[-room if self.max_length else 0 :] for i in places]
            texts = complete(self.model, self.text, prompts, until=until, tokens=tokens, sampling=sampling, batch=self.batch_size)
            for place, text in zip(places, texts, strict=True):
                answers[place] = text
        return self._remember("generate_until", requests, answers)

    def _encode(self, text: str) -> list[int]:
        return self.text.encode(text).tolist()

    def _split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of both, as they are in the whole text."""
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        before = self._encode(context)
        after = self._encode(context + continuation)[len(before) :]
        if continuation and not after:  # its first characters went into a token of the context
            after = self._encode(continuation)
        return self.opening + before or self.first, after

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """With a limit, as much of the context's end as fits: the last token of the continuation is not read."""
        if not self.max_length:
            return context, continuation
        if len(continuation) > self.max_length:
            raise ArgumentError(f"max_length: expected at least {len(continuation)}, the tokens of a continuation, got {self.max_length}")
        return context[-max(1, self.max_length + 1 - len(continuation)) :], continuation

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        tokens = self._encode(text)
        if not self.max_length:
            return [(self.first, tokens)]
        windows = get_rolling_token_windows(tokens, prefix_token=self.first[-1], max_seq_len=self.max_length, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def _remember(self, kind: str, requests: Sequence[Any], answers: list[Any]) -> list[Any]:
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial(kind, request.args, answer)
        return answers


register_model("gdn")(GdnHarness)


def _opening(tokenizer: Any, bos: Bos, *, own: bool) -> list[int]:
    """The tokens before each text."""
    if bos not in ("auto", "yes", "no"):
        raise ArgumentError(f'bos: expected "auto", "yes" or "no", got {bos!r}')
    given = list(tokenizer.begin_ids)
    if bos == "no" or (bos == "auto" and not own and not given):
        return []
    return given or [tokenizer.end_id]


def _how(arguments: dict[str, Any]) -> tuple[list[str], int, Sampling]:
    """Stop texts, number of tokens and sampling from what a task says."""
    given: dict[str, Any] = dict(normalize_gen_kwargs(arguments, TOKENS))
    until, tokens, sample = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample")
    fields: dict[str, Callable[[Any], Any]] = {"temperature": float, "top_p": float, "top_k": int}
    chosen = {name: kind(given.pop(name)) for name, kind in fields.items() if name in given}
    if given:
        raise ArgumentError(
            f"generation_kwargs: expected {', '.join(fields)}, do_sample, until, max_gen_toks; got {', '.join(sorted(given))}"
        )
    greedy = not sample or chosen.get("temperature") == 0
    return until, tokens, Sampling(temperature=0) if greedy else Sampling(**{"temperature": 1.0, "top_p": 1.0, **chosen})
