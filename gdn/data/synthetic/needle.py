"""A needle in a haystack, S-NIAH-1, 2 and 3 of RULER (arXiv 2404.06654): one sentence with a magic value in a long text, then the question.

    level 1    the haystack is one group of sentences again and again, the value a number of seven digits
    level 2    the haystack is a text, the value a number
    level 3    the haystack is a text, the value a UUID (RULER's setting; the Gated DeltaNet paper calls its row "word in haystack")

`prompt` writes RULER's text, for any tokenizer. The task cuts it into words, and values into single characters, so that a small model can
learn to copy them. The target is the value; a generated value is right if all its characters are.

The haystack of levels 2 and 3 is any text (RULER: essays by Paul Graham). Without one it is drawn sentence by sentence from a small
grammar; such a text distracts less than a real one, which makes level 2 more like level 1.
"""

from __future__ import annotations

import functools
import re
import uuid
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from gdn.core.errors import ConfigError, DataError
from gdn.data.synthetic.base import Sample, Split, Task, numpy_generator, unasked

Level = Literal[1, 2, 3]

REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = 40
"""A needle stands at one of this many evenly spaced depths of a text."""
PAD, UNKNOWN = 0, 1
CHARACTERS = "0123456789abcdef-"
TRAINING_PART = 0.8
"""Part of a text that haystacks for training are cut from; those for the test are from the rest."""

ADJECTIVES, NOUNS, VERBS = (line.split() for line in Path(__file__).with_name("needle_words.txt").read_text().splitlines())


def prompt(sentences: Sequence[str], place: int, *, kind: str, key: str, value: str, separator: str = " ") -> str:
    """RULER's prompt with the needle before sentence `place`, up to and without the answer. `kind` is "numbers" or "uuids"."""
    before, needle, question = around(kind, key, value)
    haystack = separator.join([*sentences[:place], needle, *sentences[place:]])
    return f"{before}\n{haystack}\n{question}"


def around(kind: str, key: str, value: str) -> tuple[str, str, str]:
    """What stands before the haystack, the needle, and the question after it."""
    one = kind.removesuffix("s")
    return (
        f"A special magic {one} is hidden within the following text. Make sure to memorize it. I will quiz you about the {one} afterwards.",
        f"One of the special magic {kind} for {key} is: {value}.",
        f"What is the special magic {one} for {key} mentioned in the provided text? "
        f"The special magic {one} for {key} mentioned in the provided text is",
    )


def magic_value(level: Level, rng: np.random.Generator) -> str:
    """Seven digits, or a UUID of version 4, from the generator."""
    if level == 3:
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    return str(rng.integers(10**6, 10**7))


def magic_key(rng: np.random.Generator) -> str:
    """An adjective and a noun."""
    return f"{ADJECTIVES[rng.integers(len(ADJECTIVES))]}-{NOUNS[rng.integers(len(NOUNS))]}"


class Needle(Task):
    """See the module\'s docstring."""

    level: Level = 1
    """1, 2 or 3: see above."""
    length: int = 1024
    """Tokens that the prompt and the answer may have; shorter rows are padded on the right."""
    vocab: int = 2048
    """Tokens: characters of values, words of the prompt and keys, and the most frequent words of the haystack."""
    source: str = ""
    """A file with English text for levels 2 and 3. Empty: generated sentences."""

    def check(self) -> None:
        if self.level not in (1, 2, 3):
            raise ConfigError(f"level: expected 1, 2 or 3, got {self.level}")
        needed = 2 + len(CHARACTERS) + len(_fixed_words())
        if self.vocab < needed:
            raise ConfigError(f"vocab: expected at least {needed} for the words of prompts and keys, got {self.vocab}")
        if self.length < 192:
            raise ConfigError(f"length: expected at least 192, for the prompt around the haystack and the answer, got {self.length}")
        if self.source and not Path(self.source).is_file():
            raise ConfigError(f"source: expected a text file, got {self.source}")

    def draw(self, batch: int, generator: torch.Generator, split: Split) -> Sample:
        rng = numpy_generator(generator)
        tokens, targets = torch.full((batch, self.length), PAD), unasked(batch, self.length)
        for row in range(batch):
            sentences, place, words = self._place(rng, split)
            before, needle, question = (self.encode(part) for part in around(**words))
            haystack = [self._sentence(sentence) for sentence in sentences]
            haystack.insert(place, needle)
            ids, answer = [*before, *chain(*haystack), *question], self.encode(words["value"])
            read = [*ids, *answer[:-1]]
            tokens[row, : len(read)] = torch.tensor(read)
            targets[row, len(ids) - 1 : len(read)] = torch.tensor(answer)
        return Sample(tokens, targets)

    def text(self, rng: np.random.Generator, split: Split) -> tuple[str, str]:
        """A prompt whose tokens and the answer's are at most `length`, and the answer: a row of a batch, to read."""
        sentences, place, words = self._place(rng, split)
        return prompt(sentences, place, **words, separator="\n" if self.level == 1 else " "), words["value"]

    def _place(self, rng: np.random.Generator, split: Split) -> tuple[list[str], int, dict[str, str]]:
        """Sentences that leave room for the rest, the place of the needle among them, and its words."""
        value, key = magic_value(self.level, rng), magic_key(rng)
        words = {"kind": "uuids" if self.level == 3 else "numbers", "key": key, "value": value}
        room = self.length - len(self.encode(" ".join((*around(**words), value))))
        if self.level == 1:
            sentences = [REPEATED] * (room // len(self._sentence(REPEATED)))
            return sentences, int(rng.integers(len(sentences) + 1)), words
        sentences = self._cut(room, rng, split)
        return sentences, round(int(rng.integers(DEPTHS)) / (DEPTHS - 1) * len(sentences)), words

    def _cut(self, room: int, rng: np.random.Generator, split: Split) -> list[str]:
        """Whole sentences of the haystack's text from a random place on, wrapped if need be, that fill the room."""
        sentences = _sentences(self.source)
        border = int(TRAINING_PART * len(sentences))
        part = sentences[:border] if split == "train" else sentences[border:]
        chosen, at = [], int(rng.integers(len(part)))
        while True:
            room -= len(self._sentence(part[at]))
            if room < 0:
                return chosen
            chosen.append(part[at])
            at = (at + 1) % len(part)

    def _sentence(self, sentence: str) -> list[int]:
        """The tokens of a sentence of a haystack, which comes again and again."""
        known = _encoded(self.source, self.vocab)
        if sentence not in known:
            known[sentence] = self.encode(sentence)
        return known[sentence]

    def encode(self, text: str) -> list[int]:
        """Tokens of words, of single characters of values, and of marks."""
        known = _vocabulary(self.source, self.vocab)
        return [known.get(piece, UNKNOWN) for piece in pieces(text)]


_VALUE = r"\d{7}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_PIECE = re.compile(rf"(?P<value>{_VALUE})|\w+|[^\w\s]")


def pieces(text: str) -> list[str]:
    """Words and marks; magic values character by character, each with a "#" before it, so that they are tokens of their own."""
    found: list[str] = []
    for match in _PIECE.finditer(text):
        found += [f"#{c}" for c in match["value"]] if match["value"] else [match[0]]
    return found


@functools.cache
def _fixed_words() -> list[str]:
    """Words that every prompt may have."""
    texts = [REPEATED, *ADJECTIVES, *NOUNS, *(prompt([], 0, kind=kind, key="-", value="") for kind in ("numbers", "uuids"))]
    return list(dict.fromkeys(piece for text in texts for piece in pieces(text)))


@functools.lru_cache(maxsize=8)
def _vocabulary(source: str, size: int) -> dict[str, int]:
    fixed = [f"#{c}" for c in CHARACTERS] + _fixed_words()
    counts = Counter(piece for sentence in _sentences(source) for piece in pieces(sentence))
    frequent = sorted(counts.keys() - set(fixed), key=lambda piece: (-counts[piece], piece))
    return {piece: i for i, piece in enumerate((fixed + frequent)[: size - 2], start=2)}


@functools.lru_cache(maxsize=8)
def _encoded(source: str, size: int) -> dict[str, list[int]]:
    """Sentences that have been cut into tokens already."""
    return {}


@functools.lru_cache(maxsize=8)
def _sentences(source: str) -> list[str]:
    """The sentences of a text file, or generated ones."""
    if not source:
        return _generated()
    words = " ".join(Path(source).read_text(errors="replace").split())
    found = [s for s in re.split(r"(?<=[.!?])\s+", words) if s and not re.search(_VALUE, s) and len(pieces(s)) <= 64]
    if len(found) < 20:
        raise DataError(f"source: {source}: expected at least 20 sentences of at most 64 words, got {len(found)}")
    return found


def _generated(count: int = 4000) -> list[str]:
    rng = np.random.default_rng(0)

    def pick(words: list[str]) -> str:
        return words[rng.integers(len(words))]

    def thing() -> str:
        return f"{pick(['the', 'a', 'this', 'every'])} {pick(ADJECTIVES)} {pick(NOUNS)}"

    def sentence() -> str:
        end = f" {pick(['near', 'under', 'behind', 'beside'])} {thing()}" if rng.random() < 0.5 else ""
        return f"{thing()} {pick(VERBS)} {thing()}{end}.".capitalize()

    return [sentence() for _ in range(count)]
