"""The memory that a text begins with, as parameters: a small way of tuning a model whose weights stay as they are.

start = tune_start(model)            freezes the model; only `start` trains
save_start(model, path)              a file of a few kilobytes a layer
load_start(model, path)              the same model begins every text with it
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gdn.core.errors import ArgumentError, CheckpointError
from gdn.models.precision import MEMORY, memories

if TYPE_CHECKING:
    from gdn.models.lm import LM
    from gdn.models.state import LMState

FORMAT = "gdn.start.1"


class Start(nn.Module):
    """A first memory `[HV, K, V]` for each layer that has one, zero to begin with, which changes nothing."""

    def __init__(self, state: LMState) -> None:
        super().__init__()
        first = {_parameter(i, name): layer[name][0] for i, layer in enumerate(state.layers) for name in memories(layer)}
        if not first:
            raise ArgumentError("model: has no recurrent memory to begin with")
        self.memories = nn.ParameterDict({name: nn.Parameter(torch.zeros_like(memory)) for name, memory in first.items()})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to zero."""
        for memory in self.memories.values():
            memory.zero_()

    def fill(self, state: LMState) -> LMState:
        """An empty state with these memories; gradients flow to them."""
        for i, layer in enumerate(state.layers):
            for name in memories(layer):
                memory: Tensor = self.memories[_parameter(i, name)]
                layer.tensors[name] = memory.to(layer[name].dtype).expand_as(layer[name]).clone()
        return state


def _parameter(layer: int, memory: str) -> str:
    """layer_3, or with several memories layer_3_keys."""
    return f"layer_{layer}{memory.removeprefix(MEMORY)}"


PREFIX = "start."
"""What the names of its weights begin with in a model that has one."""


def tune_start(model: LM) -> Start:
    """Freeze a model and give it a first memory that trains."""
    model.requires_grad_(False)
    model.start = Start(model.init_state(1))
    return model.start


def save_start(model: LM, path: str | Path) -> None:
    """Write the first memory of a model, with the fingerprint of the model without it."""
    from safetensors.torch import save_file

    from gdn.models.state import fingerprint

    if model.start is None:
        raise ArgumentError("model: has no first memory; see tune_start")
    tensors = {name: memory.detach().cpu().contiguous() for name, memory in model.start.memories.items()}
    save_file(tensors, path, metadata={"format": FORMAT, "model": fingerprint(model, start=False)})


def load_start(model: LM, path: str | Path) -> Start:
    """Begin every text with a memory that `save_start` wrote; one of another model is refused."""
    from gdn.models.state import fingerprint, read_file

    tensors, metadata = read_file(Path(path), FORMAT)
    if metadata["model"] != fingerprint(model, start=False):
        raise CheckpointError(f"{path}: this memory was trained for another model (fingerprint {metadata['model']})")
    model.start = None
    start = Start(model.init_state(1))
    start.memories.load_state_dict(tensors)
    model.start = start
    return start
