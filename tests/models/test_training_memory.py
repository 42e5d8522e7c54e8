"""A model in training through the Triton rows, in their interpreter: what it keeps (notes/training_memory.md), and its gradients."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from gdn.core.dispatch import ops, use
from gdn.core.packing import Packing
from gdn.mixers import GatedDeltaNet
from gdn.models import LM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, WIDTH, MLP, HEADS, K, V = 64, 32, 48, 2, 16, 24
PLAIN = {name: op.impls[-2].name for name, op in ops().items()}
"""What runs without Triton: the row before the reference."""
PORTABLE = {name: "portable" for name, op in ops().items() if any(row.name == "portable" for row in op.impls)}


@pytest.fixture(autouse=True)
def overflows_silently() -> Iterator[None]:
    """As on a GPU."""
    with np.errstate(over="ignore"):
        yield


def build(layers: int) -> LM:
    torch.manual_seed(0)
    mixer = GatedDeltaNet.Config(heads=HEADS, head_dim=K, expand_v=V / K)
    return LM(LM.Config(vocab=40, width=WIDTH, layers=layers, mlp=MLP, tie_embeddings=False, pattern=(mixer,))).to(DEVICE)


def kept(layers: int, backend: str | None) -> dict[int, Tensor]:
    """What a forward pass with a loss keeps beside the parameters, each storage once."""
    model = build(layers)
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64, device=DEVICE)
    torch._dynamo.reset()
    run = model if backend is None else torch.compile(model, fullgraph=True, backend=backend)
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        found.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with use(**PORTABLE), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(tokens, targets=tokens)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    return {address: tensor for address, tensor in found.items() if address not in parameters}


def numbers(tensors: dict[int, Tensor]) -> float:
    """Numbers a token, without what the rule keeps for itself and the weights that were put together."""
    counted = [t for t in tensors.values() if t.dtype != torch.uint8 and t.shape != (2 * HEADS, WIDTH)]
    return sum(t.untyped_storage().nbytes() for t in counted) / (4 * TOKENS)


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"], ids=["eager", "compiled"])
def test_a_block_keeps_what_its_matrices_and_its_memory_need(backend: str | None) -> None:
    values, qkv = HEADS * V, HEADS * (2 * K + V)
    stream = 4 * WIDTH  # what both norms get and give
    mixer = qkv + qkv + 2 * values  # projected; convolved and of length one; the memory's output and its gate
    thin = 5 * HEADS  # b, g and beta; a in one storage with b before its bias
    lengths = 2 + HEADS  # of the norms
    assert numbers(kept(2, backend)) - numbers(kept(1, backend)) == stream + mixer + thin + lengths + 2 * MLP


@pytest.mark.parametrize("lengths", [None, [20, 0, 3, 41]], ids=["whole", "packed"])
def test_the_gradients_are_those_of_the_plain_rows(lengths: list[int] | None) -> None:
    model = build(2)
    tokens = torch.randint(40, (1, TOKENS), device=DEVICE)
    packing = None if lengths is None else Packing.from_lengths(lengths, device=DEVICE)
    found = []
    for rows in (PORTABLE, PLAIN):
        with use(**rows):
            loss = model(tokens, targets=tokens.roll(-1, 1), packing=packing).loss
            found.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)
