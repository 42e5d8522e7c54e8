"""Text to tokens and back: bytes, built in, and any tokenizer.json through the package `tokenizers`.

Every tokenizer has a token that ends a document. Text never encodes to it, not even text that spells it, so boundaries can be found from
the tokens alone. `token_bytes` counts the UTF-8 bytes of text that each token stands for; control tokens stand for none.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gdn.core.errors import DataError, require

FILE = "tokenizer.json"

END = "<|endoftext|>"
"""How our own tokenizers spell the end of a document."""

ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<|end|>", "<|im_end|>", "[EOS]", "[SEP]")
"""Spellings that are looked for, in this order, when a tokenizer does not say which token ends a document."""


class Tokenizer(Protocol):
    """What the rest of gdn asks of a tokenizer."""

    vocab_size: int
    """One more than the largest token."""
    end_id: int
    """The token that ends a document."""
    begin_ids: tuple[int, ...]
    """Control tokens that its file puts before a text, if any. `encode` leaves them out; our own tokenizers have none."""
    token_bytes: NDArray[np.int64]
    """`[vocab_size]`: bytes of text that each token stands for."""
    fingerprint: str
    """Equal for tokenizers that encode alike."""

    def encode(self, text: str) -> NDArray[np.int64]:
        """The tokens of a text, without the end token."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of tokens; control tokens are left out, bytes that are not UTF-8 become U+FFFD."""
        ...

    def stream(self) -> TextStream:
        """A function from each next token to the text that it completes, in constant memory."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer into a folder, for `load_tokenizer(folder)` and for other software that reads tokenizer.json."""
        ...


class TextStream:
    """Called with one token after another; returns the text that is complete with it. `flush` returns what is left over."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __call__(self, token: int) -> str:
        return self._decoder.decode(_text_of(token, self._pieces))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _text_of(token: int, pieces: Sequence[bytes]) -> bytes:
    """Vocabularies of models are often padded to a round number: tokens beyond the tokenizer's stand for no text."""
    return pieces[token] if token < len(pieces) else b""


def load_tokenizer(name: str | Path) -> Tokenizer:
    """`"bytes"`, the path of a tokenizer.json, or a folder that holds one."""
    if name == "bytes":
        return ByteTokenizer()
    path = Path(name)
    if path.is_dir():
        path = path / FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f'tokenizer: no file {path}; expected "bytes", a {FILE}, or a folder that holds one') from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a {FILE}: {error}") from None
    return ByteTokenizer() if content == _bytes_json() else FileTokenizer(path)


class ByteTokenizer:
    """The bytes of UTF-8, and 256 for the end of a document.

    >>> ByteTokenizer().encode("é!").tolist()
    [195, 169, 33]
    """

    vocab_size = 257
    end_id = 256
    begin_ids: tuple[int, ...] = ()
    fingerprint = "bytes"

    def __init__(self) -> None:
        self._pieces = [bytes([byte]) for byte in range(256)] + [b""]
        self.token_bytes = np.array([len(piece) for piece in self._pieces])

    def encode(self, text: str) -> NDArray[np.int64]:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode(self, tokens: Iterable[int]) -> str:
        return b"".join(_text_of(token, self._pieces) for token in tokens).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        return TextStream(self._pieces)

    def save(self, folder: str | Path) -> None:
        _save(Path(folder), _bytes_json(), END)


class FileTokenizer:
    """A tokenizer.json of the package `tokenizers`.

    The end token is what tokenizer_config.json beside it calls `eos_token`, or else the first of `ENDS` that it knows. `token_bytes` is
    exact for byte-level tokenizers. Those with byte fallback add a space to the text, which is counted; an unknown token counts nothing.
    """

    def __init__(self, path: str | Path) -> None:
        library = require("tokenizers", "data", f"reading {path}")
        try:
            self._tokenizer: Any = library.Tokenizer.from_file(os.fspath(path))
        except Exception as error:  # the package raises bare Exceptions
            raise DataError(f"{path}: not a {FILE} that tokenizers {library.__version__} can read: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # a text that spells a control token is just text
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self._end = _end_token(Path(path), ids)
        self.end_id: int = ids[self._end]
        self.vocab_size = max(ids.values()) + 1
        self._pieces = _pieces(json.loads(self._tokenizer.to_str()), ids, self.vocab_size)
        self._pieces[self.end_id] = b""
        self.begin_ids = self._begin_ids()
        self.token_bytes = np.array([len(piece) for piece in self._pieces])
        self.fingerprint = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]

    def encode(self, text: str) -> NDArray[np.int64]:
        tokens = np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)
        return tokens[tokens != self.end_id]  # unigram models can spell it

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self._pieces)

    def _begin_ids(self) -> tuple[int, ...]:
        text = next((piece for piece in self._pieces if piece.isalpha() and piece.isascii()), b"a").decode()
        encoded = self._tokenizer.encode(text, add_special_tokens=True)
        control = zip(encoded.ids, encoded.special_tokens_mask)
        return tuple(token for token, _ in itertools.takewhile(lambda each: each[1], control))

    def save(self, folder: str | Path) -> None:
        _save(Path(folder), json.loads(self._tokenizer.to_str()), self._end)


def _end_token(path: Path, ids: dict[str, int]) -> str:
    config = path.with_name("tokenizer_config.json")
    named = None
    if config.is_file():
        try:
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
        except (ValueError, AttributeError) as error:
            raise DataError(f"{config}: cannot be read: {error}") from None
    if isinstance(named, dict):
        named = named.get("content")
    for candidate in (named, *ENDS):
        if candidate in ids:
            return candidate
    raise DataError(f"{path}: no token that ends a document; looked for eos_token in tokenizer_config.json beside it and {', '.join(ENDS)}")


def _pieces(content: dict[str, Any], ids: dict[str, int], vocab_size: int) -> list[bytes]:
    """The bytes of text that each token stands for."""
    control = {token["content"] for token in content["added_tokens"] if token["special"]} | {content["model"].get("unk_token")}
    literal = {token["content"] for token in content["added_tokens"] if not token["special"]}
    byte_level = '"ByteLevel"' in json.dumps([content["decoder"], content["pre_tokenizer"]])
    byte_of = {character: byte for byte, character in enumerate(_byte_characters())} if byte_level else {}
    pieces = [b""] * vocab_size
    for token, i in ids.items():
        if token in control:
            continue
        if token not in literal and all(character in byte_of for character in token):
            pieces[i] = bytes(byte_of[character] for character in token)
        elif re.fullmatch("<0x[0-9A-F]{2}>", token):
            pieces[i] = bytes([int(token[3:5], 16)])
        else:
            pieces[i] = token.replace("▁", " ").removeprefix("##").encode("utf-8")
    return pieces


def _bytes_json() -> dict[str, Any]:
    """The byte tokenizer in the format of tokenizer.json: a byte-level vocabulary without a merge."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": ByteTokenizer.end_id,
                "content": END,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_byte_characters())} | {END: ByteTokenizer.end_id},
            "merges": [],
        },
    }


def _byte_characters() -> list[str]:
    """The character that spells each byte in a byte-level vocabulary (GPT-2): itself where it is printable, else from U+0100 up."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _save(folder: Path, content: dict[str, Any], end: str) -> None:
    """The class is named because transformers would otherwise take that of the model, with rules of its own for splitting text."""
    _write_json(folder / FILE, content)
    _write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": end})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")
    partial.replace(path)
