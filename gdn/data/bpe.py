"""Training a byte-level BPE tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from gdn.core.errors import ArgumentError, DataError, require
from gdn.data.tokenizer import END, FILE, FileTokenizer


def train_bpe(documents: Iterable[str], vocab_size: int, out: str | Path) -> FileTokenizer:
    """Learn a byte-level BPE from documents and write it as tokenizer.json.

    Every text can be encoded, and decodes to itself. The vocabulary is smaller than asked for when the text has too few repetitions.

    Args:
        documents: read once; a few hundred megabytes are plenty (`itertools.islice` a longer source).
        vocab_size: number of tokens, the 256 bytes and the end token among them.
        out: a file that ends in .json, or a folder, which gets a tokenizer.json.

    Raises:
        ArgumentError: vocab_size is below 257.
        DataError: there is no text, or no room for the file.
    """
    if vocab_size < 257:
        raise ArgumentError(f"vocab_size: expected at least 257, the bytes and the end token, got {vocab_size}")
    library = require("tokenizers", "data", "training a tokenizer")
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    documents = iter(documents)
    first = next(documents, None)
    if first is None:
        raise DataError("train_bpe: expected at least one document, got none")
    tokenizer.train_from_iterator(_chain(first, documents), trainer)
    path = Path(out)
    path = path if path.suffix == ".json" else path / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        tokenizer.save(str(partial))
    except Exception as error:  # the package raises bare Exceptions
        partial.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written: {error}") from None
    partial.replace(path)
    return FileTokenizer(path)


def _chain(first: str, rest: Iterable[str]) -> Iterable[str]:
    yield first
    yield from rest
