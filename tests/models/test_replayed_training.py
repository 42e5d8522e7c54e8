"""A language model trains, prefills and decodes the same with replayed operators: the same bits, with packed rows and checkpointing."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from gdn import Packing
from gdn.core import checks, replay_known
from gdn.core.dispatch import use
from gdn.mixers import GatedDeltaNet
from gdn.models import LM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = dict.fromkeys(
    ("causal_conv1d", "causal_conv1d_step", "delta_core", "gated_delta_rule", "gated_delta_step", "gated_rms_norm", "rms_norm", "l2norm",
     "decay_gate", "write_gate"), "portable",
)  # fmt: skip


def results(recompute: Literal["none", "block"]) -> list[Tensor]:
    """Of three steps on packed rows, the gradients of the last one, and logits of a prompt and two more tokens."""
    torch.manual_seed(0)
    model = LM(LM.Config(vocab=32, width=16, layers=1, mlp=16, pattern=(GatedDeltaNet.Config(heads=1, value_heads=2, head_dim=8),))).to(
        DEVICE
    )
    model.recompute = recompute
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for lengths in ([7, 3], [4, 6], [7, 3]):
        optimizer.zero_grad()
        tokens = torch.randint(32, (1, 11)).to(DEVICE)
        logits = model(tokens[:, :-1], packing=Packing.from_lengths(lengths, device=DEVICE)).logits
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:])
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    found += [p.grad for p in model.parameters() if p.grad is not None]
    state = model.init_state(batch=1)
    with torch.no_grad():
        for piece in (tokens[:, :7], tokens[:, 7:8], tokens[:, 8:9], tokens[:, 9:10]):
            found.append(model(piece, state=state).logits)
    return found


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_same_bits(recompute: Literal["none", "block"], replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)  # as on a GPU, where no value is looked at
    with use(**ROWS):
        with monkeypatch.context() as patch:
            patch.setattr(replay_known, "FIRST_DEVICE", 99)
            expected = results(recompute)
        assert not replayed_here
        actual = results(recompute)
    assert len(set(replayed_here)) >= 8
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
