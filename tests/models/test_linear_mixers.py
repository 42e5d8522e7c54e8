"""What mixers of linear attention must do beyond the contract."""

from __future__ import annotations

import pytest
import torch

from gdn.mixers import GLA, GSA, HGRN2, MixerConfig, RetNet
from gdn.models.lm import LM

MIXERS: dict[str, MixerConfig] = {
    "gla": GLA.Config(heads=2),
    "retnet": RetNet.Config(heads=2),
    "hgrn2": HGRN2.Config(head_dim=8),
    "gsa": GSA.Config(heads=2, slots=8),
}


@pytest.mark.parametrize("name", MIXERS)
def test_padding_before_a_continuation_leaves_no_trace(name: str) -> None:
    """The memory already holds something, which padding must not forget. (A convolution cannot skip what lies between two pieces.)"""
    torch.manual_seed(0)
    mixer = MIXERS[name].build(16).double()
    x, pads = torch.randn(2, 20, 16, dtype=torch.float64), 3 * torch.ones(2, 9, 16, dtype=torch.float64)
    results = []
    with torch.no_grad():
        for padded in (False, True):
            _, state = mixer(x[:, :8], state=mixer.init_state(2))
            mask = (torch.arange(21) >= 9).expand(2, -1) if padded else None
            y, state = mixer(torch.cat([pads, x[:, 8:]], dim=1) if padded else x[:, 8:], state=state, mask=mask)
            assert state is not None
            results.append((y[:, -12:], *state.tensors.values()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-11)


def test_layers_that_share_lower_bounds_compile_as_one_graph() -> None:
    """The other mixers' layers know nothing of each other, so the contract compiles them alone."""
    tokens = torch.randint(13, (2, 20), generator=torch.Generator().manual_seed(0))
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = LM(LM.Config(vocab=13, width=16, layers=2, mlp=32, pattern=(MIXERS["hgrn2"],)))
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        loss = step(tokens, targets=tokens).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-6)
