"""Streamed Hugging Face datasets, tried on local ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from corpora import write_jsonl, write_parquet

from gdn.core import errors
from gdn.core.errors import DataError, MissingExtraError
from gdn.data import hub
from gdn.data.hub import HubSource
from gdn.data.source import View


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub, "BLOCK", 5)
    for i in range(3):
        write_jsonl(tmp_path / "hub" / f"train-{i}.jsonl", [f"{i} {j}" for j in range(13 + i)], field="body")
    write_jsonl(tmp_path / "hub" / "test.jsonl", ["test"], field="body")
    return tmp_path / "hub"


def test_rows_of_a_split_in_order(folder: Path) -> None:
    assert list(HubSource(f"hf:{folder}", "body", 0.0).documents()) == [f"{i} {j}" for i in range(3) for j in range(13 + i)]
    assert list(HubSource(f"hf:{folder}@test", "body", 0.0).documents()) == ["test"]


def stopping_everywhere(source: HubSource, view: View) -> list[Any]:
    """The documents of the units of an epoch, each read from the place that the reader before it left."""
    documents, at = [], None
    while True:
        reader = source.units(view, 2, at)
        documents.append(next(reader).documents)
        after = next(reader, None)
        if after is None:
            return documents
        at = json.loads(json.dumps(after.at))


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_stream_goes_on_at_every_block(folder: Path, world: int) -> None:
    source = HubSource(f"hf:{folder}", "body", 0.0)
    seen = []
    for rank in range(world):
        view = View(rank=rank, world=world, seed=1)
        units = list(source.units(view, epoch=2))
        for i, unit in enumerate(units):
            again = list(source.units(view, 2, json.loads(json.dumps(unit.at))))
            assert [u.documents for u in again] == [u.documents for u in units[i:]]
            assert again[0].at == unit.at
        assert stopping_everywhere(source, view) == [unit.documents for unit in units]
        seen += [document for unit in units for document in unit.documents]
    assert sorted(seen) == sorted(f"{i} {j}" for i in range(3) for j in range(13 + i))


def test_two_readers_do_not_disturb_each_other(folder: Path) -> None:
    source = HubSource(f"hf:{folder}", "body", 0.0)
    expected = list(source.units(View(), 0))
    one, two = source.units(View(), 0), source.units(View(), 0)
    got = [next(one), next(one), next(one)]
    assert list(two) == expected
    assert got + list(one) == expected


def test_parquet_goes_on_within_a_row_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "BLOCK", 5)
    for i in range(2):
        write_parquet(tmp_path / f"{i}.parquet", [f"{i} {j}" for j in range(33)], rows=8)
    source = HubSource(f"hf:{tmp_path}", "text", 0.0)
    units = list(source.units(View(), 2))
    assert sum(len(unit.documents) for unit in units) == 66
    assert stopping_everywhere(source, View()) == [unit.documents for unit in units]


def test_errors_say_what_is_wrong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'no field "text" \(option text_field\)'):
        list(HubSource(f"hf:{folder}", "text", 0.0).documents())
    with pytest.raises(DataError, match="cannot be opened"):
        HubSource(f"hf:{folder}@nosuchsplit", "text", 0.0)
    with pytest.raises(DataError, match="cannot be opened"):
        HubSource(f"hf:{tmp_path / 'nowhere'}", "text", 0.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf:HuggingFaceFW/fineweb-edu", ("HuggingFaceFW/fineweb-edu", None, "train")),
        ("hf:HuggingFaceFW/fineweb-edu/sample-10BT@validation", ("HuggingFaceFW/fineweb-edu", "sample-10BT", "validation")),
        ("hf:wikitext", ("wikitext", None, "train")),
        ("hf:./here", ("./here", None, "train")),
    ],
)
def test_names(monkeypatch: pytest.MonkeyPatch, name: str, expected: tuple[str, str | None, str]) -> None:
    def load(place: str, config: str | None, *, split: str, streaming: bool) -> Any:
        assert streaming
        return place, config, split

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert HubSource(name, "text", 0.0)._dataset == expected


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(errors.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError, match=r'pip install "gated-delta-networks\[data\]"'):
        HubSource("hf:x/y", "text", 0.0)
