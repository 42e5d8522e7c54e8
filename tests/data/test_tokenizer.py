"""Tokenizers: text comes back, each byte is counted once, the end token is never spelt by text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from corpora import TEXTS
from hypothesis import given
from hypothesis import strategies as st

from gdn.core.errors import DataError
from gdn.data import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer, train_bpe
from gdn.data.tokenizer import END


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    return train_bpe(TEXTS, 320, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest, bpe: FileTokenizer) -> Tokenizer:
    return ByteTokenizer() if request.param == "bytes" else bpe


@given(text=st.text() | st.just(f"{END} and <s> {END}"))
def test_text_comes_back_and_every_byte_is_counted(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int64
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
    assert tokenizer.end_id not in tokens
    stream = tokenizer.stream()
    assert "".join(stream(int(token)) for token in tokens) == text
    assert stream.flush() == ""


def test_the_end_token_is_no_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes[tokenizer.end_id] == 0
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.decode([tokenizer.end_id]) == tokenizer.stream()(tokenizer.end_id) == ""


def test_a_character_appears_when_its_last_byte_has_come() -> None:
    stream = ByteTokenizer().stream()
    assert [stream(byte) for byte in "a😀b".encode()] == ["a", "", "", "", "😀", "b"]
    assert [stream(byte) for byte in "😀".encode()[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"


@given(tokens=st.lists(st.integers(0, 256), max_size=20))
def test_any_tokens_can_be_decoded(tokens: list[int]) -> None:
    tokenizer = ByteTokenizer()
    stream = tokenizer.stream()
    assert "".join(map(stream, tokens)) + stream.flush() == tokenizer.decode(tokens)


def test_a_saved_tokenizer_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "run")
    again = load_tokenizer(tmp_path / "run")
    assert type(again) is type(tokenizer)
    assert again.begin_ids == tokenizer.begin_ids == ()
    assert (again.fingerprint, again.end_id, again.vocab_size) == (tokenizer.fingerprint, tokenizer.end_id, tokenizer.vocab_size)
    assert load_tokenizer(str(tmp_path / "run" / "tokenizer.json")).fingerprint == tokenizer.fingerprint


def test_tokens_of_a_padded_vocabulary_stand_for_nothing(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("on").tolist(), tokenizer.vocab_size, tokenizer.vocab_size + 40]
    assert tokenizer.decode(tokens) == "on" == "".join(map(tokenizer.stream(), tokens))


@given(text=st.text())
def test_other_software_reads_the_byte_tokenizer(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.getbasetemp() / "bytes"
    if not folder.exists():
        ByteTokenizer().save(folder)
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    other.encode_special_tokens = True
    assert other.encode(text).ids == ByteTokenizer().encode(text).tolist()
    assert other.decode(other.encode(text).ids) == text
    assert other.token_to_id(END) == 256


def sentencepiece_like(folder: Path) -> Path:
    """A tokenizer with a vocabulary like Llama 2: spaces are ▁, bytes are spelt <0x..>, unknown characters fall back to them."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": byte + 3 for byte in range(256)}}
    for piece in ("▁", "a", "b", "▁a", "é"):
        vocab[piece] = len(vocab)
    model = tokenizers.models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["[tool]"])
    made.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    made.enable_truncation(4)
    made.enable_padding(length=50)
    made.save(str(folder / "tokenizer.json"))
    return folder


def test_a_tokenizer_with_byte_fallback(tmp_path: Path) -> None:
    tokenizer = FileTokenizer(sentencepiece_like(tmp_path) / "tokenizer.json")
    text = "a a é😀 </s> [tool]"
    tokens = tokenizer.encode(text)
    assert tokenizer.begin_ids == (1,)
    assert tokenizer.end_id == 2 and 1 not in tokens and 2 not in tokens and len(tokens) > 4
    assert tokenizer.decode(tokens) == text
    assert tokenizer.token_bytes[tokens].sum() == len(text.encode())
    stream = tokenizer.stream()
    assert "".join(map(stream, tokens.tolist())) == text


def test_the_end_token_is_what_the_configuration_beside_it_says(tmp_path: Path) -> None:
    sentencepiece_like(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<s>"}}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_id == 1
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").end_id == 1
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read"):
        load_tokenizer(tmp_path)


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match='expected "bytes", a tokenizer'):
        load_tokenizer("bites")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"that tokenizers .* can read"):
        load_tokenizer(tmp_path)
    tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match="no token that ends a document"):
        load_tokenizer(tmp_path)
