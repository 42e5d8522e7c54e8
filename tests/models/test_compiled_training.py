"""A whole language model in one compiled graph, all operators in Triton rows, trains as single operators do, blocks made again or not."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor

from gdn import Packing
from gdn.core.dispatch import ops, use
from gdn.mixers import Attention, GatedDeltaNet, Mamba2, MixerConfig
from gdn.models import LM

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
PATTERN: tuple[MixerConfig, ...] = (
    GatedDeltaNet.Config(heads=1, value_heads=2, head_dim=16),
    Mamba2.Config(head_dim=16, state_dim=16),
    Attention.Config(heads=2, head_dim=8),
)


def gradients(recompute: Literal["none", "block"], *, compiled: bool) -> list[Tensor]:
    """The loss of packed rows and the gradients of all parameters."""
    torch.manual_seed(0)
    model = LM(LM.Config(vocab=32, width=16, layers=len(PATTERN), mlp=16, pattern=PATTERN)).to(DEVICE)
    model.recompute = recompute
    run = torch.compile(model, fullgraph=True, backend=BACKEND) if compiled else model
    tokens = torch.randint(32, (1, 25), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    packing = Packing.from_lengths([13, 11], device=DEVICE)
    loss = run(tokens[:, :-1], targets=tokens[:, 1:], packing=packing).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("quick_interpreter")
@pytest.mark.parametrize("recompute", ["none", "block"])
def test_one_graph_trains_as_single_operators_do(recompute: Literal["none", "block"]) -> None:
    torch._dynamo.reset()
    rows = {name: "portable" for name, op in ops().items() if any(row.name == "portable" for row in op.impls)}
    with use(**rows):
        expected = gradients("none", compiled=False)
        assert min(float(x.abs().max()) for x in expected) > 0
        if recompute == "block":
            assert all(torch.equal(a, b) for a, b in zip(gradients("block", compiled=False), expected, strict=True))
        found = gradients(recompute, compiled=True)
        for actual, right in zip(found, expected, strict=True):
            assert float((actual - right).norm()) <= 1e-4 * float(right.norm())
