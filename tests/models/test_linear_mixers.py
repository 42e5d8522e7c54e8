"""Language models of each linear-attention mixer learn a toy text and compile as one graph."""

from __future__ import annotations

import pytest
import torch

from gdn.core.packing import Packing
from gdn.mixers import GLA, GSA, HGRN2, Mamba2, MixerConfig, RetNet
from gdn.models.lm import LM

MIXERS: dict[str, MixerConfig] = {
    "mamba2": Mamba2.Config(head_dim=8, state_dim=8),
    "gla": GLA.Config(heads=2),
    "retnet": RetNet.Config(heads=2),
    "hgrn2": HGRN2.Config(head_dim=8),
    "gsa": GSA.Config(heads=2, slots=8),
}

of_each_kind = pytest.mark.parametrize("name", MIXERS)


def build(name: str) -> LM:
    torch.manual_seed(0)
    return LM(LM.Config(vocab=13, width=16, layers=2, mlp=0 if name == "mamba2" else 32, pattern=(MIXERS[name],)))


@of_each_kind
def test_a_few_steps_lower_the_loss(name: str) -> None:
    """Text that repeats itself after seven tokens: to predict it is to recall."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for step in range(60):
        word = torch.randint(13, (16, 7), generator=torch.Generator().manual_seed(step % 8))
        text = word.repeat(1, 4)
        loss = model(text[:, :-1], targets=text[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) / 5 < 0.8 * losses[0], losses


@of_each_kind
def test_compiled_training_step_has_the_loss_of_eager(name: str) -> None:
    tokens = torch.randint(13, (2, 40), generator=torch.Generator().manual_seed(0))
    packing = Packing.from_lengths([30, 10, 40])
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = build(name)
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = step(tokens, targets=tokens, packing=packing).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-6)
