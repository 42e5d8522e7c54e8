"""Documents that are rows of JSON-lines and Parquet files. The side of a document depends on its text alone."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from gdn.core.errors import DataError, nearest, require
from gdn.data.files import read_lines
from gdn.data.source import Document, FileBlocks, Side, on_side, row_text

BLOCK = 64 * 1024
"""Bytes of JSON lines that are read together."""


class _RowFiles(FileBlocks):
    def __init__(self, name: str, paths: Sequence[str], field: str, fraction: float) -> None:
        self.field, self.fraction = field, fraction
        super().__init__(name, {path: self._blocks(path) for path in paths})

    def read(self, unit: int, side: Side) -> Sequence[Document]:
        return on_side(self._texts(*self.locate(unit)), side, self.fraction)

    def _blocks(self, path: str) -> int:
        """How many blocks a file has."""
        raise NotImplementedError

    def _texts(self, path: str, block: int) -> list[str]:
        """The texts of one block."""
        raise NotImplementedError


class JsonLines(_RowFiles):
    """One JSON object a line; blank lines are left out. The first line of every file is looked at before anything is read."""

    def _blocks(self, path: str) -> int:
        if (first := read_lines(path, 0, 1)).strip():
            self._text(first, path, 0, 0)
        return -(-os.path.getsize(path) // BLOCK)

    def _texts(self, path: str, block: int) -> list[str]:
        lines = read_lines(path, block * BLOCK, (block + 1) * BLOCK).split(b"\n")
        return [self._text(line, path, block, i) for i, line in enumerate(lines) if line.strip()]

    def _text(self, line: bytes, path: str, block: int, index: int) -> str:
        try:
            row = json.loads(line)
        except ValueError as error:  # also UnicodeDecodeError
            raise DataError(f"{_where(path, block, index)}: not JSON in UTF-8: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{_where(path, block, index)}: expected a JSON object, got {type(row).__name__}")
        if self.field not in row:
            raise DataError(f'{_where(path, block, index)}: no field "{self.field}" (option text_field).{nearest(self.field, row)}')
        return row_text(row[self.field], _where(path, block, index), self.field)


class Parquet(_RowFiles):
    """One document a row; a row group is read together."""

    def _blocks(self, path: str) -> int:
        file = _open_parquet(path)
        if self.field not in file.schema_arrow.names:
            raise DataError(f'{path}: no column "{self.field}" (option text_field).{nearest(self.field, file.schema_arrow.names)}')
        return file.num_row_groups

    def _texts(self, path: str, block: int) -> list[str]:
        try:
            values = _open_parquet(path).read_row_group(block, columns=[self.field]).column(0).to_pylist()
        except OSError as error:  # pyarrow's errors about damaged pages are OSErrors too
            raise DataError(f"{path}: row group {block} is damaged: {error}") from error
        return [row_text(value, f"{path}, row group {block}, row {i}", self.field) for i, value in enumerate(values)]


def _where(path: str, block: int, index: int) -> str:
    """File and line, counted only when there is an error to report."""
    before = read_lines(path, 0, block * BLOCK).count(b"\n") if block else 0
    return f"{path}, line {before + index + 1}"


def _open_parquet(path: str) -> Any:
    parquet = require("pyarrow.parquet", "data", "reading Parquet")
    try:
        return parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow.ArrowInvalid is a ValueError
        raise DataError(f"{path}: not a Parquet file that can be read: {error}") from error
