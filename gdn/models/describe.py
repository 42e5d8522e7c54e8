"""What a configuration costs, without building it: parameters, operations, state and training memory."""

from __future__ import annotations

from dataclasses import dataclass

from gdn.core.errors import GdnError
from gdn.mixers.base import MixerConfig
from gdn.models.lm import LM


@dataclass(frozen=True)
class Costs:
    """Sizes of a model at one context length. Bytes are for float32 weights unless said otherwise."""

    parameters: int
    embedding_parameters: int
    """Embedding and head, counted once when tied."""
    flops_per_token: int
    """Forward pass, two per multiply-add, at `length`."""
    train_flops_per_token: int
    """Forward and backward: three times the forward pass."""
    state_bytes: int
    """Decoding state of one sequence after `length` tokens."""
    weight_bytes: int
    optimizer_bytes: int
    """Weights, gradients and the two moments of AdamW."""
    activation_bytes: int
    """Estimate for one sequence of `length` tokens in a training step, nothing recomputed."""
    block_activation_bytes: int
    """The same when each block is computed again in the backward pass."""


def costs(config: LM.Config, length: int, *, itemsize: int = 4) -> Costs:
    """Costs at context `length`, with activations of `itemsize` bytes (4 for float32, 2 for bf16 autocast)."""
    parameters = config.num_parameters()
    per_block = [_saved_channels(config, mixer) for mixer in config.mixers]
    flops = config.flops_per_token(length)
    return Costs(
        parameters=parameters,
        embedding_parameters=parameters - config.num_parameters(embeddings=False),
        flops_per_token=flops,
        train_flops_per_token=3 * flops,
        state_bytes=config.state_bytes(length, itemsize),
        weight_bytes=4 * parameters,
        optimizer_bytes=16 * parameters,
        activation_bytes=length * itemsize * sum(per_block),
        block_activation_bytes=length * itemsize * (config.layers * config.width + max(per_block)),
    )


def _saved_channels(config: LM.Config, mixer: MixerConfig) -> int:
    """Values per token that a block keeps for its backward pass: the inputs of its norms, matrices and mixer."""
    return 4 * config.width + mixer.saved_channels(config.width) + 2 * config.mlp


@dataclass(frozen=True)
class MixerCosts:
    """What one mixer in its default, or else usual, configuration costs at a width and a length."""

    name: str
    parameters: int
    flops_per_token: int
    """Forward pass, two per multiply-add."""
    state_bytes: int
    """Of one sequence after `length` tokens."""
    state_grows: bool
    chosen: str
    """Fields that have no default, as in `householders=2`."""


def mixer_costs(width: int, length: int, *, itemsize: int = 4) -> tuple[list[MixerCosts], dict[str, str]]:
    """The costs of every mixer by arithmetic on its configuration alone, smallest state first; and for those that have no usual
    configuration or none at this width, the reason."""
    found, reasons = [], {}
    for name, config_class in MixerConfig.members().items():
        try:
            config = config_class(**config_class.typical)
            parameters, flops = config.num_parameters(width), config.flops_per_token(width, length)
            chosen = ", ".join(f"{field}={value}" for field, value in config.typical.items())
            found.append(MixerCosts(name, parameters, flops, config.state_bytes(width, length, itemsize), config.state_grows, chosen))
        except (GdnError, TypeError) as error:  # TypeError: a field without default or usual value
            reasons[name] = str(error)
    return sorted(found, key=lambda costs: costs.state_bytes), reasons
