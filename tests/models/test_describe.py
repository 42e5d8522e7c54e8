"""The estimate of a training step's memory against the tensors that autograd keeps."""

from __future__ import annotations

import pytest
import torch

from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.describe import costs
from gdn.models.lm import LM


def kept_bytes(model: LM, tokens: torch.Tensor) -> int:
    """Bytes of the activations saved for the backward pass, each storage once."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        model(tokens, targets=tokens)
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    return sum(size for address, size in storages.items() if address not in parameters)


@pytest.mark.parametrize(("width", "head_dim"), [(128, 32), (256, 64)])
def test_the_estimate_of_activations_is_near_what_is_kept(width: int, head_dim: int) -> None:
    mixer = GatedDeltaNet.Config(heads=3, head_dim=head_dim)
    config = LM.Config(vocab=257, width=width, layers=2, mlp=3 * width, pattern=(mixer,))
    measured = kept_bytes(LM(config), torch.randint(257, (1, 256)))
    assert 0.9 < measured / costs(config, 256).activation_bytes < 1.1
