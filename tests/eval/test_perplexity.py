"""Loss and bits per byte, whole and by position, against sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from gdn.core.errors import DataError
from gdn.data import ByteTokenizer
from gdn.data.pack import Batch, pack
from gdn.eval import evaluate, evaluate_by_position
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

END = ByteTokenizer.end_id
TINY = LM.Config(vocab=257, width=24, layers=1, mlp=32, pattern=(GatedDeltaNet.Config(heads=2, head_dim=8),))
DOCUMENTS = [list(b"one two three"), list(b"four"), list("fünf".encode()), list(b"six seven eight nine")]


@pytest.fixture
def model() -> LM:
    torch.manual_seed(0)
    return LM(TINY).double()


def batch(length: int = 64) -> Batch:
    """All documents in one row; the places behind them are padding."""
    tokens = np.array([token for document in DOCUMENTS for token in [END, *document]])
    targets = np.array([token for document in DOCUMENTS for token in [*document, END]])
    return pack(tokens, targets, ByteTokenizer(), batch=1, length=length, boundaries=True)


@torch.no_grad()
def losses(model: LM, document: list[int]) -> torch.Tensor:
    """Nats of each token of a document read by itself, its end among them."""
    logits = model(torch.tensor([[END, *document]])).logits[0]
    return F.cross_entropy(logits, torch.tensor([*document, END]), reduction="none")


def test_loss_and_bits_per_byte_are_sums_over_the_documents(model: LM) -> None:
    each = torch.cat([losses(model, document) for document in DOCUMENTS])
    result = evaluate(model, [batch(), batch(80)])
    assert (result.tokens, result.num_bytes) == (2 * len(each), 2 * sum(map(len, DOCUMENTS)))
    assert math.isclose(result.loss, float(each.mean()), rel_tol=1e-6)
    assert math.isclose(result.bits_per_byte, 2 * float(each.sum()) / math.log(2) / result.num_bytes, rel_tol=1e-6)
    assert math.isclose(result.perplexity, math.exp(result.loss))


def test_positions_count_from_the_begin_of_each_document(model: LM) -> None:
    each = [losses(model, document) for document in DOCUMENTS]
    found = evaluate_by_position(model, [batch()], (0, 3, 10, 30, 64))
    assert [(b.start, b.stop) for b in found] == [(0, 3), (3, 10), (10, 30)]
    for bucket in found:
        inside = torch.cat([loss[bucket.start : bucket.stop] for loss in each])
        assert bucket.tokens == len(inside)
        assert math.isclose(bucket.loss, float(inside.mean()), rel_tol=1e-6)


def test_the_mode_of_the_model_is_left_as_it_was(model: LM) -> None:
    for training in (True, False):
        model.train(training)
        evaluate(model, [batch()])
        assert model.training is training


def test_nothing_to_predict_is_an_error(model: LM) -> None:
    with pytest.raises(DataError, match="expected some text"):
        evaluate(model, [])
