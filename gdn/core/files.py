"""Files that results go to."""

from __future__ import annotations

from pathlib import Path

from gdn.core.errors import ArgumentError


def expect_writable(file: Path, argument: str) -> None:
    """Raise `ArgumentError` unless a file can be written: for what takes long before it is. Its folder is made, and what it holds stays."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        known = file.exists()
        file.open("a").close()
        if not known:
            file.unlink()
    except OSError as error:
        raise ArgumentError(f"{argument}: expected a file that can be written, got {file} ({error.filename}: {error.strerror})") from None
