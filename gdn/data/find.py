"""From what a user writes to a source."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence

from gdn.core.errors import DataError
from gdn.data.files import python_files, text_files
from gdn.data.hub import HubSource
from gdn.data.rows import JsonLines, Parquet
from gdn.data.source import IndexedSource, JoinedSource, Source
from gdn.data.tokenizer import Tokenizer
from gdn.data.tokens import TokenFiles

KINDS = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "jsonl", ".parquet": "parquet"}


def open_source(name: str, *, tokenizer: Tokenizer, text_field: str = "text", fraction: float = 0.0) -> Source:
    """A source by name; `DataError` if there is nothing to read. Files are listed, not read, but for the first line of each
    .jsonl and the columns of each .parquet, which must be there.

    Args:
        name: one of these, or several separated by commas:

            - `python`: the Python source on this machine, the standard library and the installed packages
            - `python:FOLDER`: the Python source below a folder
            - a file, a folder or a pattern of files (`texts/**/*.md`): .txt .md .py .jsonl .parquet
            - `tokens:FILE.bin` or a pattern: token files written by `prepare`
            - `hf:REPOSITORY[/CONFIG][@SPLIT]`: a Hugging Face dataset, streamed (alone only); `hf:FOLDER` reads a local one

        text_field: the field or column of .jsonl, .parquet and hf that holds the text.
        fraction: of the documents on the validation side.
    """
    items = [item.strip() for item in name.split(",") if item.strip()]
    if not items:
        raise DataError('source: expected a name like "python" or "texts/*.txt", got nothing')
    if any(item.startswith("hf:") for item in items):
        if len(items) > 1:
            raise DataError(f"source: an hf: dataset cannot be joined with others, got {name}")
        return HubSource(name, text_field, fraction)
    parts: list[IndexedSource] = []
    paths: dict[str, list[str]] = {}
    for item in dict.fromkeys(items):
        if item == "python" or item.startswith("python:"):
            parts.append(python_files(item, fraction, item[7:] or None))
            continue
        for path in _expand(item):
            known = paths.setdefault("tokens" if item.startswith("tokens:") else _kind(path), [])
            if path not in known:
                known.append(path)
    make: dict[str, Callable[[Sequence[str]], IndexedSource]] = {
        "text": lambda found: text_files(name, found, fraction),
        "jsonl": lambda found: JsonLines(name, found, text_field, fraction),
        "parquet": lambda found: Parquet(name, found, text_field, fraction),
        "tokens": lambda found: TokenFiles(name, found, tokenizer, fraction),
    }
    parts += [make[kind](found) for kind, found in paths.items()]
    return parts[0] if len(parts) == 1 else JoinedSource(name, parts)


def _expand(item: str) -> list[str]:
    """The files that an item names, sorted."""
    place = os.path.expanduser(item.removeprefix("tokens:"))
    if os.path.isfile(place):
        return [place]
    if os.path.isdir(place):
        kinds = (".bin",) if item.startswith("tokens:") else tuple(KINDS)
        found = [path for path in glob.glob(os.path.join(glob.escape(place), "**"), recursive=True) if path.endswith(kinds)]
        nothing = f"holds no file that ends in {' '.join(kinds)}"
    else:
        found = glob.glob(place, recursive=True)
        nothing = "no file matches" if glob.has_magic(place) else "no such file or folder"
    found = sorted(path for path in found if os.path.isfile(path))
    if not found:
        raise DataError(f"source: {item}: {nothing}")
    return found


def _kind(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in KINDS:
        raise DataError(f"source: {path}: expected a file that ends in {' '.join(KINDS)} (or tokens:FILE.bin)")
    return KINDS[suffix]
