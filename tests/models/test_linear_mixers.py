"""Language models of each linear-attention mixer learn a toy text."""

from __future__ import annotations

import pytest
import torch

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
    """Rows that each repeat a word of their own."""
    model = build(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    text = torch.randint(13, (8, 5), generator=torch.Generator().manual_seed(0)).repeat(1, 3)
    losses = []
    for _ in range(30):
        loss = model(text[:, :-1], targets=text[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


def test_layers_that_share_lower_bounds_compile_as_one_graph() -> None:
    """The other mixers' layers know nothing of each other, so the contract compiles them alone."""
    tokens = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = build("hgrn2")
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = step(tokens, targets=tokens).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-6)
