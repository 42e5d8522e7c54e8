"""On a GPU a whole training step is one CUDA graph, and neither packed rows nor anything else of it make the host wait."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from on_gpu import gpu
from torch import Tensor

from gdn import Packing
from gdn.mixers import Attention, DeltaProduct, GatedDeltaNet, Mamba2, MixerConfig
from gdn.models import LM

VOCAB, LENGTHS = 64, (70, 58)
PATTERNS: dict[str, tuple[MixerConfig, ...]] = {
    "gated deltanet": (GatedDeltaNet.Config(heads=2, value_heads=4, head_dim=16), GatedDeltaNet.Config(heads=2, head_dim=16)),
    "hybrid": (
        Mamba2.Config(head_dim=16, state_dim=16),
        GatedDeltaNet.Config(heads=2, head_dim=16),
        Attention.Config(heads=2, head_dim=16),
    ),
    "deltaproduct": (DeltaProduct.Config(heads=2, head_dim=16, householders=2, gate=True, allow_neg_eigval=True),),
}


def trainer(name: str) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """One step on a batch of tokens, giving the loss, and the parameters that it changes."""
    torch.manual_seed(0)
    pattern = PATTERNS[name]
    model = LM(LM.Config(vocab=VOCAB, width=32, layers=len(pattern), mlp=32, pattern=pattern)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, capturable=True)
    packing = Packing.from_lengths(LENGTHS, device="cuda")

    def step(tokens: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(tokens[:, :-1], targets=tokens[:, 1:], packing=packing).loss
        assert loss is not None
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step, list(model.parameters())


@gpu
@pytest.mark.parametrize("name", PATTERNS)
def test_a_graph_trains_as_single_steps_do(name: str) -> None:
    batches = torch.randint(VOCAB, (6, 1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(1)).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step, expected = trainer(name)
        losses = [step(tokens) for tokens in batches]
        step, found = trainer(name)
        early = [step(tokens) for tokens in batches[:3]]
    torch.cuda.current_stream().wait_stream(stream)
    tokens, graph = batches[3].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        loss = step(tokens)
    late = []
    for batch in batches[3:]:
        tokens.copy_(batch)
        graph.replay()
        late.append(loss.clone())
    torch.testing.assert_close(torch.stack(early + late), torch.stack(losses), rtol=1e-3, atol=1e-3)
    assert torch.stack(late).std() > 1e-4  # the graph reads what the batch is now
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-3, atol=1e-3)


@gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize("name", PATTERNS)
def test_the_host_never_waits(name: str) -> None:
    step, _ = trainer(name)
    batches = torch.randint(VOCAB, (3, 1, sum(LENGTHS) + 1), generator=torch.Generator().manual_seed(1)).cuda()
    for tokens in batches[:2]:
        step(tokens)
    try:
        torch.cuda.set_sync_debug_mode("error")
        loss = step(batches[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()
