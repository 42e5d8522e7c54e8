"""Training a tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import TEXTS

from gdn.core.errors import ArgumentError, DataError
from gdn.data import load_tokenizer, train_bpe


def test_it_compresses_and_is_the_same_each_time(tmp_path: Path) -> None:
    one, two = train_bpe(TEXTS, 350, tmp_path / "one"), train_bpe(iter(TEXTS), 350, tmp_path / "two.json")
    assert one.fingerprint == two.fingerprint == load_tokenizer(tmp_path / "two.json").fingerprint
    assert one.vocab_size == 350
    text = "".join(TEXTS)
    assert len(one.encode(text)) < len(text.encode()) / 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two.json"]


def test_little_text_gives_a_small_vocabulary(tmp_path: Path) -> None:
    tokenizer = train_bpe(["ab"], 1000, tmp_path)
    assert 257 <= tokenizer.vocab_size < 260
    assert tokenizer.decode(tokenizer.encode("anything, é")) == "anything, é"


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="vocab_size: expected at least 257"):
        train_bpe(TEXTS, 256, tmp_path)
    with pytest.raises(DataError, match="at least one document"):
        train_bpe([], 300, tmp_path)
    assert not list(tmp_path.iterdir())
