"""Text files and Python source: nothing lost, nothing twice, sides that hold."""

from __future__ import annotations

import itertools
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gdn.core.errors import DataError
from gdn.data import files
from gdn.data.files import is_table, python_files, read_lines, text_files
from gdn.data.source import Side, View


def texts(source: files.TextFiles, side: Side = "all") -> list[str]:
    return [str(text) for text in source.documents(View(side=side, shuffle=False))]


def tree(folder: Path, contents: dict[str, str | bytes]) -> str:
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


@given(content=st.binary(max_size=80).map(lambda data: data.replace(b"\x00", b"\n")), cuts=st.lists(st.integers(1, 90), max_size=6))
def test_ranges_of_lines_share_none_and_lose_none(tmp_path_factory: pytest.TempPathFactory, content: bytes, cuts: list[int]) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.txt"
    path.write_bytes(content)
    edges = sorted({0, *(cut for cut in cuts if cut < len(content)), len(content)})
    pieces = [read_lines(str(path), start, stop) for start, stop in itertools.pairwise(edges)]
    assert b"".join(pieces) == content.removeprefix(files.BOM)
    assert all(piece.endswith(b"\n") for piece in pieces[:-1] if piece and b"".join(pieces[pieces.index(piece) + 1 :]))


def test_a_long_file_is_cut_and_its_end_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "WHOLE", 100)
    content = "".join(f"line {i}\n" for i in range(200))
    source = text_files("x", [str(tree(tmp_path, {"a.txt": content})) + "/a.txt"], 0.25)
    train, validation = texts(source, "train"), texts(source, "validation")
    assert "".join(train + validation) == content == "".join(texts(source))
    assert abs(len("".join(validation)) / len(content) - 0.25) < 0.01
    assert max(map(len, train + validation)) <= 100 + len("line 199\n")


@pytest.mark.parametrize("end", ["", "\n", "\nshort\n"])
def test_a_long_line_is_cut_at_a_character(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setattr(files, "WHOLE", 1001)
    monkeypatch.setattr(files, "LINE", 100)
    content = "é€😀" * 1000 + end
    source = text_files("x", [str(tree(tmp_path, {"a.txt": content})) + "/a.txt"], 0.25)
    train, validation = texts(source, "train"), texts(source, "validation")
    assert "".join(train + validation) == content
    assert len("".join(validation)) / len(content) == pytest.approx(0.25, abs=0.01)
    assert max(len(text.encode()) for text in train + validation) <= 1001 + 100


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    folder = tree(tmp_path, {"bad.txt": b"good\n" * 3 + b"\xff\xfe"})
    with pytest.raises(DataError, match=r"bad\.txt: not UTF-8 near byte 15"):
        texts(text_files("x", [f"{folder}/bad.txt"], 0.0))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    folder = tree(tmp_path, {"a.txt": files.BOM + b"text"})
    assert texts(text_files("x", [f"{folder}/a.txt"], 0.0)) == ["text"]


def test_a_file_that_vanishes_is_named(tmp_path: Path) -> None:
    folder = tree(tmp_path, {"a.txt": "text"})
    source = text_files("x", [f"{folder}/a.txt"], 0.0)
    (tmp_path / "a.txt").unlink()
    with pytest.raises(DataError, match=r"a\.txt: cannot be read: No such file"):
        texts(source)


def test_python_source_leaves_out_what_is_no_code(tmp_path: Path) -> None:
    folder = tree(
        tmp_path,
        {
            "a.py": "a = 1  # ok\n",
            "deep/er/b.py": "b = 'é'  # ok\n",
            "latin.py": b"# caf\xe9 ok\n",
            "empty.py": "",
            "table.py": "t = [" + "12345, " * 100 + "]\n",
            "big.py": "# ok\n" * 200_001,
            "note.txt": "not this",
            "__pycache__/c.py": "not this",
            "site-packages/d.py": "not this",
        },
    )
    os.symlink(tmp_path / "deep", tmp_path / "loop")
    os.symlink(tmp_path / "nowhere.py", tmp_path / "broken.py")
    assert sorted(texts(python_files("python", 0.0, folder))) == ["a = 1  # ok\n", "b = 'é'  # ok\n"]


def test_no_python_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no Python source below"):
        python_files("python", 0.0, str(tmp_path))
    with pytest.raises(DataError, match="no such folder"):
        python_files("python", 0.0, str(tmp_path / "nowhere"))


def test_the_side_of_a_file_does_not_depend_on_where_it_is_or_what_is_beside_it(tmp_path: Path) -> None:
    contents: dict[str, str | bytes] = {f"package/m{i}.py": f"# module {i}\n" for i in range(100)}
    one = python_files("python", 0.3, tree(tmp_path / "one", contents))
    more = {f"vendored/deeper/{name}": f"{text}  # a newer release\n" for name, text in contents.items()}
    other = python_files("python", 0.3, tree(tmp_path / "other", {**more, "other/x.py": "x\n"}))
    modules = {text.split()[2] for text in texts(one, "validation")}
    assert 15 < len(modules) < 45
    assert modules == {text.split()[2] for text in texts(other, "validation") if "module" in text}


def test_a_copy_of_a_validation_file_is_not_trained_on(tmp_path: Path) -> None:
    contents: dict[str, str | bytes] = {f"package/m{i}.py": f"# module {i}\n" for i in range(100)}
    copies = {f"copy{i}/of{i}.py": text for i, text in enumerate(contents.values())}
    source = python_files("python", 0.3, tree(tmp_path, contents | copies))
    train, validation = texts(source, "train"), texts(source, "validation")
    assert not set(train) & set(validation)
    assert set(train) | set(validation) == set(map(str, contents.values()))
    assert len(train) + len(validation) < 200


def test_the_installed_python_is_found_with_names_that_hold_anywhere() -> None:
    source = python_files("python", 0.02)
    names = {piece.name for piece in source.pieces}
    assert {"stdlib/os.py", "stdlib/json/decoder.py", "packages/numpy/__init__.py"} <= names
    assert len(names) == len(source.pieces)
    assert not any("site-packages" in name for name in names)


def test_tables() -> None:
    assert is_table(b"0x1234, 0x5678, 99")
    assert not is_table(Path(shutil.__file__).read_bytes())
