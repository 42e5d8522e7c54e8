"""Training batches are endless and resume exactly; validation batches are fixed and held out."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpora import KINDS, LONG, TEXTS, Corpus, write_jsonl

from gdn.core.errors import ArgumentError, ConfigError, DataError
from gdn.data import Batch, ByteTokenizer, Data, DataConfig, Loader, files, hub, load_tokenizer, rows, tokens, train_bpe, validation_batches
from gdn.data.source import Source, Unit, View

END = ByteTokenizer.end_id


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a small corpus has many, and documents cross them."""
    monkeypatch.setattr(files, "WHOLE", 1500)
    monkeypatch.setattr(rows, "BLOCK", 700)
    monkeypatch.setattr(tokens, "BLOCK", 300)
    monkeypatch.setattr(hub, "BLOCK", 7)


def take(loader: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(loader, count))


def same(one: Batch, other: Batch) -> bool:
    boundaries = (one.packing is None) == (other.packing is None) and (
        one.packing is None or other.packing is None or torch.equal(one.packing.host, other.packing.host)
    )
    return (
        boundaries
        and torch.equal(one.tokens, other.tokens)
        and torch.equal(one.targets, other.targets)
        and (one.num_bytes, one.num_targets) == (other.num_bytes, other.num_targets)
    )


def texts_of(batches: list[Batch]) -> list[bytes]:
    """The documents that end within the targets of some batches; the first may lack its beginning."""
    stream = torch.cat([batch.targets.flatten() for batch in batches]).numpy()
    pieces = np.split(stream, np.flatnonzero(stream == END) + 1)
    return [piece[:-1].astype(np.uint8).tobytes() for piece in pieces if len(piece) and piece[-1] == END]


def epoch_texts(data: Data, epoch: int = 0, side: str = "train", **view: Any) -> list[bytes]:
    """The documents of an epoch, from the source itself."""
    reader = View(side=side, seed=data.config.seed, shuffle=data.config.shuffle, **view)  # type: ignore[arg-type]
    documents = [document for unit in data.source.units(reader, epoch) for document in unit.documents]
    return [document.encode() if isinstance(document, str) else document.astype(np.uint8).tobytes() for document in documents]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_has_every_training_document_once_and_no_validation_document(corpus: Corpus, kind: str) -> None:
    data = Data(corpus(kind))
    train, validation, everything = (epoch_texts(data, side=side) for side in ("train", "validation", "all"))
    assert sorted(train + validation) == sorted(everything)
    assert train and validation
    if kind not in ("long text", "joined"):
        assert sorted(everything) == sorted(text.encode() for text in TEXTS)
        assert not set(train) & set(validation)
    if kind == "long text":
        assert sum(map(len, everything)) == len("".join(TEXTS).encode()) * LONG
    second = epoch_texts(data, epoch=1)
    loader = data.train_loader()
    batches = take(loader, sum(len(text) + 1 for text in train + second) // (37 * 3) + 1)
    assert texts_of(batches)[: len(train) + len(second)] == train + second
    assert sorted(second) == sorted(train) and second != train


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_loader_resumes_at_exactly_the_next_batch(corpus: Corpus, kind: str, prefetch: int) -> None:
    config = corpus(kind).with_(prefetch=prefetch)
    data = Data(config)
    an_epoch = sum(len(text) + 1 for text in epoch_texts(data)) // (37 * 3)
    loader = data.train_loader()
    states, batches = [], []
    for _ in range(min(an_epoch, 150) + 60):
        states.append(json.dumps(loader.state_dict()))
        batches.append(next(loader))
    if an_epoch <= 150:
        assert json.loads(states[-1])["place"]["epoch"] >= 1
    every = 9 if kind in ("hf", "long text") else 4 if prefetch else 1  # what reads ahead reads the same places
    again = Loader(config, source=data.source)
    for i in range(0, len(batches) - 3, every):
        again.load_state_dict(json.loads(states[i]))
        assert json.dumps(again.state_dict()) == states[i]
        assert all(map(same, take(again, 3), batches[i : i + 3])), f"after batch {i}"
    fresh = Data(config).train_loader()
    fresh.load_state_dict(json.loads(states[40]))
    assert all(map(same, take(fresh, len(batches) - 40), batches[40:]))


def test_a_loader_resumes_among_files_of_the_same_name(tmp_path: Path) -> None:
    """Below two folders; three parts, so that a name stands three times."""
    for i in range(30):
        for folder in "abc":
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{i}.py").write_text(f"{folder} = {folder}\n" * 9)
    config = DataConfig(source=",".join(f"python:{tmp_path / folder}" for folder in "abc"), length=32, batch=1, prefetch=0)
    loader, again = Loader(config), Loader(config)
    for _ in range(100):
        again.load_state_dict(loader.state_dict())
        assert same(next(again), next(loader))


def test_a_loader_resumes_with_a_trained_tokenizer(corpus: Corpus, tmp_path: Path) -> None:
    train_bpe(TEXTS, 300, tmp_path / "bpe")
    loader = Data(corpus("jsonl").with_(tokenizer=str(tmp_path / "bpe"))).train_loader()
    take(loader, 4)
    state = loader.state_dict()
    expected = take(loader, 30)
    other = Data(corpus("jsonl").with_(tokenizer=str(tmp_path / "bpe"))).train_loader()
    other.load_state_dict(state)
    assert all(map(same, take(other, 30), expected))


def test_a_place_holds_for_rows_of_another_shape(corpus: Corpus) -> None:
    config = corpus("jsonl")
    loader = Data(config).train_loader()
    take(loader, 5)
    state, expected = loader.state_dict(), next(loader)
    wide = Data(config.with_(length=37 * 3, batch=1, packing=False)).train_loader()
    wide.load_state_dict(state)
    assert torch.equal(next(wide).targets.flatten(), expected.targets.flatten())


def test_the_order_depends_on_the_seed_alone(corpus: Corpus) -> None:
    config = corpus("python")
    one, two, other = (take(Data(c).train_loader(), 6) for c in (config, config, config.with_(seed=6)))
    assert all(map(same, one, two))
    assert not any(map(same, one, other))


def test_without_shuffling_documents_come_in_the_order_of_the_source(corpus: Corpus) -> None:
    data = Data(corpus("jsonl").with_(shuffle=False, validation_fraction=0.0))
    batches = take(data.train_loader(), 320)
    assert texts_of(batches)[:120] == [text.encode() for text in TEXTS] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_out_the_documents(corpus: Corpus, kind: str, world: int) -> None:
    data = Data(corpus(kind))
    shares = [epoch_texts(data, rank=rank, world=world) for rank in range(world)]
    assert sorted(itertools.chain(*shares)) == sorted(epoch_texts(data))
    for rank, share in enumerate(shares):
        loader = data.train_loader(rank=rank, world=world)
        batches = take(loader, sum(len(text) + 1 for text in share) // (37 * 3) + 1)
        assert texts_of(batches)[: len(share)] == share
        state, expected = loader.state_dict(), next(loader)
        again = data.train_loader(rank=rank, world=world)
        again.load_state_dict(state)
        assert same(next(again), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_validation_is_fixed_and_held_out(corpus: Corpus, kind: str) -> None:
    config = corpus(kind)
    batches = validation_batches(config, ByteTokenizer(), 10**6)
    assert sorted(texts_of(batches)) == sorted(epoch_texts(Data(config), side="validation"))
    again = Data(config.with_(seed=77)).validation(10**6)
    assert len(again) == len(batches) and all(map(same, again, batches))


def test_validation_takes_rows_evenly_from_more_text(corpus: Corpus) -> None:
    data = Data(corpus("long text"))
    whole = torch.cat([batch.targets for batch in data.validation(10**6)])
    part = data.validation(37 * 40)
    assert sum(batch.num_targets for batch in part) == 37 * 40
    assert [batch.targets.shape for batch in part] == [(3, 37)] * 14
    assert (part[-1].targets[1:] == -100).all() and part[-1].num_targets == 37
    kept = torch.cat([batch.targets for batch in part])[:40]
    assert torch.equal(kept, whole[torch.arange(40) * 8])


def test_other_text_to_validate_on(corpus: Corpus, tmp_path: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", ["only this", "and that"])
    data = Data(corpus("jsonl").with_(validation_source=str(other)))
    assert sorted(texts_of(data.validation(1000))) == [b"and that", b"only this"]
    assert sorted(epoch_texts(data)) == sorted(text.encode() for text in TEXTS)


def test_added_and_removed_files_leave_the_rest_in_place(corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = corpus("python").with_(prefetch=0)
    first = Data(config)
    order = epoch_texts(first)
    loader = first.train_loader()
    seen = texts_of(take(loader, 12))
    state = loader.state_dict()
    for i in range(40):
        (tmp_path / "many" / f"added{i}.py").write_text(f"# added {i}\n" * 9)
    later = Data(config)
    loader = later.train_loader()
    loader.load_state_dict(state)
    left = [text for text in texts_of(take(loader, 100)) if b"added" not in text]
    assert left[1 : len(order) - len(seen)] == order[len(seen) + 1 :]
    assert any(b"added" in text for text in epoch_texts(later))
    assert not caplog.records
    reading = first.source.pieces[0].path  # type: ignore[attr-defined]
    for piece in first.source.pieces:  # type: ignore[attr-defined]
        if Path(piece.path).read_bytes() == order[len(seen)]:
            reading = piece.path
    Path(reading).unlink()
    loader = Data(config).train_loader()
    loader.load_state_dict(state)
    with caplog.at_level(logging.WARNING):
        left = [text for text in texts_of(take(loader, 100)) if b"added" not in text]
    assert left[: len(order) - len(seen) - 1] == order[len(seen) + 1 :]
    assert "has changed" in caplog.text


class Flaky(Source):
    """Fails once, in the middle."""

    name = "flaky"
    failed = False

    def units(self, view: View, epoch: int, start: Any = None) -> Iterator[Unit]:
        for i in range(start or 0, 50):
            if i == 20 and not self.failed:
                self.failed = True
                raise ConnectionError("no route")
            yield Unit(i, [f"document {epoch} {i} " * 5])


@pytest.mark.parametrize("prefetch", [0, 2])
def test_an_error_while_reading_loses_nothing(prefetch: int) -> None:
    config = DataConfig(length=100, batch=1, prefetch=prefetch)
    good, flaky = Flaky(), Flaky()
    good.failed = True
    expected = take(Loader(config, source=good), 40)
    loader = Loader(config, source=flaky)
    got: list[Batch] = []
    with pytest.raises(ConnectionError):
        for _ in range(40):
            got.append(next(loader))
    got += take(loader, 40 - len(got))
    assert all(map(same, got, expected))


def test_a_state_of_another_run_is_refused(corpus: Corpus) -> None:
    config = corpus("python")
    state = Data(config).train_loader().state_dict()
    for other in (config.with_(seed=6), config.with_(shuffle=False), config.with_(validation_fraction=0.1)):
        with pytest.raises(DataError, match="was saved with"):
            Data(other).train_loader().load_state_dict(state)
    with pytest.raises(DataError, match="world = 1, this run has 2"):
        Data(config).train_loader(rank=0, world=2).load_state_dict({**state, "rank": 0})
    with pytest.raises(DataError, match="saved with source = None"):
        Data(config).train_loader().load_state_dict({})


def test_nothing_to_read_is_an_error_that_says_so(tmp_path: Path) -> None:
    config = DataConfig(source=str(write_jsonl(tmp_path / "x.jsonl", ["", "one text"])), validation_fraction=0.0)
    with pytest.raises(DataError, match="validation_source"):
        Data(config).validation(100)
    with pytest.raises(DataError, match="process 1 of 2"):
        next(Data(config).train_loader(rank=1, world=2))
    empty = DataConfig(source=str(write_jsonl(tmp_path / "empty.jsonl", ["", ""])))
    with pytest.raises(DataError, match=r"no document with text.*validation_fraction \(gdn train --data\.validation-fraction\)"):
        next(Data(empty).train_loader())
    with pytest.raises(DataError, match=r"^validation_source .*empty.jsonl: no document with text$"):
        Data(config.with_(validation_source=empty.source)).validation(100)


def test_wrong_values_are_named() -> None:
    for wrong in ({"length": 0}, {"batch": 0}, {"seed": -1}, {"prefetch": -1}, {"validation_fraction": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            DataConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="rank"):
        Loader(DataConfig(), rank=2, world=2)
    with pytest.raises(ArgumentError, match="max_tokens"):
        validation_batches(DataConfig(), ByteTokenizer(), 0)
    with pytest.raises(DataError, match="holds tokens"):
        next(_token_documents())


def _token_documents() -> Iterator[str]:
    class Tokens(Flaky):
        def units(self, view: View, epoch: int, start: Any = None) -> Iterator[Unit]:
            yield Unit(0, [np.array([1, 2])])

    data = Data(DataConfig())
    data.__dict__["source"] = Tokens()
    return data.documents()


def test_the_default_is_the_python_on_this_machine_and_is_read_lazily(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    read_lines = files.read_lines
    monkeypatch.setattr(files, "read_lines", lambda path, *span: opened.append(path) or read_lines(path, *span))
    data = Data(DataConfig(length=64, batch=2))
    loader = data.train_loader()
    batch = next(loader)
    assert batch.tokens.shape == (2, 64) and batch.num_targets == 128
    assert len(opened) < 100
    del loader
    held_out = sum(piece.held_out for piece in data.source.pieces) / len(data.source.pieces)  # type: ignore[attr-defined]
    assert 0.01 < held_out < 0.03
    assert sum(b.num_targets for b in data.validation(4096)) == 4096


def test_documents_for_a_tokenizer(corpus: Corpus, tmp_path: Path) -> None:
    data = Data(corpus("text"))
    train_bpe(data.documents(), 280, tmp_path)
    assert load_tokenizer(tmp_path).vocab_size == 280
    assert [text.encode() for text in data.documents()] == epoch_texts(data)
