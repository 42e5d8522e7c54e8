"""What a user can write as a source."""

from __future__ import annotations

from pathlib import Path

import pytest
from corpora import write_jsonl, write_parquet

from gdn.core.errors import DataError
from gdn.data import ByteTokenizer, prepare
from gdn.data.find import open_source
from gdn.data.hub import HubSource


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a.txt")
    (tmp_path / "sub" / "b.md").write_text("b.md")
    (tmp_path / "sub" / "c.py").write_text("c.py")
    (tmp_path / "sub" / "ignored.log").write_text("ignored")
    write_jsonl(tmp_path / "d.jsonl", ["d 0", "d 1"])
    write_parquet(tmp_path / "e.parquet", ["e 0", "e 1"])
    prepare(["f 0", "f 1"], ByteTokenizer(), tmp_path / "tokens" / "f.bin")
    return tmp_path


def contents(name: str) -> list[str]:
    tokenizer = ByteTokenizer()
    documents = open_source(name, tokenizer=tokenizer).documents()
    return [document if isinstance(document, str) else tokenizer.decode(document) for document in documents]


def test_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    assert contents("a.txt") == contents("~/a.txt") == ["a.txt"]
    assert contents("sub") == contents("sub/*.md,sub/*.py") == ["b.md", "c.py"]
    assert contents("*.jsonl") == ["d 0", "d 1"]
    assert contents(".") == contents(f"{folder}") == ["a.txt", "b.md", "c.py", "d 0", "d 1", "e 0", "e 1"]
    assert contents("tokens:tokens/f.bin") == contents("tokens:tokens") == contents("tokens:tokens/*.bin") == ["f 0", "f 1"]
    assert contents(" a.txt, d.jsonl ,a.txt,python:sub,tokens:tokens/f.bin") == ["c.py", "a.txt", "d 0", "d 1", "f 0", "f 1"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "got nothing"),
        ("nowhere.txt", r"nowhere\.txt: no such file or folder"),
        ("nowhere/*.txt", "no file matches"),
        ("sub/ignored.log", r"ignored\.log: expected a file that ends in \.txt \.md \.py \.jsonl \.parquet"),
        ("tokens", r"holds no file that ends in \.txt"),
        ("tokens:sub", r"holds no file that ends in \.bin"),
        ("hf:a/b,a.txt", "cannot be joined"),
        ("python:nowhere", "no such folder: nowhere"),
    ],
)
def test_errors_say_what_is_wrong(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises(DataError, match=message):
        open_source(name, tokenizer=ByteTokenizer())


def test_a_dataset_by_name(folder: Path) -> None:
    write_jsonl(folder / "hub" / "rows.jsonl", ["text"])
    assert isinstance(open_source(f"hf:{folder / 'hub'}", tokenizer=ByteTokenizer()), HubSource)
