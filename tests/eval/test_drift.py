"""The drift report: nothing for float32, more for fewer bits, and the numbers are those of a plain computation."""

from __future__ import annotations

import pytest
import torch

from gdn.core.errors import ArgumentError
from gdn.eval.drift import drift
from gdn.mixers.attention import Attention
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.gsa import GSA
from gdn.models.lm import LM

CONFIG = LM.Config(vocab=17, width=24, layers=2, mlp=32, pattern=(GatedDeltaNet.Config(heads=2, head_dim=16),))


def test_drift_against_float32() -> None:
    torch.manual_seed(0)
    model, tokens = LM(CONFIG).eval(), torch.randint(17, (2, 40))
    rows = drift(model, tokens, ("fp32", "bf16", "int8", "fp8"), piece=2)
    assert [r.tokens for r in rows if r.precision == "bf16"] == [2, 4, 8, 16, 32, 40]
    last = {r.precision: r for r in rows[-4:]}
    assert last["fp32"].memory_error == 0 == last["fp32"].divergence
    assert last["fp32"].agreement == 1
    assert 0 < last["bf16"].memory_error < last["fp8"].memory_error < 0.1
    assert last["bf16"].divergence < last["fp8"].divergence
    assert last["fp32"].bytes_per_sequence > last["bf16"].bytes_per_sequence > last["int8"].bytes_per_sequence
    state, exact = model.init_state(2).to("int8"), model.init_state(2)
    divergences = []
    with torch.no_grad():
        for part in tokens.split(2, dim=1):
            a, b = model(part, state=exact), model(part, state=state)
            p, q = a.logits.softmax(-1), b.logits.softmax(-1)
            divergences.append((p * (p / q).log()).sum(-1))
            exact, state = a.state, b.state
    expected = torch.cat(divergences[16:], 1).mean().item()  # the last row: pieces 17 to 20
    assert last["int8"].divergence == pytest.approx(expected, rel=0.05, abs=1e-8)


def test_both_memories_of_a_slot_attention_drift() -> None:
    torch.manual_seed(0)
    model, tokens = LM(CONFIG.with_(width=32, pattern=(GSA.Config(heads=2, slots=16),))).eval(), torch.randint(17, (2, 8))
    found = {r.precision: r for r in drift(model, tokens, ("fp32", "bf16", "fp8"), piece=2)}
    assert found["fp32"].memory_error == 0 < found["bf16"].memory_error < found["fp8"].memory_error < 0.1
    assert found["bf16"].bytes_per_sequence == found["fp32"].bytes_per_sequence // 2


def test_models_without_a_memory_are_refused() -> None:
    model = LM(CONFIG.with_(pattern=(Attention.Config(heads=2, head_dim=8),)))
    with pytest.raises(ArgumentError, match="no recurrent memory"):
        drift(model, torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(ArgumentError, match="piece"):
        drift(LM(CONFIG), torch.zeros(1, 4, dtype=torch.int64), piece=0)
