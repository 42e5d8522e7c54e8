"""State tracking: parity by counting, expressions by Python, words by composing permutations."""

from __future__ import annotations

import itertools

import pytest
import torch

from gdn.data.synthetic import GroupWords, ModularArithmetic, Parity
from gdn.data.synthetic.base import IGNORE, Split, on_split, padded_row_keys, row_keys
from gdn.data.synthetic.group_words import group


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("running", [False, True])
def test_parity(running: bool) -> None:
    tokens, targets, _ = Parity(length=10, shortest=3, running=running).sample(300, seeded())
    lengths = set()
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        bits = [token - 1 for token in row if token]
        lengths.add(len(bits))
        assert row[len(bits) :] == [0] * (10 - len(bits))
        right = [1 + sum(bits[: i + 1]) % 2 for i in range(len(bits))]
        if not running:
            right = [IGNORE] * (len(bits) - 1) + right[-1:]
        assert wanted == right + [IGNORE] * (10 - len(bits))
    assert lengths == set(range(3, 11))


@pytest.mark.parametrize(
    "task",
    [
        ModularArithmetic(length=17, shortest=4),
        ModularArithmetic(length=12, shortest=12, modulus=3, operators="*-"),
        ModularArithmetic(length=21, shortest=2, brackets=True, operators="+-"),
        ModularArithmetic(length=16, shortest=16, brackets=True, modulus=7),
    ],
)
def test_modular_arithmetic(task: ModularArithmetic) -> None:
    tokens, targets, _ = task.sample(300, seeded())
    lengths, operators = set(), set()
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        text = "".join(task.symbols[token] for token in row)
        expression, equals, rest = text.partition("=")
        assert equals == "="
        assert set(rest) <= {"."}
        right = [IGNORE] * task.length
        right[len(expression)] = task.symbols.index(str(eval(expression) % task.modulus))
        assert wanted == right
        lengths.add(len(expression) + 1)
        operators |= set(expression) & set("+-*")
    assert min(lengths) >= task.shortest
    assert max(lengths) == task.length - (task.length % 2 and not task.brackets)
    assert operators - {"-"} == set(task.operators) - {"-"}


def test_brackets_are_split_anywhere() -> None:
    task = ModularArithmetic(length=13, shortest=13, brackets=True)
    firsts = []
    for row in task.sample(1200, seeded()).tokens.tolist():
        text = "".join(task.symbols[token] for token in row)
        left = text[1:3] if text[1] == "-" else text[1]
        while left.count("(") > left.count(")"):
            left = text[1 : 2 + len(left)]
        firsts.append(len(left))
    shares = torch.bincount(torch.tensor(firsts)) / len(firsts)
    assert len(shares) == 9  # 1 to 8 symbols of the 12 with two brackets and an operator
    assert (shares[1:] - 1 / 8).abs().max() < 0.04


def rows_of(task: ModularArithmetic | Parity, count: int, split: Split) -> set[tuple[int, ...]]:
    return {tuple(row) for row in task.sample(count, seeded(), split).tokens.tolist()}


@pytest.mark.parametrize(
    ("task", "different"),
    [
        (Parity(length=2, shortest=2), 4),
        (Parity(length=6, shortest=6), 64),
        (Parity(length=8, shortest=3, running=True), 504),
        (ModularArithmetic(length=2, shortest=2), 5),
        (ModularArithmetic(length=4, shortest=2), 80),
        (ModularArithmetic(length=4, shortest=4, modulus=2, operators="+"), 4),
        (ModularArithmetic(length=6, shortest=2, brackets=True), 4 * 5 + 75),
        (ModularArithmetic(length=8, shortest=6, brackets=True, modulus=2, operators="-"), 4 + 8 + 12),
    ],
)
def test_the_splits_share_no_content_and_have_all_together(task: ModularArithmetic | Parity, different: int) -> None:
    train, test = rows_of(task, 40 * different, "train"), rows_of(task, 10 * different, "test")
    assert not train & test
    assert len(train | test) == different
    for length in {sum(token > 0 for token in row) for row in train | test}:
        mine, held_out = ({row for row in rows if sum(token > 0 for token in row) == length} for rows in (train, test))
        share = len(held_out) / len(mine | held_out)
        assert abs(share - 1 / 8) < (0.04 if len(mine | held_out) >= 128 else 1 / 8 + 1e-9)
        assert held_out


@pytest.mark.parametrize("split", ["train", "test"])
def test_splits_keep_the_distribution_of_lengths(split: Split) -> None:
    for task, lengths in (
        (Parity(length=10), range(3, 11)),
        (ModularArithmetic(length=12, shortest=2), range(2, 13, 2)),
        (ModularArithmetic(length=12, shortest=4, brackets=True), range(4, 13)),
    ):
        tokens, targets, _ = task.sample(2000, seeded(), split)
        found, counts = (tokens > 0).sum(1).unique(return_counts=True)
        assert found.tolist() == list(lengths)
        assert (counts / 2000 - 1 / len(lengths)).abs().max() < 0.04
        answers = targets[targets != IGNORE].bincount()[1:]
        if split == "train":
            assert (answers / 2000 - 1 / len(answers)).abs().max() < 0.12


def test_a_content_is_on_one_side_whatever_the_longest_length() -> None:
    short, long = Parity(length=9, shortest=9), Parity(length=40, shortest=9)
    padded = {(*row, *[0] * 31) for row in rows_of(short, 3000, "train")}
    assert len(padded) > 400
    assert not padded & rows_of(long, 3000, "test")
    assert padded & rows_of(long, 3000, "train")


def test_a_long_expression_does_not_list_all_others() -> None:
    assert ModularArithmetic(length=60, shortest=60, brackets=True).sample(2, seeded(), "test").tokens.shape == (2, 60)


def test_the_vocabularies_of_arithmetic_are_the_published_ones() -> None:
    assert ModularArithmetic().vocab == 10
    assert ModularArithmetic(brackets=True).vocab == 12


@pytest.mark.parametrize(("name", "size"), [("Z5", 5), ("S3", 6), ("S4", 24), ("A4", 12), ("A5", 60), ("S5", 120)])
def test_groups_are_groups(name: str, size: int) -> None:
    table = group(name).table
    assert table.shape == (size, size)
    everything = torch.arange(size)
    assert torch.equal(table[0], everything)
    assert torch.equal(table[:, 0], everything)
    assert all(torch.equal(row.sort().values, everything) for row in [*table, *table.T])  # everything can be undone
    a, b, c = torch.randint(size, (3, 500), generator=seeded())
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert torch.equal(table, table.T) == (name[0] == "Z")


@pytest.mark.parametrize("name", ["S3", "A4", "Z7"])
def test_words_are_multiplied_out(name: str) -> None:
    task = GroupWords(group=name, elements=8)
    size = int(name[1:])
    permutations = list(itertools.permutations(range(size))) if name[0] != "Z" else []
    if name[0] == "A":
        # even: a product of an even number of swaps, found by sorting
        permutations = [p for p in permutations if swaps(p) % 2 == 0]
    tokens, targets, _ = task.sample(100, seeded())
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        assert row[0] == wanted[0] == task.size
        if name[0] == "Z":
            assert wanted[1:] == [sum(row[1 : i + 1]) % size for i in range(1, 9)]
            continue
        things = list(range(size))
        for element, product in zip(row[1:], wanted[1:]):
            things = [permutations[element][thing] for thing in things]  # first what came before, then this
            assert permutations[product] == tuple(things)


def swaps(permutation: tuple[int, ...]) -> int:
    things, count = list(permutation), 0
    for i in range(len(things)):
        while things[i] != i:
            j = things[i]
            things[i], things[j] = things[j], things[i]
            count += 1
    return count


def test_limit_reads_swaps_only_and_the_products_go_everywhere() -> None:
    task = GroupWords(group="S5", elements=20, limit=2)
    assert len(task.readable) == 11  # the identity and ten swaps
    tokens, targets, _ = task.sample(200, seeded())
    assert set(tokens[:, 1:].flatten().tolist()) == set(task.readable.tolist())
    assert targets[:, 1:].unique().numel() == 120
    assert task.vocab == 127


def test_least_reads_what_moves_as_many_things() -> None:
    task = GroupWords(group="A5", elements=6, least=5)
    permutations = [p for p in itertools.permutations(range(5)) if swaps(p) % 2 == 0]
    cycles = {i for i, p in enumerate(permutations) if all(p[j] != j for j in range(5))}
    assert len(cycles) == 24
    tokens, targets, _ = task.sample(200, seeded())
    assert set(tokens[:, 1:].flatten().tolist()) == cycles
    assert targets[:, 2:].unique().numel() == 60
    assert len(task.with_(least=3, limit=4).readable) == 20 + 15  # three in a cycle, and two swaps


@pytest.mark.parametrize("filler", [False, True])
def test_repeat_asks_at_the_last_token_of_an_element(filler: bool) -> None:
    plain = GroupWords(group="S3", elements=6).sample(20, seeded())
    task = GroupWords(group="S3", elements=6, repeat=4, filler=filler)
    tokens, targets, _ = task.sample(20, seeded())
    assert tokens.shape == (20, 25)
    assert torch.equal(tokens[:, 1::4], plain.tokens[:, 1:])
    assert torch.equal(targets[:, 4::4], plain.targets[:, 1:])
    assert (targets[:, 1:].unflatten(1, (6, 4))[:, :, :3] == IGNORE).all()
    rest = tokens[:, 1:].unflatten(1, (6, 4))[:, :, 1:]
    assert (rest == (7 if filler else plain.tokens[:, 1:].unsqueeze(-1))).all()


def test_words_of_the_splits_are_disjoint_and_share_the_space_as_asked() -> None:
    task = GroupWords(group="Z2", elements=10, held_out=0.25)
    seen = {split: {tuple(row) for row in task.sample(8000, seeded(), split).tokens.tolist()} for split in ("train", "test")}
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == 1024  # every word is in one of them
    assert abs(len(seen["test"]) / 1024 - 0.25) < 0.05


def test_the_split_of_a_content_never_changes() -> None:
    keys = row_keys(torch.tensor([[0, 1, 2], [2, 1, 0]]))
    assert keys.tolist() == [12421565313168862949, 11938559158514737459]
    assert on_split(keys, "test", 0.66).tolist() == [False, True]
    assert padded_row_keys(torch.tensor([[1, 2, 2, 0], [2, 1, 0, 0]])).tolist() == [15765973693405769320, 4794775412569211584]
