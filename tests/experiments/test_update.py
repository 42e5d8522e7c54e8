"""The update of a model, called and replayed; what is held for a replay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gdn.core.errors import NonFiniteError
from gdn.data.synthetic import MQAR, GroupWords, Parity
from gdn.data.synthetic.base import IGNORE, Sample
from gdn.data.synthetic.mad_compression import Compression
from gdn.experiments.definition import Training
from gdn.experiments.inputs import Inputs, stream
from gdn.experiments.learn import finite
from gdn.experiments.readout import Model, build
from gdn.experiments.update import WARM, Update
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.train import AdamW, Schedule

TASKS = (MQAR(vocab=16, length=16, pairs=3), MQAR(vocab=16, length=24, pairs=3))
MODEL = LM.Config(vocab=16, width=16, layers=1, mlp=16, pattern=(GatedDeltaNet.Config(heads=1, head_dim=8),))
TRAINING = Training(steps=16, batch=4, optim=AdamW(lr=1e-2), schedule=Schedule(warmup=4, final_fraction=0.0))


def trained(capture: Any) -> tuple[Update, Model]:
    torch.manual_seed(0)
    model = build(MODEL, TASKS[0])
    update = Update(model, TRAINING, capture)
    for step, inputs in enumerate(stream(TASKS, TRAINING, seed=0), start=1):
        update(step, inputs)
    return update, model


def test_replays_do_what_calls_do() -> None:
    captures = []

    def capture(call: Callable[[], None]) -> Callable[[], None]:
        captures.append(call)
        return call

    called, one = trained(None)
    replayed, other = trained(capture)
    assert len(captures) == len(TASKS)  # one for each shape
    assert (called.replayed, replayed.replayed) == (0, TRAINING.steps - WARM * len(TASKS))
    torch.testing.assert_close(replayed.losses, called.losses)
    for (name, p), q in zip(one.named_parameters(), other.parameters()):
        torch.testing.assert_close(q, p, msg=lambda text, name=name: f"{name}: {text}")


def test_what_cannot_be_captured_is_called() -> None:
    tried = []

    def refuse(call: Callable[[], None]) -> Callable[[], None]:
        tried.append(call)
        raise RuntimeError("operation not permitted\nwhile capturing")

    replayed, _ = trained(lambda call: call)
    update, _ = trained(refuse)
    assert update.refused == "operation not permitted"
    assert len(tried) == len(TASKS)
    assert torch.equal(update.losses, replayed.losses)


def test_the_learning_rate_follows_the_schedule() -> None:
    update, _ = trained(None)
    assert update.optimizer.param_groups[0]["lr"] == float(1e-2 * TRAINING.schedule.factor(15, 16))
    replayed, _ = trained(lambda call: call)
    assert float(replayed.optimizer.param_groups[0]["lr"]) == pytest.approx(update.optimizer.param_groups[0]["lr"])


def test_few_targets_are_taken_out_and_give_the_same_loss() -> None:
    sample = TASKS[0].sample(4, torch.Generator().manual_seed(0))
    inputs = Inputs.of(sample)
    assert inputs.targets.shape == (4, 3)
    assert inputs.places is not None
    assert torch.equal(sample.targets.gather(1, inputs.places), inputs.targets)
    model = build(MODEL, TASKS[0])
    whole = model(sample.tokens, targets=sample.targets).loss
    torch.testing.assert_close(model(inputs.tokens, targets=inputs.targets, places=inputs.places).loss, whole)
    filled = Inputs.of(sample, fill=True)
    assert filled.tokens.shape == (4, 64)
    torch.testing.assert_close(model(filled.tokens, targets=filled.targets, places=filled.places).loss, whole)


def test_many_targets_or_unequally_many_stay_where_they_are() -> None:
    words = GroupWords(group="S3", elements=9).sample(2, torch.Generator().manual_seed(0))
    filled = Inputs.of(words, fill=True)
    assert filled.places is None
    assert torch.equal(filled.targets[:, :10], words.targets)
    assert bool((filled.targets[:, 10:] == IGNORE).all())
    unequal = torch.tensor([[IGNORE, 1, IGNORE, IGNORE], [IGNORE, IGNORE, IGNORE, IGNORE]])
    assert Inputs.of(Sample(unequal.clamp(min=0), unequal)).places is None
    assert Inputs.of(Parity(length=8).sample(2, torch.Generator())).tokens.shape[1] == 8


def test_what_is_decoded_from_the_last_place_is_not_filled_up() -> None:
    inputs = next(iter(stream([Compression()], Training(steps=1, batch=2), seed=0)))
    assert inputs.tokens.shape == (2, 32)


def test_a_loss_that_is_no_number_is_named() -> None:
    assert finite(torch.tensor([3.0, 2.0]), 2) == 2.0
    with pytest.raises(NonFiniteError, match="the loss of step 2 is nan"):
        finite(torch.tensor([3.0, float("nan"), 1.0]), 3)
