"""Files that results go to."""

from __future__ import annotations

from pathlib import Path

from gdn.core.errors import ArgumentError


def expect_writable(file: Path, argument: str, *, replaced: bool = False) -> None:
    """Raise `ArgumentError` unless a file can be written: for what takes long before it is. Its folder is made, and what it holds stays.

    With `replaced` a new file takes its place when it is whole, so a device or a pipe will not do.
    """
    try:
        place = file if file.exists() else file.resolve()  # of a link that leads nowhere yet it is its aim that must not stay
        place.parent.mkdir(parents=True, exist_ok=True)
        known = place.exists()
        if replaced and known and not place.is_file():
            raise ArgumentError(f"{argument}: expected a file, got {file}, which is something else")
        place.open("a").close()
        if not known:
            place.unlink()
    except OSError as error:
        raise ArgumentError(f"{argument}: expected a file that can be written, got {file} ({error.filename}: {error.strerror})") from None
