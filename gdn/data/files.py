"""Text files, and the Python source on the machine.

Sides of the split:

- A file of at most `WHOLE` bytes is one document. Its side depends on its name and the name of its folder, so a copy of a package under
  another path, or another release of it, falls on the same side. A training file with the bytes of a validation file is left out.
- A longer file is cut at ends of lines into documents of about `WHOLE` bytes, and the last `fraction` of the file is its validation side.
  So one long file is enough to train on, also if it is a single line: where none ends within `LINE` bytes the cut goes through it.
"""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gdn.core.errors import DataError
from gdn.data import order
from gdn.data.source import Document, IndexedSource, Side

WHOLE = 256 * 1024
"""Bytes of the longest text file that is one document."""

LINE = 4096
"""Bytes in which a line must end for a long text file to be cut there and not within it."""

LARGEST = 1_000_000
"""Bytes of the longest Python file that is read; longer ones are generated tables."""

BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Piece:
    """One unit: the lines of a file that begin at bytes `start <= place < stop`."""

    name: str
    path: str
    start: int
    stop: int
    held_out: bool
    whole: bool


class TextFiles(IndexedSource):
    """Documents from text files in UTF-8."""

    def __init__(self, name: str, pieces: Sequence[Piece]) -> None:
        self.name = name
        self.pieces = pieces
        self.unit_keys = order.keys([f"{piece.name}:{piece.start}" for piece in pieces])
        self._held_out = np.array([piece.held_out for piece in pieces], dtype=bool)
        self._held_out_sizes: dict[int, list[str]] = {}
        for piece in pieces:
            if piece.held_out and piece.whole:
                self._held_out_sizes.setdefault(piece.stop, []).append(piece.path)

    def select(self, side: Side) -> NDArray[np.int64]:
        if side == "all":
            return np.arange(len(self.pieces))
        return np.flatnonzero(self._held_out == (side == "validation"))

    def read(self, unit: int, side: Side) -> Sequence[Document]:
        piece = self.pieces[unit]
        data = read_lines(piece.path, piece.start, piece.stop, LINE)
        if side == "train" and piece.whole and self._is_copy_of_held_out(piece, data):
            return []
        text = self.decode(piece, data)
        return [text] if text else []

    def decode(self, piece: Piece, data: bytes) -> str:
        """The text of a piece; an empty text is left out."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{piece.path}: not UTF-8 near byte {piece.start + error.start:,}; convert the file or leave it out") from None

    def _is_copy_of_held_out(self, piece: Piece, data: bytes) -> bool:
        return any(read_lines(path, 0, piece.stop) == data for path in self._held_out_sizes.get(piece.stop, ()))


class PythonFiles(TextFiles):
    """Python source: files that are not UTF-8 and tables of numbers are left out."""

    def decode(self, piece: Piece, data: bytes) -> str:
        if is_table(data):
            return ""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return ""


def text_files(name: str, paths: Sequence[str], fraction: float) -> TextFiles:
    """A source from files, each a document or, if it is long, several."""
    pieces = []
    for path in paths:
        size = os.path.getsize(path)
        if size <= WHOLE:
            pieces.append(Piece(path, path, 0, size, _name_is_held_out(os.path.abspath(path), fraction), True))
            continue
        held_out_from = round(size * (1 - fraction))
        for start in range(0, held_out_from, WHOLE):
            pieces.append(Piece(path, path, start, min(start + WHOLE, held_out_from), False, False))
        for start in range(held_out_from, size, WHOLE):
            pieces.append(Piece(path, path, start, min(start + WHOLE, size), True, False))
    return TextFiles(name, [piece for piece in pieces if piece.stop])


def python_files(name: str, fraction: float, folder: str | None = None) -> PythonFiles:
    """The Python source below a folder; by default the standard library and the installed packages of the running interpreter.

    Only names and sizes are looked at here; a file is opened when its turn comes.
    """
    if folder is not None and not os.path.isdir(folder):
        raise DataError(f"{name}: no such folder: {folder}")
    roots = {"": folder} if folder is not None else _installed()
    found = sorted(entry for label, root in roots.items() for entry in _walk(root, label))
    pieces = [Piece(label, path, 0, size, _name_is_held_out(label, fraction), True) for label, path, size in found if 0 < size <= LARGEST]
    if not pieces:
        raise DataError(f"{name}: no Python source below {', '.join(roots.values())}")
    return PythonFiles(name, pieces)


def is_table(data: bytes) -> bool:
    """Whether more than a fifth of the bytes are digits: character maps, colour maps, test vectors."""
    return sum(map(data.count, b"0123456789")) * 5 > len(data)


def read_lines(path: str, start: int, stop: int, longest: int = -1) -> bytes:
    """The lines of a file that begin at bytes `start <= place < stop`. Consecutive ranges share no line and lose none. At a place from
    which a line goes on for `longest` bytes it begins anew there (-1: never)."""
    try:
        with open(path, "rb") as file:
            begin = _line_start(file, start, longest)
            end = _line_start(file, stop, longest)
            file.seek(begin)
            data = file.read(end - begin)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    return data.removeprefix(BOM) if start == 0 else data


def _line_start(file: BufferedReader, at: int, longest: int) -> int:
    """Where the first line begins at or after a byte; the first character there within a line that goes on for `longest` bytes."""
    if at == 0:
        return 0
    file.seek(at - 1)
    line = file.readline(longest)
    if len(line) != longest or line.endswith(b"\n"):
        return file.tell()
    return at + next((i for i, byte in enumerate(line[1:]) if byte & 0xC0 != 0x80), 0)


def _name_is_held_out(path: str, fraction: float) -> bool:
    return order.is_held_out(order.key("/".join(Path(path).parts[-2:]).encode("utf-8", "surrogateescape")), fraction)


def _installed() -> dict[str, str]:
    paths = sysconfig.get_paths()
    return {"stdlib": paths["stdlib"], "packages": paths["purelib"]} | (
        {"platform": paths["platlib"]} if paths["platlib"] != paths["purelib"] else {}
    )


def _walk(folder: str, label: str) -> Iterator[tuple[str, str, int]]:
    """(name that does not depend on the machine, path, size) of each Python file; does not descend into installed packages from above."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        name = f"{label}/{entry.name}" if label else entry.name
        try:
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in ("__pycache__", "site-packages", "dist-packages"):
                    yield from _walk(entry.path, name)
            elif entry.name.endswith(".py") and entry.is_file():
                yield name, entry.path, entry.stat().st_size
        except OSError:
            continue
