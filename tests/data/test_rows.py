"""JSON lines and Parquet: every row once whatever the blocks, errors that name the file and the line."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from corpora import write_jsonl, write_parquet
from hypothesis import given
from hypothesis import strategies as st

from gdn.core.errors import DataError
from gdn.data import rows
from gdn.data.rows import JsonLines, Parquet
from gdn.data.source import View


@given(texts=st.lists(st.text(max_size=30), max_size=20), block=st.integers(1, 100))
def test_every_row_is_read_once_in_order(tmp_path_factory: pytest.TempPathFactory, texts: list[str], block: int) -> None:
    path = write_jsonl(tmp_path_factory.getbasetemp() / "rows.jsonl", texts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "BLOCK", block)
        assert list(JsonLines("x", [str(path)], "text", 0.0).documents()) == [text for text in texts if text]


def test_equal_texts_are_on_the_same_side(tmp_path: Path) -> None:
    texts = [f"text {i % 50}" for i in range(500)]
    sources = [
        JsonLines("x", [str(write_jsonl(tmp_path / "a.jsonl", texts))], "text", 0.3),
        Parquet("x", [str(write_parquet(tmp_path / "a.parquet", list(reversed(texts))))], "text", 0.3),
    ]
    sides = [{side: set(source.documents(View(side=side))) for side in ("train", "validation")} for source in sources]  # type: ignore[arg-type]
    assert sides[0] == sides[1]
    assert not sides[0]["train"] & sides[0]["validation"] and len(sides[0]["validation"]) > 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "not JSON in UTF-8"),
        (b'{"text": "\xff"}', "not JSON in UTF-8"),
        (b'["text"]', "expected a JSON object, got list"),
        (b'{"txt": "a"}', r'no field "text" \(option text_field\)\. Did you mean "txt"\?'),
        (b'{"text": 5}', 'expected text in the field "text", got int'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str) -> None:
    monkeypatch.setattr(rows, "BLOCK", 50)
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' * 20 + line + b"\n" + b'{"text": "good"}\n')
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 41: {message}"):
        list(JsonLines("x", [str(path)], "text", 0.0).documents())


def test_a_file_of_other_lines_is_named_before_anything_is_read(tmp_path: Path) -> None:
    good, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    good.write_text('\n{"text": "good"}\n')
    other.write_text('{"step": 1}\n')
    with pytest.raises(DataError, match=r'b\.jsonl, line 1: no field "text"'):
        JsonLines("x", [str(good), str(other)], "text", 0.0)


def test_nulls_and_empty_texts_are_left_out_and_lone_surrogates_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    values = [None, "", "a\ud800b", "😀"]
    path.write_text("".join(json.dumps({"text": value}) + "\r\n" for value in values))
    assert list(JsonLines("x", [str(path)], "text", 0.0).documents()) == ["a\ufffdb", "😀"]
    parquet = write_parquet(tmp_path / "a.parquet", [None, "", "b"])
    assert list(Parquet("x", [str(parquet)], "text", 0.0).documents()) == ["b"]


def test_parquet_in_order_over_row_groups_and_files(tmp_path: Path) -> None:
    paths = [str(write_parquet(tmp_path / f"{i}.parquet", [f"{i} {j}" for j in range(20)], field="body", rows=7)) for i in range(3)]
    expected = [f"{i} {j}" for i in range(3) for j in range(20)]
    assert list(Parquet("x", paths, "body", 0.0).documents()) == expected


def test_parquet_errors_name_the_file(tmp_path: Path) -> None:
    good = write_parquet(tmp_path / "good.parquet", ["text"] * 2000, field="txt", rows=2000)
    with pytest.raises(DataError, match=r'good\.parquet: no column "text" \(option text_field\)\. Did you mean "txt"\?'):
        Parquet("x", [str(good)], "text", 0.0)
    content = good.read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"cut\.parquet: not a Parquet file"):
        Parquet("x", [str(tmp_path / "cut.parquet")], "txt", 0.0)
    (tmp_path / "damaged.parquet").write_bytes(content[:4] + b"\xff" * 40 + content[44:])
    with pytest.raises(DataError, match=r"damaged\.parquet: row group 0 is damaged"):
        list(Parquet("x", [str(tmp_path / "damaged.parquet")], "txt", 0.0).documents())
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    with pytest.raises(DataError, match=r"numbers\.parquet, row group 0, row 0: expected text in the field"):
        list(Parquet("x", [str(tmp_path / "numbers.parquet")], "text", 0.0).documents())
