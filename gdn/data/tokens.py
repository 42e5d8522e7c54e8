"""Token files: documents tokenised once, read through a memory map.

`NAME.bin` holds the tokens of all documents as little-endian uint16 (uint32 for vocabularies above 65536), the end token after each.
`NAME.json` beside it says how to read them:

    {"format": "gdn-tokens-1", "dtype": "uint16", "tokens": 1200, "documents": 3, "bytes": 4800,
     "vocab_size": 50257, "end_id": 0, "tokenizer": "fingerprint of the tokenizer"}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdn.core.errors import FULL, DataError
from gdn.data.source import Document, FileBlocks, Side, on_side
from gdn.data.tokenizer import Tokenizer

FORMAT = "gdn-tokens-1"

BLOCK = 1 << 16
"""Tokens of a unit: the documents that begin in them."""

DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class TokenFiles(FileBlocks):
    """Documents from token files. The side of a document depends on its tokens alone."""

    def __init__(self, name: str, paths: Sequence[str], tokenizer: Tokenizer, fraction: float) -> None:
        self.fraction, self.end_id = fraction, tokenizer.end_id
        self._files = {path: _open(path, tokenizer) for path in paths}
        super().__init__(name, {path: -(-len(tokens) // BLOCK) for path, tokens in self._files.items()})

    def read(self, unit: int, side: Side) -> Sequence[Document]:
        path, block = self.locate(unit)
        tokens, start = self._files[path], block * BLOCK
        begins, ends = document_bounds(tokens, start, min(start + BLOCK, len(tokens)), self.end_id)
        return on_side([tokens[begin:end].astype(np.int64) for begin, end in zip(begins, ends)], side, self.fraction)


def document_bounds(tokens: NDArray[Any], start: int, stop: int, end_id: int) -> tuple[list[int], list[int]]:
    """Where the documents that begin in `start <= place < stop` begin and end, the end token left out."""
    before = max(start - 1, 0)
    ends = np.flatnonzero(tokens[before:stop] == end_id) + before
    begins = [begin for begin in [*([0] if start == 0 else []), *(ends + 1).tolist()] if begin < stop]
    if not begins:
        return [], []
    ends = ends[ends >= begins[0]].tolist()
    if len(ends) < len(begins):
        ends.append(_next_end(tokens, stop, end_id))
    return begins, ends


def _next_end(tokens: NDArray[Any], start: int, end_id: int) -> int:
    """The place of the next end token, or the end of the file."""
    for at in range(start, len(tokens), BLOCK):
        found = np.flatnonzero(tokens[at : at + BLOCK] == end_id)
        if len(found):
            return at + int(found[0])
    return len(tokens)


def write_tokens(documents: Iterable[Document], tokenizer: Tokenizer, out: str | Path) -> Path:
    """Tokenise documents into `out` (NAME.bin) and describe them in NAME.json beside it.

    The files appear whole or not at all: each is written beside its place and moved there, the description last.
    """
    out = Path(out)
    if out.suffix != ".bin":
        raise DataError(f"{out}: expected the name of a token file, NAME.bin")
    dtype = "uint16" if tokenizer.vocab_size <= 65536 else "uint32"
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as file:
            counts = _write(documents, tokenizer, file, DTYPES[dtype])
            file.flush()
            os.fsync(file.fileno())
        description = {"format": FORMAT, "dtype": dtype, **counts, "vocab_size": tokenizer.vocab_size, "end_id": tokenizer.end_id}
        _sidecar(out).unlink(missing_ok=True)
        partial.replace(out)
        partial.write_text(json.dumps(description | {"tokenizer": tokenizer.fingerprint}) + "\n")
        partial.replace(_sidecar(out))
    except OSError as error:
        if error.filename == str(partial) or (error.filename is None and error.errno in FULL):
            error.filename = str(out)
        raise
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return out


def _write(documents: Iterable[Document], tokenizer: Tokenizer, file: Any, dtype: np.dtype[Any]) -> dict[str, int]:
    counts = {"tokens": 0, "documents": 0, "bytes": 0}
    end = np.array([tokenizer.end_id], dtype=dtype)
    for document in documents:
        tokens = tokenizer.encode(document) if isinstance(document, str) else document
        if not len(tokens):
            continue
        file.write(np.concatenate([tokens.astype(dtype), end]).tobytes())
        counts["tokens"] += len(tokens) + 1
        counts["documents"] += 1
        counts["bytes"] += int(tokenizer.token_bytes[tokens].sum())
    if not counts["documents"]:
        raise DataError("no document to write: the source is empty")
    return counts


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _open(path: str, tokenizer: Tokenizer) -> NDArray[Any]:
    """The memory map of a token file that was checked against its description and the tokenizer."""
    sidecar = _sidecar(Path(path))
    try:
        about = json.loads(sidecar.read_text())
        dtype, tokens, made_with = DTYPES[about["dtype"]], int(about["tokens"]), about["tokenizer"]
    except FileNotFoundError:
        raise DataError(f"{path}: {sidecar.name} is missing beside it; write token files with `gdn tokens` or gdn.data.prepare") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{sidecar}: expected a description with dtype, tokens and tokenizer, cannot use it: {error!r}") from None
    if made_with != tokenizer.fingerprint or about.get("end_id") != tokenizer.end_id:
        raise DataError(
            f'{path}: made with tokenizer "{made_with}" and end token {about.get("end_id")}, but the option tokenizer is '
            f'"{tokenizer.fingerprint}" with end token {tokenizer.end_id}; give the tokenizer that it was made with'
        )
    if os.path.getsize(path) != tokens * dtype.itemsize:
        raise DataError(
            f"{path}: expected {tokens * dtype.itemsize:,} bytes as {sidecar.name} says, got {os.path.getsize(path):,}; is it cut short?"
        )
    return np.memmap(path, dtype=dtype, mode="r") if tokens else np.empty(0, dtype)
