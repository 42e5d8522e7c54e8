"""What every generated task must satisfy."""

from __future__ import annotations

import pkgutil

import pytest
import torch

import gdn.data.synthetic
from gdn.core.errors import ArgumentError, ConfigError
from gdn.data.synthetic import (
    MQAR,
    CompositionalMQAR,
    Compression,
    ForgettingMQAR,
    FuzzyRecall,
    GroupWords,
    InContextRecall,
    InductionHeads,
    MADSelectiveCopying,
    Memorisation,
    ModularArithmetic,
    Needle,
    NoisyRecall,
    Parity,
    PhoneBook,
    RegBench,
    SelectiveCopying,
)
from gdn.data.synthetic.base import IGNORE, Split, Task

TASKS: list[Task] = [
    MQAR(vocab=40, length=32, pairs=5),
    ForgettingMQAR(vocab=40, length=48, pairs=6, updates=4),
    CompositionalMQAR(vocab=45, length=54, grid=3),
    Parity(length=12),
    ModularArithmetic(length=14),
    ModularArithmetic(length=15, brackets=True, operators="+-"),
    GroupWords(group="S3", elements=9),
    GroupWords(group="S4", elements=6, limit=2, repeat=3, filler=True),
    InContextRecall(length=24),
    NoisyRecall(length=24),
    FuzzyRecall(length=40),
    Memorisation(vocab=21, length=12),
    Compression(length=10),
    MADSelectiveCopying(length=20, copied=4),
    SelectiveCopying(context=20, copied=4),
    InductionHeads(length=20),
    Needle(level=1, length=256),
    Needle(level=2, length=256),
    Needle(level=3, length=256),
    RegBench(length=200),
    PhoneBook(entries=5, names=8, lookups=2),
]
SPLITS: list[Split] = ["train", "test"]
each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{type(task).__name__}")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_task_is_here() -> None:
    files = {module.name for module in pkgutil.iter_modules(gdn.data.synthetic.__path__)} - {"base"}
    assert {task.tag() for task in TASKS} == files
    assert {type(task).__name__ for task in TASKS} == set(gdn.data.synthetic.__all__) - {"Task", "Sample"}


@each_task
@pytest.mark.parametrize("split", SPLITS)
def test_tokens_and_targets_are_in_range_and_something_is_asked_in_every_row(task: Task, split: Split) -> None:
    tokens, targets, truth = task.sample(7, seeded(), split)
    assert tokens.dtype == targets.dtype == torch.int64
    assert tokens.shape == targets.shape
    assert tokens.shape[0] == 7
    assert tokens.shape[1] <= task.length
    assert tokens.min() >= 0
    assert tokens.max() < task.vocab
    asked = targets != IGNORE
    assert asked.any(dim=1).all()
    assert targets[asked].min() >= 0
    assert targets.max() < task.vocab
    if truth is not None:
        torch.testing.assert_close(truth.sum(-1), asked.float())


@each_task
@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_gives_the_same_data_and_another_gives_others(task: Task, split: Split) -> None:
    torch.manual_seed(1)
    first = task.sample(4, seeded(), split)
    torch.manual_seed(2)  # no task may draw from a global generator
    again, other = task.sample(4, seeded(), split), task.sample(4, seeded(1), split)
    assert torch.equal(first.tokens, again.tokens)
    assert torch.equal(first.targets, again.targets)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("task", [task for task in TASKS if not isinstance(task, Memorisation)], ids=lambda task: type(task).__name__)
def test_the_splits_share_no_sequence_with_the_same_seed(task: Task) -> None:
    """Memorisation asks both splits for one map, learned by heart: there a sequence of the test is meant to be known."""

    def drawn(split: Split) -> set[tuple[int, ...]]:
        generator = seeded()
        return {tuple(row) for _ in range(3) for row in task.sample(100, generator, split).tokens.tolist()}

    assert not drawn("train") & drawn("test")


@each_task
def test_one_generator_goes_on_from_batch_to_batch(task: Task) -> None:
    generator = seeded()
    assert not torch.equal(task.sample(4, generator).tokens, task.sample(4, generator).tokens)


@each_task
def test_round_trip(task: Task) -> None:
    assert Task.from_dict(task.to_dict()) == task


@each_task
def test_mistakes_in_calls_are_named(task: Task) -> None:
    with pytest.raises(ArgumentError, match="batch: expected at least 1, got 0"):
        task.sample(0, seeded())
    with pytest.raises(ArgumentError, match="split: expected"):
        task.sample(1, seeded(), "validation")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"type": "mqar", "length": 31, "pairs": 4}, "length: expected an even number of at least 4"),
        ({"type": "mqar", "length": 30, "pairs": 8}, "length: expected an even number of at least 4"),
        ({"type": "mqar", "vocab": 9, "pairs": 4, "length": 16}, "vocab: expected at least 10, got 9"),
        ({"type": "mqar", "power": 0.0}, "power: expected above 0"),
        ({"type": "mqar_forgetting", "pairs": 4, "updates": 5}, "updates: expected at most pairs=4"),
        ({"type": "mqar_forgetting", "pairs": 4, "updates": 4, "length": 22}, "length: expected"),
        ({"type": "mqar_compositional", "grid": 3, "length": 53}, "length: expected at least 54, got 53"),
        ({"type": "parity", "length": 2}, "length: expected at least shortest=3"),
        ({"type": "parity", "shortest": 1}, "shortest: expected at least 2, since the splits share no sequence"),
        (
            {"type": "modular_arithmetic", "modulus": 3, "shortest": 2},
            "shortest: expected at least 3 for modulus=3, since the splits share",
        ),
        ({"type": "modular_arithmetic", "modulus": 2, "shortest": 5, "brackets": True}, "shortest: expected at least 6 for modulus=2"),
        ({"type": "modular_arithmetic", "modulus": 11}, "modulus: expected from 2 to 10"),
        ({"type": "modular_arithmetic", "shortest": 5, "length": 5}, "length: expected at least 6"),
        ({"type": "modular_arithmetic", "operators": "+/"}, "operators: expected some of"),
        ({"type": "group_words", "group": "S9"}, "group: expected Z2 to Z1000"),
        ({"type": "group_words", "group": "A5", "limit": 2}, "limit, least: expected to leave two elements"),
        ({"type": "group_words", "group": "Z2", "elements": 3}, "elements: expected enough"),
        ({"type": "group_words", "held_out": 0.0}, "held_out: expected above 0"),
        ({"type": "mad_recall", "length": 7}, "length: expected an even number"),
        ({"type": "mad_noisy_recall", "noise_vocab": 0}, "noise_vocab: expected at least 1"),
        ({"type": "mad_noisy_recall", "noise": 1.0}, "noise: expected from 0 to below 1"),
        ({"type": "mad_fuzzy_recall", "length": 17}, "length: expected at least 6"),
        ({"type": "mad_memorisation", "length": 5}, "length: expected an even number"),
        ({"type": "mad_compression", "length": 1}, "length: expected at least 2"),
        ({"type": "mad_selective_copying", "copied": 8, "length": 16}, "length: expected at least 17"),
        ({"type": "selective_copying", "copied": 8, "context": 7}, "context: expected at least copied=8"),
        ({"type": "induction_heads", "length": 2}, "length: expected at least 3"),
        ({"type": "needle", "level": 4}, "level: expected one of 1, 2, 3"),
        ({"type": "needle", "vocab": 100}, "vocab: expected at least"),
        ({"type": "needle", "source": "no/such/file.txt"}, "source: expected a text file"),
        ({"type": "regbench", "alphabet": [4, 19]}, "alphabet: expected at most vocab - 2 = 18"),
        ({"type": "regbench", "words": [5, 4]}, "words: expected 1 <= fewest <= most"),
        ({"type": "phone_book", "entries": 5, "names": 2}, "entries: expected at most names"),
        ({"type": "phone_book", "lookups": 30}, "lookups: expected at most entries=20"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Task.from_dict(values)
