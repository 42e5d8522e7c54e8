"""Needles: the answer is found in the text again by its sentence, the format is RULER's, and the splits share no sentence."""

from __future__ import annotations

import re
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from gdn.core.errors import DataError
from gdn.data.synthetic import Needle
from gdn.data.synthetic.base import IGNORE
from gdn.data.synthetic.needle import PAD, REPEATED, UNKNOWN, pieces, prompt


def test_the_prompt_is_that_of_ruler() -> None:
    text = prompt(["One.", "Two."], 1, kind="numbers", key="old-oak", value="1234567")
    assert text == (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about the number "
        "afterwards.\nOne. One of the special magic numbers for old-oak is: 1234567. Two.\nWhat is the special magic number for "
        "old-oak mentioned in the provided text? The special magic number for old-oak mentioned in the provided text is"
    )


@pytest.mark.parametrize("level", [1, 2, 3])
@pytest.mark.parametrize("split", ["train", "test"])
def test_the_answer_is_in_the_text(level: int, split: str) -> None:
    task = Needle(level=level, length=400)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    places = set()
    for _ in range(30):
        text, value = task.text(rng, split)  # type: ignore[arg-type]
        kind = "uuids" if level == 3 else "numbers"
        ((key, found),) = re.findall(rf"One of the special magic {kind} for (\w+-\w+) is: (\S+)\.", text)
        assert found == value
        assert text.endswith(f"for {key} mentioned in the provided text is")
        assert text.count(value) == 1
        if level == 3:
            assert uuid.UUID(value).version == 4
            assert str(uuid.UUID(value)) == value
        else:
            assert re.fullmatch(r"[1-9]\d{6}", value)
        if level == 1:
            haystack = text.split("\n")[1:-1]
            assert set(haystack) - {REPEATED} == {f"One of the special magic numbers for {key} is: {value}."}
        used = len(task.encode(text)) + len(task.encode(value))
        assert 400 - 40 < used <= 400  # the haystack fills what there is
        places.add(text.index("One of the special") // 200)
    assert len(places) > 3


def test_needles_of_a_text_stand_at_forty_depths() -> None:
    task, rng = Needle(level=2, length=1600), np.random.default_rng(0)
    depths = []
    for _ in range(600):
        text, value = task.text(rng, "train")
        sentences = re.split(r"(?<=\.) ", text.split("\n")[1])
        (place,) = (i for i, sentence in enumerate(sentences) if value in sentence)
        depths.append(39 * place / (len(sentences) - 1))
        assert len(sentences) > 80
    assert {round(depth) for depth in depths} == set(range(40))
    assert max(abs(depth - round(depth)) for depth in depths) < 39 / 2 / 80 + 1e-9  # as near as whole sentences allow


def test_needles_of_the_repeated_sentences_stand_anywhere() -> None:
    task, rng = Needle(level=1, length=300), np.random.default_rng(0)
    places, groups = set(), set()
    for _ in range(200):
        text, value = task.text(rng, "train")
        haystack = text.split("\n")[1:-1]
        groups.add(len(haystack))
        places |= {i for i, sentence in enumerate(haystack) if value in sentence}
    assert places == set(range(max(groups)))
    assert len(places) > 5


@pytest.mark.parametrize("level", [1, 3])
def test_targets_are_the_characters_of_the_answer(level: int) -> None:
    task = Needle(level=level, length=300)  # type: ignore[arg-type]
    tokens, targets, _ = task.sample(5, torch.Generator().manual_seed(0))
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        asked = [i for i, target in enumerate(wanted) if target != IGNORE]
        answer = [wanted[i] for i in asked]
        assert asked == list(range(asked[0], asked[0] + (36 if level == 3 else 7)))
        assert row[asked[0]] == task.encode("is")[0]
        assert row[asked[0] + 1 : asked[-1] + 1] == answer[:-1]
        assert set(row[asked[-1] + 1 :]) <= {PAD}
        colon = row.index(task.encode(":")[0])
        assert row[colon + 1 : colon + 1 + len(answer)] == answer
        assert UNKNOWN not in row
        assert PAD not in row[: asked[-1]]


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_row_is_the_text_in_tokens(level: int) -> None:
    task, generator = Needle(level=level, length=300), torch.Generator().manual_seed(0)  # type: ignore[arg-type]
    tokens, targets, _ = task.sample(4, generator)
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0))))
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        text, value = task.text(rng, "train")
        ids = task.encode(text)
        assert row[: len(ids)] == ids
        assert [target for target in wanted if target != IGNORE] == task.encode(value)
        assert wanted[len(ids) - 1] != IGNORE


def test_values_are_spelled_and_words_are_not() -> None:
    assert pieces("is: 1234567.") == ["is", ":", "#1", "#2", "#3", "#4", "#5", "#6", "#7", "."]
    assert pieces("The 12 oaks") == ["The", "12", "oaks"]
    spelled = pieces("123e4567-e89b-42d3-a456-426614174000")
    assert "".join(spelled).replace("#", "") == "123e4567-e89b-42d3-a456-426614174000"
    assert len(spelled) == 36


def test_a_haystack_from_a_file_is_split_into_disjoint_parts(tmp_path: Path) -> None:
    file = tmp_path / "essays.txt"
    file.write_text(" ".join(f"Sentence w{i} is about w{i}\nand more." for i in range(100)) + " Call 5551234 now.")
    task = Needle(level=2, length=300, source=str(file))
    rng = np.random.default_rng(0)
    seen = {}
    for split in ("train", "test"):
        texts = [task.text(rng, split)[0] for _ in range(40)]
        seen[split] = {word for text in texts for word in re.findall(r"w\d+", text)}
        assert not any("5551234" in text for text in texts)
    assert not seen["train"] & seen["test"]
    assert len(seen["train"]) == 80
    assert len(seen["test"]) == 20


def test_a_file_without_sentences_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("Hello. World.")
    with pytest.raises(DataError, match="expected at least 20 sentences"):
        Needle(level=2, source=str(file)).sample(1, torch.Generator())
