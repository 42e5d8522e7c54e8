"""A first memory: nothing at zero, the only thing that trains, exact gradients, files of one model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gdn.core.errors import ArgumentError, CheckpointError
from gdn.core.packing import Packing
from gdn.mixers.attention import Attention
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.gsa import GSA
from gdn.models.lm import LM
from gdn.models.start import load_start, save_start, tune_start
from gdn.models.store import load_model, save_model

LINEAR = GatedDeltaNet.Config(heads=2, head_dim=8)
CONFIG = LM.Config(vocab=17, width=24, layers=2, mlp=32, pattern=(LINEAR, Attention.Config(heads=2, head_dim=8)))


def build(seed: int = 0) -> LM:
    torch.manual_seed(seed)
    return LM(CONFIG).double()


def tokens() -> torch.Tensor:
    return torch.randint(17, (3, 12), generator=torch.Generator().manual_seed(5))


def test_zero_changes_nothing_and_only_it_trains() -> None:
    model, x = build(), tokens()
    before, weights = model(x).logits, {n: p.clone() for n, p in model.named_parameters()}
    start = tune_start(model)
    torch.testing.assert_close(model(x).logits, before, rtol=1e-10, atol=1e-12)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["start.memories.layer_0"]
    optimizer = torch.optim.Adam(start.parameters(), lr=0.3)
    losses = []
    for _ in range(15):
        loss = model(x, targets=x[:1].expand(3, -1)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)


def test_each_memory_of_a_layer_begins_with_its_own() -> None:
    model, x = LM(CONFIG.with_(width=32, pattern=(GSA.Config(heads=2, slots=16),))), tokens()
    start = tune_start(model)
    expected = {f"layer_{i}_{name}" for i in range(CONFIG.layers) for name in ("keys", "values")}
    assert set(start.memories) == expected
    model(x, targets=x).loss.backward()
    with torch.no_grad():
        for name in expected:
            start.memories[name].normal_()
    whole, state = model(x).logits, model.init_state(3)
    assert torch.equal(state.layers[0]["memory_values"][1], start.memories["layer_0_values"])
    pieces = []
    for part in x.split(5, dim=1):
        found = model(part, state=state)
        pieces, state = [*pieces, found.logits], found.state
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_its_gradient_is_that_of_finite_differences_and_decoding_begins_with_it() -> None:
    model, x = build(), tokens()
    memory = tune_start(model).memories["layer_0"]
    with torch.no_grad():
        memory.normal_()
    model(x, targets=x).loss.backward()
    for place in ((0, 3, 5), (1, 0, 2)):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                memory[place] += step
                values.append(model(x, targets=x).loss.item())
                memory[place] -= step
        assert memory.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-9)
    state, logits = model.init_state(3), []
    kept = memory.clone()
    with torch.no_grad():
        for piece in x.split([5, 1, 6], dim=1):
            out = model(piece, state=state)
            state = out.state
            logits.append(out.logits)
        torch.testing.assert_close(torch.cat(logits, 1), model(x).logits, rtol=1e-9, atol=1e-10)
    assert torch.equal(memory, kept)


def test_it_is_kept_in_a_file_for_one_model(tmp_path: Path) -> None:
    model = build()
    with pytest.raises(ArgumentError, match="has no first memory"):
        save_start(model, tmp_path / "start")
    with torch.no_grad():
        tune_start(model).memories["layer_0"].normal_()
    save_start(model, tmp_path / "start")
    again = build()
    load_start(again, tmp_path / "start")
    again.requires_grad_(False)  # as the other: torch multiplies by a matrix that trains in another way
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    with pytest.raises(CheckpointError, match="another model"):
        load_start(build(1), tmp_path / "start")
    with pytest.raises(ArgumentError, match="packing"):
        model(tokens()[:1], packing=Packing.from_lengths([5, 7]))
    with pytest.raises(ArgumentError, match="no recurrent memory"):
        tune_start(LM(CONFIG.with_(pattern=(Attention.Config(heads=2, head_dim=8),))))


def test_a_stored_model_keeps_it(tmp_path: Path) -> None:
    model = build().float()
    with torch.no_grad():
        tune_start(model).memories["layer_0"].normal_()
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path).requires_grad_(False)(tokens()).logits, model(tokens()).logits)
