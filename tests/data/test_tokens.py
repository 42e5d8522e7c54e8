"""Token files: what is written is read, whatever the blocks; a file that does not fit its description is refused."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from corpora import TEXTS
from hypothesis import given
from hypothesis import strategies as st

from gdn.core.errors import DataError
from gdn.data import ByteTokenizer, prepare, tokens
from gdn.data.tokens import TokenFiles, document_bounds


def read(path: Path) -> list[str]:
    tokenizer = ByteTokenizer()
    return [tokenizer.decode(document) for document in TokenFiles("x", [str(path)], tokenizer, 0.0).documents()]  # type: ignore[arg-type]


@given(stream=st.lists(st.integers(0, 2), min_size=1, max_size=40), block=st.integers(1, 12))
def test_blocks_share_no_document_and_lose_none(stream: list[int], block: int) -> None:
    array = np.array(stream)
    found = []
    for start in range(0, len(array), block):
        begins, ends = document_bounds(array, start, min(start + block, len(array)), 0)
        assert all(start <= begin < start + block for begin in begins)
        found += [array[begin:end].tolist() for begin, end in zip(begins, ends)]
    expected = [[int(c) for c in document] for document in "".join(map(str, stream)).split("0")]
    assert found == (expected[:-1] if stream[-1] == 0 else expected)


@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20), block=st.integers(1, 100))
def test_documents_come_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int) -> None:
    path = prepare(texts, ByteTokenizer(), tmp_path_factory.getbasetemp() / "t.bin")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "BLOCK", block)
        assert read(path) == texts


def test_a_source_by_name_and_its_description(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("héllo")
    (tmp_path / "b.txt").write_text("b" * 10)
    path = prepare(str(tmp_path / "*.txt"), ByteTokenizer(), tmp_path / "out" / "t.bin")
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "format": "gdn-tokens-1",
        "dtype": "uint16",
        "tokens": 18,
        "documents": 2,
        "bytes": 16,
        "vocab_size": 257,
        "end_id": 256,
        "tokenizer": "bytes",
    }
    assert path.stat().st_size == 36
    assert read(path) == ["héllo", "b" * 10]
    assert sorted(file.name for file in path.parent.iterdir()) == ["t.bin", "t.json"]


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 65537
    path = prepare(TEXTS, tokenizer, tmp_path / "t.bin")
    assert path.stat().st_size == 4 * json.loads(path.with_suffix(".json").read_text())["tokens"]
    assert read(path) == TEXTS


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    def broken() -> Iterator[str]:
        yield "new"
        raise OSError("no space left on device")

    path = prepare(["old"], ByteTokenizer(), tmp_path / "t.bin")
    with pytest.raises(OSError, match="no space"):
        prepare(broken(), ByteTokenizer(), path)
    assert read(path) == ["old"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["t.bin", "t.json"]


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    """Not the file beside it, which only becomes it; another file that the system names stays."""

    def broken(error: OSError) -> Iterator[str]:
        yield "new"
        raise error

    path = tmp_path / ("t" * 250 + ".bin")
    with pytest.raises(OSError) as caught:
        prepare(["text"], ByteTokenizer(), path)
    assert (caught.value.errno, caught.value.filename) == (errno.ENAMETOOLONG, str(path))
    path = tmp_path / "t.bin"
    for name, named in ((None, str(path)), ("cache", "cache")):
        with pytest.raises(OSError) as caught:
            prepare(broken(OSError(errno.ENOSPC, "full", name)), ByteTokenizer(), path)
        assert caught.value.filename == named
    with pytest.raises(OSError) as caught:
        prepare(broken(OSError(errno.EIO, "broken")), ByteTokenizer(), path)
    assert caught.value.filename is None


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the source is empty"):
        prepare([], ByteTokenizer(), tmp_path / "t.bin")
    with pytest.raises(DataError, match=r"expected the name of a token file, NAME\.bin"):
        prepare(["a"], ByteTokenizer(), tmp_path / "t.npy")
    path = prepare(["text"], ByteTokenizer(), tmp_path / "t.bin")
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"expected 10 bytes as t\.json says, got 8; is it cut short\?"):
        read(path)
    path = prepare(["text"], ByteTokenizer(), tmp_path / "t.bin")
    about = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(about | {"tokenizer": "other"}))
    with pytest.raises(DataError, match='made with tokenizer "other"'):
        read(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(DataError, match="expected a description"):
        read(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(DataError, match=r"t\.json is missing beside it"):
        read(path)
