"""The language-model head and its loss in one operator: contract and table. README.md has the arithmetic of the chunks."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.replay import replayed

OP = Op(
    "linear_cross_entropy",
    (
        Impl("portable", "gdn.ops.loss.portable:linear_cross_entropy", triton_gpu()),
        Impl("chunked", "gdn.ops.loss.chunked:linear_cross_entropy"),
        Impl("reference", "gdn.ops.loss.reference:linear_cross_entropy"),
    ),
)
"""Rows take `(x, weight, targets, ignore_index, reduction)` with x `[tokens, D]`, targets `[tokens]`; "none" gives `[tokens]`."""

Reduction = Literal["mean", "sum", "none"]


@replayed
def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Cross-entropy of `x @ weight.T` against targets, without ever holding all logits:

        loss_t = log sum over i of exp(weight_i . x_t)  -  weight_{targets_t} . x_t

    in nats, for each token t; 0 where `targets_t` is `ignore_index`.

    Args:
        x: hidden states `[..., D]`, any floating dtype.
        weight: `[vocab, D]`, any floating dtype.
        targets: int64, the shape of x without its last dimension; from 0 to vocab - 1, or `ignore_index`.
        ignore_index: tokens with this target count for nothing.
        reduction: "mean" over the tokens that count (0 if there are none), "sum", or "none" for a loss per token.

    Returns:
        float32 (float64 with float64 x): a scalar, or the shape of targets for "none". Logits and the sum over tokens in the gradient of
        weight are float32 whatever the inputs; on a GPU, under bfloat16 autocast, the factors of the products are bfloat16. Differentiable
        with respect to x and weight.

    Raises:
        ArgumentError: a shape, dtype or device does not fit, reduction is unknown, or a target is out of range (values are looked at on
            the CPU only).

    Example:
        Equal logits over four words cost log 4.

        >>> import torch
        >>> loss = linear_cross_entropy(torch.ones(1, 3, 2), torch.zeros(4, 2), torch.tensor([[0, 3, -100]]))
        >>> round(loss.item(), 4)
        1.3863
    """
    sizes = checks.shapes(("weight", weight, "vocab D"))
    checks.tensors(("x", x), ("targets", targets))
    if x.ndim == 0 or x.shape[-1] != sizes["D"]:
        raise ArgumentError(f"x: expected [..., D={sizes['D']}] to fit weight, got {list(x.shape)}")
    if targets.shape != x.shape[:-1]:
        raise ArgumentError(f"targets: expected {list(x.shape[:-1])} like x without its last dimension, got {list(targets.shape)}")
    checks.floating(("x", x), ("weight", weight))
    if targets.dtype != torch.int64:
        raise ArgumentError(f"targets: expected torch.int64, got {targets.dtype}")
    if reduction not in ("mean", "sum", "none"):
        raise ArgumentError(f'reduction: expected "mean", "sum" or "none", got {reduction!r}')
    ignore_index = checks.integer("ignore_index", ignore_index, least=-(2**63))
    checks.same_device(("x", x), ("weight", weight), ("targets", targets))
    _check_values(targets, sizes["vocab"], ignore_index)
    row = OP.pick(x, D=sizes["D"], vocab=sizes["vocab"])
    loss = row(x.reshape(-1, sizes["D"]), weight, targets.reshape(-1), ignore_index, reduction)
    return loss.reshape(targets.shape) if reduction == "none" else loss


def _check_values(targets: Tensor, vocab: int, ignore_index: int) -> None:
    if torch.compiler.is_compiling() or targets.device.type != "cpu":
        return
    wrong = targets[((targets < 0) | (targets >= vocab)) & (targets != ignore_index)]
    if wrong.numel():
        raise ArgumentError(f"targets: expected 0 to {vocab - 1}, or {ignore_index} for tokens that do not count, got {int(wrong[0])}")
