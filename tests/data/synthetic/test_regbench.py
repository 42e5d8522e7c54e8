"""RegBench: sequences are replayed on automata, minimal forms are compared by language, splits share no automaton."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from gdn.data.synthetic import RegBench
from gdn.data.synthetic.base import IGNORE
from gdn.data.synthetic.regbench import Automaton, minimal


def language(automaton: list[dict[int, int]] | Automaton, length: int) -> set[tuple[int, ...]]:
    """All words of at most this length from state 0."""
    words: set[tuple[int, ...]] = {()}
    border: set[tuple[tuple[int, ...], int]] = {((), 0)}
    for _ in range(length):
        border = {((*word, symbol), to) for word, state in border for symbol, to in automaton[state].items()}
        words |= {word for word, _ in border}
    return words


def test_minimal_automata_have_the_same_language_and_are_equal_for_equal_languages() -> None:
    task, rng = RegBench(vocab=5, alphabet=(2, 3), states=(2, 5)), np.random.default_rng(0)
    smaller = 0
    for _ in range(60):
        raw = task._any_automaton(rng)
        small = minimal(raw)
        assert language(small, 5) == language(raw, 5)
        assert minimal(list(small)) == small
        order = rng.permutation(len(raw) - 1) + 1  # rename all states but the first
        name = {0: 0, **{int(old): new for new, old in enumerate(order, start=1)}}
        renamed = [{}] * len(raw)
        for state, out in enumerate(raw):
            renamed[name[state]] = {symbol: name[to] for symbol, to in reversed(list(out.items()))}
        assert minimal(renamed) == small
        for a, b in itertools.combinations(range(len(small)), 2):
            assert language(rooted(small, a), 5) != language(rooted(small, b), 5)
        smaller += len(small) < len(raw)
    assert smaller


def rooted(automaton: Automaton, state: int) -> list[dict[int, int]]:
    """The same automaton with another first state."""
    swap = {0: state, state: 0}
    return [{symbol: swap.get(to, to) for symbol, to in automaton[swap.get(i, i)].items()} for i in range(len(automaton))]


def test_automata_are_as_described() -> None:
    task, rng = RegBench(), np.random.default_rng(0)
    states, out = set(), set()
    for _ in range(300):
        raw = task._any_automaton(rng)
        states.add(len(raw))
        for state, transitions in enumerate(raw):
            out.add(len(transitions))
            assert state not in transitions.values()
            assert len(set(transitions.values())) == len(transitions)
            assert all(0 <= symbol < 18 for symbol in transitions)
        assert 1 <= len({symbol for transitions in raw for symbol in transitions}) <= 18
    assert states == set(range(4, 13))
    assert out == {1, 2, 3}


def test_every_symbol_is_legal_and_the_distribution_is_that_of_its_automaton() -> None:
    task = RegBench(length=120, words=(3, 5), word_length=(1, 9))
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(0)))
    automata = np.random.default_rng(seed)  # the generator that the task makes for itself
    tokens, targets, truth = task.sample(1, torch.Generator().manual_seed(0))
    automaton = task.automaton(automata, "train")
    assert truth is not None
    state = 0
    row, wanted = tokens[0].tolist(), targets[0].tolist()
    for i, token in enumerate(row):
        if token == task.padding:
            assert set(wanted[i:]) == {IGNORE}
            break
        state = 0 if token == task.separator else automaton[state][token]
        following = row[i + 1] if i + 1 < len(row) else None
        if following == task.separator:
            assert wanted[i] == IGNORE
        elif wanted[i] != IGNORE:
            assert following in (wanted[i], task.padding, None)
            assert set(truth[0, i].nonzero().flatten().tolist()) == set(automaton[state])
            assert truth[0, i, wanted[i]] == torch.tensor(1 / len(automaton[state]))
    assert row.count(task.separator) in (2, 3, 4)


def test_words_have_the_published_lengths() -> None:
    task = RegBench()
    tokens, targets, _ = task.sample(150, torch.Generator().manual_seed(0))
    counts, lengths = [], []
    for row, wanted in zip(tokens.tolist(), targets.tolist()):
        read = row[: row.index(task.padding)]  # nothing is cut
        text = [*read, wanted[len(read) - 1]]
        ends = [-1, *(i for i, token in enumerate(text) if token == task.separator), len(text)]
        counts.append(len(ends) - 1)
        lengths += [end - start - 1 for start, end in itertools.pairwise(ends)]
    assert set(counts) == set(range(10, 20))
    assert set(lengths) == set(range(1, 50))
    assert abs(np.mean(lengths) - 25) < 1


def test_the_splits_have_different_automata() -> None:
    task, rng = RegBench(vocab=5, alphabet=(2, 3), states=(2, 3)), np.random.default_rng(0)
    train = {repr(task.automaton(rng, "train")) for _ in range(400)}
    test = {repr(task.automaton(rng, "test")) for _ in range(60)}
    assert not train & test
    assert len(test) > 5
