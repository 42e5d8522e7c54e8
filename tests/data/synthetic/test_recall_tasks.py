"""Recall: labels are recomputed by reading each sequence with a dictionary."""

from __future__ import annotations

import pytest
import torch

from gdn.data.synthetic import (
    MQAR,
    CompositionalMQAR,
    ForgettingMQAR,
    FuzzyRecall,
    InContextRecall,
    InductionHeads,
    Memorisation,
    NoisyRecall,
    PhoneBook,
)
from gdn.data.synthetic.base import IGNORE
from gdn.data.synthetic.mqar import weighted_slots
from gdn.data.synthetic.phone_book import ASK, COLON, END, NAMES


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("random_fill", [False, True])
def test_mqar(random_fill: bool) -> None:
    task = MQAR(vocab=60, length=48, pairs=7, random_fill=random_fill)
    tokens, targets, _ = task.sample(50, seeded())
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        keys, values = row[0:14:2], row[1:14:2]
        assert len(set(keys)) == len(set(values)) == 7
        assert all(1 <= key < 30 for key in keys)
        assert all(30 <= value < 60 for value in values)
        value_of = dict(zip(keys, values))
        asked = [i for i, target in enumerate(wanted) if target != IGNORE]
        assert sorted(row[i] for i in asked) == sorted(keys)  # every key once
        assert all(wanted[i] == value_of[row[i]] for i in asked)
        assert all(i >= 14 and (i - 14) % 2 == 0 for i in asked)
        if not random_fill:
            assert all(row[i] == 0 for i in range(14, 48) if i not in asked)
    if random_fill:
        rest = tokens[:, 14:][targets[:, 14:] == IGNORE]
        assert rest.unique().numel() == 60  # the whole vocabulary


def test_slots_have_the_weights_of_the_power() -> None:
    first = weighted_slots(20_000, 3, 6, 0.01, seeded())[:, 0]
    expected = torch.arange(1, 7).double() ** (0.01 - 1)
    torch.testing.assert_close(torch.bincount(first).double() / 20_000, expected / expected.sum(), atol=0.015, rtol=0)
    uniform = weighted_slots(20_000, 1, 6, 1.0, seeded())
    assert (torch.bincount(uniform.flatten()) / 20_000 - 1 / 6).abs().max() < 0.015


def test_slots_are_drawn_without_replacement_one_after_another() -> None:
    drawn = weighted_slots(40_000, 2, 3, 0.5, seeded())
    p = torch.arange(1, 4).double() ** -0.5
    p /= p.sum()
    for a in range(3):
        for b in range(3):
            share = ((drawn[:, 0] == a) & (drawn[:, 1] == b)).double().mean()
            assert abs(share - (0 if a == b else p[a] * p[b] / (1 - p[a]))) < 0.01


def test_forgetting_mqar_wants_the_last_value_and_updates_change_it() -> None:
    task = ForgettingMQAR(vocab=30, length=60, pairs=8, updates=5, random_fill=False)
    tokens, targets, _ = task.sample(100, seeded())
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        first = dict(zip(row[0:16:2], row[1:16:2]))
        second = dict(zip(row[16:26:2], row[17:26:2]))
        assert len(first) == 8
        assert len(second) == 5
        assert all(first[key] != value and 15 <= value < 30 for key, value in second.items())
        last = first | second
        asked = [i for i, target in enumerate(wanted) if target != IGNORE]
        assert sorted(row[i] for i in asked) == sorted(first)
        assert all(wanted[i] == last[row[i]] for i in asked)


def test_updates_come_in_any_order() -> None:
    tokens, _, _ = ForgettingMQAR(vocab=30, length=16, pairs=3, updates=2).sample(3000, seeded())
    assert_uniform((tokens[:, 6:10:2].unsqueeze(2) == tokens[:, None, 0:6:2]).int().argmax(dim=2), orders=6)


def assert_uniform(rows: torch.Tensor, orders: int) -> None:
    """As many different rows as expected, each as often."""
    found, counts = rows.unique(dim=0, return_counts=True)
    assert len(found) == orders
    assert (counts / len(rows) - 1 / orders).abs().max() < 0.03


def test_compositional_mqar_has_a_full_grid_of_keys() -> None:
    task = CompositionalMQAR(vocab=45, length=60, grid=3, random_fill=False)
    tokens, targets, _ = task.sample(60, seeded())
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        cells = {(row[i], row[i + 1]): row[i + 2] for i in range(0, 27, 3)}
        firsts, seconds = {a for a, _ in cells}, {b for _, b in cells}
        assert len(cells) == 9
        assert len(firsts) == len(seconds) == 3
        assert all(1 <= a < 15 for a in firsts)
        assert all(15 <= b < 30 for b in seconds)
        assert len(set(cells.values())) == 9
        asked = [i for i, target in enumerate(wanted) if target != IGNORE]
        assert {(row[i - 1], row[i]) for i in asked} == set(cells)
        assert all(wanted[i] == cells[row[i - 1], row[i]] for i in asked)


def read_recall(row: list[int], wanted: list[int], *, half: int, real: int) -> int:
    """Check the test targets of a sequence of pairs; the number of places that are asked."""
    value_of: dict[int, int] = {}
    asked = 0
    for i in range(0, len(row), 2):
        key = row[i]
        assert i == len(row) - 1 or wanted[i + 1] == IGNORE
        if key >= real:
            assert row[i + 1] >= real  # noise comes in pairs
            assert wanted[i] == IGNORE
            continue
        assert key < half
        assert wanted[i] == value_of.get(key, IGNORE)
        asked += wanted[i] != IGNORE
        if i + 1 < len(row):
            assert half <= row[i + 1] < real
            assert value_of.setdefault(key, row[i + 1]) == row[i + 1]
    assert wanted[-1] != IGNORE  # the last pair has been shown
    return asked


def test_in_context_recall() -> None:
    task = InContextRecall(vocab=16, length=40)
    tokens, targets, _ = task.sample(60, seeded(), "test")
    assert tokens.shape == (60, 39)
    assert sum(read_recall(row, wanted, half=8, real=16) for row, wanted in zip(tokens.tolist(), targets.tolist())) > 60


def test_the_last_probe_is_any_of_the_keys_shown() -> None:
    tokens = InContextRecall(vocab=16, length=12).sample(3000, seeded(), "test").tokens
    ranks, expected = torch.zeros(5), torch.zeros(5)
    for row in tokens.tolist():
        shown = sorted(set(row[0:10:2]))
        ranks[shown.index(row[10])] += 1
        expected[: len(shown)] += 1 / len(shown)
    assert ((ranks - expected) / len(tokens)).abs().max() < 0.03


def test_in_context_recall_trains_on_every_next_token() -> None:
    tokens, targets, _ = InContextRecall(length=20).sample(30, seeded(), "train")
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    asked = InContextRecall(length=20).draw(30, seeded(), "test").targets  # of the same sequences
    assert torch.equal(targets[asked != IGNORE], asked[asked != IGNORE])


@pytest.mark.parametrize("noise", [0.2, 0.9])
def test_noisy_recall(noise: float) -> None:
    task = NoisyRecall(vocab=32, noise_vocab=16, noise=noise, length=60)
    tokens, targets, _ = task.sample(200, seeded(), "test")
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        read_recall(row, wanted, half=8, real=16)
    share = (tokens[:, 0:-1:2] >= 16).float().mean()
    assert abs(share - noise * 28 / 29) < 0.02  # of 29 pairs before the last one is never noise


@pytest.mark.parametrize("split", ["train", "test"])
def test_fuzzy_recall(split: str) -> None:
    task = FuzzyRecall(vocab=16, length=60, motif=3)
    half, pad = 7, 15
    sizes = set()
    tokens, targets, _ = task.sample(80, seeded(), split)  # type: ignore[arg-type]
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        assert len(row) == 60
        start = next(i for i, token in enumerate(row) if token != pad)
        assert pad not in row[start:]
        row, wanted = row[start:], wanted[start:]
        value_of: dict[tuple[int, ...], tuple[int, ...]] = {}
        asked: dict[int, int] = {}
        i = 0
        while i < len(row):
            k = next((j for j in range(i, len(row)) if row[j] >= half), len(row))
            v = next((j for j in range(k, len(row)) if row[j] < half), len(row))
            key, value = tuple(row[i:k]), tuple(row[k:v])
            assert 1 <= len(set(key)) == len(key) <= 3
            sizes.add(len(key))
            if v == len(row):  # the probe; its value's last token is only a target
                value = (*value, wanted[-1])
                assert key in value_of
            assert 1 <= len(set(value)) == len(value) <= 3
            if key in value_of:
                assert value_of[key] == value
                asked |= {k - 1 + n: token for n, token in enumerate(value)}
            value_of[key] = value
            i = v
        if split == "test":
            assert {i: target for i, target in enumerate(wanted) if target != IGNORE} == asked
        else:
            assert wanted[:-1] == row[1:]
    assert sizes == ({1, 2, 3} if split == "train" else {3})


def test_memorisation_has_one_map_for_all_sequences() -> None:
    task = Memorisation(vocab=24, length=20)
    value_of: dict[int, int] = {}
    for split in ("train", "test"):
        tokens, targets, _ = task.sample(40, seeded(), split)
        assert (tokens[:, 1::2] == 23).all()
        assert (targets[:, 0::2] == IGNORE).all()
        for key, value in zip(tokens[:, 0::2].flatten().tolist(), targets[:, 1::2].flatten().tolist()):
            assert value_of.setdefault(key, value) == value
    assert set(value_of) == set(range(11))
    assert len(set(value_of.values())) == 11
    assert all(11 <= value < 23 for value in value_of.values())
    other = task.with_(map_seed=1).sample(40, seeded())
    assert not torch.equal(other.targets, task.sample(40, seeded()).targets)


def test_induction_heads() -> None:
    tokens, targets, _ = InductionHeads(vocab=9, length=12).sample(200, seeded())
    places = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        assert row.count(8) == 2
        assert row[-1] == 8
        place = row.index(8)
        places.add(place)
        assert wanted == [IGNORE] * 11 + [row[place + 1]]
    assert places == set(range(10))


@pytest.mark.parametrize("split", ["train", "test"])
def test_phone_book(split: str) -> None:
    task = PhoneBook(entries=6, digits=3, names=4, lookups=2)
    tokens, targets, _ = task.sample(40, seeded(), split)  # type: ignore[arg-type]
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        assert len(row) == task.length
        book = {}
        for i in range(0, 6 * 7, 7):
            first, last, colon, *number, end = row[i : i + 7]
            assert NAMES <= first < NAMES + 4 <= last < NAMES + 8
            assert (colon, end) == (COLON, END)
            book[first, last] = number
        assert len(book) == 6
        asked = {}
        for n, i in enumerate((42, 50)):
            assert row[i] == ASK
            number = book[row[i + 1], row[i + 2]]
            assert row[i + 4 : i + 7] == number
            if split == "train" or n == 1:
                asked |= {i + 3 + d: digit for d, digit in enumerate(number)}
        assert row[43:45] != row[51:53]
        assert {i: target for i, target in enumerate(wanted) if target != IGNORE} == asked


def test_look_ups_come_in_any_order() -> None:
    task = PhoneBook(entries=3, digits=1, names=8, lookups=2)
    tokens, _, _ = task.sample(3000, seeded())
    book, asked = tokens[:, :15].unflatten(1, (3, 5))[:, :, :2], torch.stack((tokens[:, 16:18], tokens[:, 22:24]), dim=1)
    assert_uniform((asked.unsqueeze(2) == book.unsqueeze(1)).all(dim=3).int().argmax(dim=2), orders=6)
