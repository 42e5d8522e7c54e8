"""Every mixer of the library trains in the same language model, on the CPU and on a GPU."""

from __future__ import annotations

import pytest
import torch

from gdn.core.packing import Packing
from gdn.mixers import GLA, GSA, HGRN2, Attention, DeltaNet, DeltaProduct, GatedDeltaNet, KimiDelta, Mamba2, RetNet, Swat, TransMamba
from gdn.mixers.base import MixerConfig
from gdn.models.lm import LM
from gdn.train.step import autocast

MIXERS: list[MixerConfig] = [
    Attention.Config(heads=2, head_dim=16),
    DeltaNet.Config(heads=2, head_dim=16),
    DeltaProduct.Config(householders=2, gate=True, allow_neg_eigval=True, heads=2, head_dim=16),
    GatedDeltaNet.Config(heads=2, head_dim=16),
    GLA.Config(heads=2),
    GSA.Config(heads=2, slots=16),
    HGRN2.Config(head_dim=16),
    KimiDelta.Config(heads=2, head_dim=16),
    Mamba2.Config(head_dim=16, state_dim=16),
    RetNet.Config(heads=2),
    Swat.Config(heads=2, head_dim=16, window=8),
    TransMamba.Config(heads=2, head_dim=16, transpoint=8),
]
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


def test_every_mixer_is_here() -> None:
    ours = {name for name, config in MixerConfig.members().items() if config.__module__.startswith("gdn.")}
    assert {mixer.tag() for mixer in MIXERS} == ours


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.tag())
def test_a_few_steps_lower_the_loss(mixer: MixerConfig, device: str) -> None:
    """Rows that each repeat a word of their own; on a GPU with products in bfloat16, as models are trained there."""
    torch.manual_seed(0)
    model = LM(LM.Config(vocab=13, width=32, layers=2, mlp=64, pattern=(mixer,))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    text = torch.randint(13, (8, 5), generator=torch.Generator().manual_seed(0)).repeat(1, 3).to(device)
    losses = []
    for _ in range(30):
        with autocast(torch.device(device), "bf16" if device == "cuda" else "fp32"):
            loss = model(text[:, :-1], targets=text[:, 1:]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize(
    ("mixer", "packed"),
    [(mixer, packed) for mixer in MIXERS for packed in (False, True) if not (packed and isinstance(mixer, TransMamba.Config))],
    ids=lambda value: value.tag() if isinstance(value, MixerConfig) else "packed" if value else "rows",
)
def test_one_compiled_graph_serves_any_length(mixer: MixerConfig, packed: bool) -> None:
    """Forward and backward; sizes that an operator or a layer asked for as numbers would be constants of the graph.

    Softmax through a window attends to each packed row by itself in plain torch: a graph of it has one number of rows.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LM(LM.Config(vocab=13, width=32, layers=1, mlp=64, pattern=(mixer,)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows, lengths in ((2, (12, 8)), (3, (100, 30, 70))):
        tokens = torch.randint(13, (rows, sum(lengths)))
        packing = Packing.from_lengths(lengths * rows) if packed else None
        results = []
        with torch._dynamo.config.patch(error_on_recompile=rows == 3):
            for run in (model, compiled):
                model.zero_grad()
                loss = run(tokens, targets=tokens, packing=packing).loss
                loss.backward()
                results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)
