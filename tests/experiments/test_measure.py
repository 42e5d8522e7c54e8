"""Measures, against counting by hand; the decoder from the last place sees nothing else."""

from __future__ import annotations

import pytest
import torch

from gdn.data.synthetic import MQAR, Compression, Parity, RegBench
from gdn.data.synthetic.base import IGNORE, Sample
from gdn.experiments.definition import Test
from gdn.experiments.measure import MEASURES, Tally, score
from gdn.experiments.readout import FromLast, Model, build, place_codes
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

TARGETS = torch.tensor([[0, IGNORE, 1, 2], [0, IGNORE, 0, IGNORE]])
SAID = torch.tensor([0, 1, 0, 0, 1])  # at the five places that are asked
TRUTH = torch.zeros(2, 4, 3)
TRUTH[TARGETS != IGNORE] = torch.tensor([[0.5, 0.5, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [0.5, 0.5, 0]])


def tally() -> Tally:
    found = Tally()
    logits = torch.full((5, 3), -40.0).scatter(1, SAID[:, None], 40.0)
    found.add(Sample(torch.zeros_like(TARGETS), TARGETS, TRUTH), TARGETS != IGNORE, logits)
    return found


@pytest.mark.parametrize(
    ("measure", "value"),
    [
        ("tokens", 3 / 5),  # hits: yes yes no, yes no
        ("sequences", 0.0),
        ("classes", (2 / 3 + 1 + 0) / 3),  # two of three zeros, the one, not the two
        ("legal", 4 / 5),  # the 0 where only a 2 can follow
        ("distance", (0.5 + 0 + 1 + 0 + 0.5) / 5),
    ],
)
def test_measures(measure: str, value: float) -> None:
    assert MEASURES[measure](tally()) == pytest.approx(value, abs=1e-6)


def test_profiles() -> None:
    assert tally().profile(whole=False) == [(0, 1.0), (2, 0.5), (3, 0.0)]
    assert tally().profile(whole=True) == [(0, 1.0), (2, 0.5), (3, 0.0)]
    later = Tally()
    targets = torch.tensor([[0, 1, 1], [0, 0, 0]])
    later.add(Sample(targets, targets), targets >= 0, torch.eye(2)[torch.tensor([0, 0, 1, 0, 0, 0])])
    assert later.profile(whole=False) == [(0, 1.0), (1, 0.5), (2, 1.0)]
    assert later.profile(whole=True) == [(0, 1.0), (1, 0.5), (2, 0.5)]  # what was missed once stays missed


def test_a_long_profile_is_thinned_and_keeps_its_ends() -> None:
    long = Tally()
    targets = torch.zeros(1, 1000, dtype=torch.int64)
    long.add(Sample(targets, targets), targets >= 0, torch.zeros(1000, 2))
    places = [place for place, _ in long.profile(whole=False)]
    assert len(places) == 64
    assert (places[0], places[-1]) == (0, 999)


def model(vocab: int) -> Model:
    torch.manual_seed(0)
    return Model(LM.Config(vocab=vocab, width=8, layers=1, mlp=8, pattern=(GatedDeltaNet.Config(heads=1, head_dim=4),)))


def test_a_test_is_the_same_for_all_models_whatever_the_batch() -> None:
    tested, task = model(3), Parity(length=5, shortest=5, running=True)
    one = score(tested, Test(name="", task=task, examples=32, batch=32))
    torch.manual_seed(5)
    assert score(tested, Test(name="", task=task, examples=32, batch=32)) == one
    assert tested.training


def test_scores_of_an_untrained_model_equal_a_direct_computation() -> None:
    tested, task = model(20), RegBench(length=60)
    sample = task.sample(6, torch.Generator().manual_seed(20_000), "test")
    asked = sample.targets != IGNORE
    with torch.no_grad():
        logits = tested.lm(sample.tokens).logits[asked]
    hits = (logits.argmax(-1) == sample.targets[asked]).float().mean()
    assert score(tested, Test(name="", task=task, examples=6, batch=6)).value == pytest.approx(float(hits))
    distance = (logits.softmax(-1) - sample.next_token[asked]).abs().sum(-1).mean() / 2
    found = score(tested, Test(name="", task=task, measure="distance", examples=6, batch=6)).value
    assert found == pytest.approx(float(distance), abs=1e-6)


def test_the_loss_is_that_of_the_language_model() -> None:
    tested = model(40)
    tokens, targets, _ = MQAR(vocab=40, length=32, pairs=4).sample(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(tested(tokens, targets=targets).loss, tested.lm(tokens, targets=targets).loss)


def test_compression_is_decoded_from_the_last_place_only() -> None:
    task = Compression(vocab=6, length=9)
    torch.manual_seed(0)
    config = LM.Config(vocab=6, width=8, layers=1, mlp=8, pattern=(GatedDeltaNet.Config(heads=1, head_dim=4),))
    tested = build(config, task)
    assert isinstance(tested, FromLast)
    assert not isinstance(build(config, Parity()), FromLast)
    seen: list[torch.Tensor] = []
    tested.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    tokens = task.sample(2, torch.Generator().manual_seed(0)).tokens
    tested.hidden(tokens)
    last = tested.lm.hidden(tokens)[0][:, -1]
    torch.testing.assert_close(seen[0] - place_codes(9, 8), last[:, None].expand(-1, 9, -1), atol=1e-6, rtol=0)
    assert place_codes(9, 8).unique(dim=0).shape[0] == 9  # every place can be told
    assert place_codes(4, 7).shape == (4, 7)
