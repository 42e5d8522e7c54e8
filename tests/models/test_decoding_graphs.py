"""On a GPU a step of decoding is one CUDA graph: the memories it reads and writes in place are those of the model's state."""

from __future__ import annotations

import pytest
import torch
from on_gpu import gpu
from torch import Tensor

from gdn.mixers import Attention, DeltaProduct, GatedDeltaNet, KimiDelta, Mamba2, MixerConfig
from gdn.models import LM, LMState

VOCAB, BATCH = 64, 3
PATTERNS: dict[str, tuple[MixerConfig, ...]] = {
    "gated deltanet": (GatedDeltaNet.Config(heads=2, value_heads=4, head_dim=16),),
    "mamba2 and channels": (Mamba2.Config(head_dim=16, state_dim=16), KimiDelta.Config(heads=2, head_dim=16)),
    "deltaproduct": (DeltaProduct.Config(heads=2, head_dim=16, householders=2, gate=True, allow_neg_eigval=True),),
    "attention in a window": (GatedDeltaNet.Config(heads=2, head_dim=16), Attention.Config(heads=2, head_dim=16, window=8)),
}


def greedy(model: LM, token: Tensor, state: LMState) -> Tensor:
    """One more token of each sequence into `token`, and its logits."""
    logits = model(token, state=state).logits
    token.copy_(logits.argmax(-1))
    return logits


@gpu
@pytest.mark.parametrize("name", PATTERNS)
def test_a_graph_decodes_as_single_steps_do(name: str) -> None:
    torch.manual_seed(0)
    pattern = PATTERNS[name]
    model = LM(LM.Config(vocab=VOCAB, width=32, layers=len(pattern), mlp=32, pattern=pattern)).cuda().to(torch.bfloat16)
    prompt = torch.randint(VOCAB, (BATCH, 21), device="cuda")
    with torch.no_grad():
        state = model.init_state(BATCH, room=64)
        token = model(prompt, state=state).logits[:, -1:].argmax(-1)
        for _ in range(3):
            greedy(model, token, state)
        other, expected = token.clone(), []
        fork = state.fork()
        for _ in range(20):
            expected.append((greedy(model, other, fork).clone(), other.clone()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = greedy(model, token, state)
        for right, chosen in expected:
            graph.replay()
            assert torch.equal(logits, right) and torch.equal(token, chosen)
    assert len({tuple(chosen.flatten().tolist()) for _, chosen in expected}) > 1
