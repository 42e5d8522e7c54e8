"""Whether a file can be written, found out before it takes long to have what to write."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gdn.core.errors import ArgumentError
from gdn.core.files import expect_writable


def test_nothing_is_left_and_nothing_is_lost(tmp_path: Path) -> None:
    new, old, link = tmp_path / "folder" / "new", tmp_path / "old", tmp_path / "link"
    old.write_text("kept")
    link.symlink_to(tmp_path / "absent")
    for file in (new, old, link):
        expect_writable(file, "out")
    assert not new.exists() and new.parent.is_dir()
    assert old.read_text() == "kept"
    assert link.is_symlink() and not link.exists()


def test_a_device_is_written_to_but_not_replaced(tmp_path: Path) -> None:
    expect_writable(Path("/dev/null"), "out")
    ends = os.pipe()
    expect_writable(Path(f"/dev/fd/{ends[1]}"), "out")  # a link to what has no path, as /dev/stdout in a pipe
    for end in ends:
        os.close(end)
    with pytest.raises(ArgumentError, match="out: expected a file, got /dev/null, which is something else"):
        expect_writable(Path("/dev/null"), "out", replaced=True)
    with pytest.raises(ArgumentError, match="out: expected a file that can be written"):
        expect_writable(tmp_path, "out")
