"""One optimizer step: forward and backward over some micro-batches, clip, check, update."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from gdn.core.errors import ConfigError, DataError, NonFiniteError
from gdn.data import Batch
from gdn.train.distributed import World
from gdn.train.optim import GATES

Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one update reports."""

    loss: float
    """Mean nats per token over all micro-batches of all processes."""
    tokens: int
    num_bytes: int
    grad_norm: float
    """Global norm before clipping."""


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[Batch],
    *,
    world: World,
    precision: Precision = "fp32",
    clip: float | None = None,
) -> Step:
    """Update the model once on the mean loss over the valid targets of all micro-batches together.

    So two micro-batches are one batch of twice the size, whatever the number of valid targets in each, and so are two processes.
    A loss or gradient that is not finite raises `NonFiniteError` before anything is updated.
    """
    counts = [batch.num_targets for batch in batches]
    tokens, num_bytes = world.reduce([sum(counts), sum(batch.num_bytes for batch in batches)])
    if not tokens:
        raise DataError("expected at least one token to predict in a step, got none; are the documents a single token each?")
    losses = []
    for batch, count in zip(batches, counts):
        if count == 0 and world.size == 1:
            continue
        batch = batch.to(world.device)
        with autocast(world.device, precision):
            loss = model(batch.tokens, targets=batch.targets, packing=batch.packing).loss * (count / tokens)
        # FSDP takes the mean over processes where a sum is wanted.
        (loss * world.size).backward()
        losses.append(loss.detach())
    norm = gradient_norm(model, clip)
    # The only time the host waits for the device: an update with a NaN must not happen.
    *parts, grad_norm = torch.stack([*losses, norm.to(losses[0].dtype)]).tolist()
    (total,) = world.reduce([math.fsum(parts)])
    if not (math.isfinite(total) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteError(_describe(parts, grad_norm))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return Step(loss=total, tokens=int(tokens), num_bytes=int(num_bytes), grad_norm=grad_norm)


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Matrix products in bfloat16, or nothing. The operators keep gates, states and sums in float32 by themselves."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def gradient_norm(model: nn.Module, clip: float | None) -> torch.Tensor:
    """The norm of all gradients together; scales them down to norm `clip` if they are above it."""
    from torch.distributed.tensor import DTensor

    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if clip is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def check_precision(model: nn.Module) -> None:
    """Raise `ConfigError` unless parameters are float32, those of the decay gates above all."""
    wrong = [name for name, p in model.named_parameters() if p.is_floating_point() and p.dtype not in (torch.float32, torch.float64)]
    wrong.sort(key=lambda name: not name.endswith(GATES))
    if wrong:
        dtype = dict(model.named_parameters())[wrong[0]].dtype
        raise ConfigError(
            f"{wrong[0]}: expected float32 to train, got {dtype}. Parameters stay float32 and autocast computes in bfloat16; "
            'A_log and dt_bias decide how fast memory fades and cannot be rounded. Use precision="bf16" instead of casting the model.'
        )


def _describe(parts: Sequence[float], grad_norm: float) -> str:
    bad = [i for i, loss in enumerate(parts) if not math.isfinite(loss)]
    if bad:
        return f"the loss of micro-batch {bad[0]} is {parts[bad[0]]}"
    return f"every loss is finite, the norm of the gradient is {grad_norm}"
