"""The short causal convolution over a sequence and over a few new tokens: contracts and tables. README.md has the backward pass."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.core.replay import replayed

OP = Op(
    "causal_conv1d",
    (
        Impl("portable", "gdn.ops.short_conv.portable:causal_conv1d", triton_gpu(W=range(1, 9))),
        Impl("torch", "gdn.ops.short_conv.plain:causal_conv1d"),
        Impl("reference", "gdn.ops.short_conv.reference:causal_conv1d"),
    ),
)
"""Rows take `(x, weight, bias, activation, initial_state, packing)` and return `(y, final_state)`."""

STEP = Op(
    "causal_conv1d_step",
    (
        Impl("portable", "gdn.ops.short_conv.portable:causal_conv1d_step", triton_gpu(W=range(1, 9))),
        Impl("torch", "gdn.ops.short_conv.plain:causal_conv1d_step"),
        Impl("reference", "gdn.ops.short_conv.reference:causal_conv1d_step"),
    ),
)
"""Rows take `(x, weight, state, bias, activation, slots)`, write into `state` and return `y`."""

Activation = Literal["silu"] | None


@replayed
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = None,
    initial_state: Tensor | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor]:
    r"""One causal filter of W taps per channel.

    For each sequence and channel d, with the rows of `initial_state` (or zeros) standing before the first token:

        y_t = act( bias_d + sum over j = 0 .. W-1 of weight[d, W-1-j] x_{t-j} ),        act(z) = z, or z sigmoid(z) for "silu"

    The order of taps is that of torch's depthwise `Conv1d`: the last one meets the current token. The convolution of q, k and v in
    Gated Delta Networks (arXiv 2412.06464) has W = 4 and SiLU.

    Args:
        x: `[B, T, D]`.
        weight: `[D, W]`, any floating dtype.
        bias: `[D]`, any floating dtype.
        activation: None or "silu".
        initial_state: `[N, W - 1, D]`, the last inputs before each sequence, oldest first. Any floating dtype.
        packing: boundaries of N packed documents over the `B * T` tokens; a tap that would reach into another document reads that
            document's `initial_state` instead. Without it N = B.

    Returns:
        y `[B, T, D]` and the final state `[N, W - 1, D]`, both in the dtype of x: the last W - 1 inputs of each sequence, those of
        `initial_state` included where the sequence is shorter. Sums are float32 (float64 with float64 inputs). Both are differentiable
        with respect to x, weight, bias and initial_state.

    Raises:
        ArgumentError: a shape, dtype, device or activation does not fit.

    Example:
        Two taps, 10 for the token before and 1 for the current one.

        >>> import torch
        >>> x = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1)
        >>> y, state = causal_conv1d(x, torch.tensor([[10.0, 1.0]]))
        >>> y.flatten().tolist(), state.flatten().tolist()
        ([1.0, 12.0, 23.0], [3.0])
    """
    sizes = _check(x, weight, bias, activation)
    checks.same_device(("x", x), ("weight", weight), ("bias", bias), ("initial_state", initial_state))
    checks.boundaries(packing, sizes["B"], sizes["T"], x.device)
    if initial_state is not None:
        documents = sizes["B"] if packing is None else packing.num_documents
        checks.shapes(("initial_state", initial_state, "N W-1 D"), N=documents, D=sizes["D"], **{"W-1": sizes["W"] - 1})
        checks.floating(("initial_state", initial_state))
    return OP.pick(x, D=sizes["D"], W=sizes["W"])(x, weight, bias, activation, initial_state, packing)


@replayed
def causal_conv1d_step(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    *,
    bias: Tensor | None = None,
    activation: Activation = None,
    slots: Tensor | None = None,
) -> Tensor:
    r"""A few more tokens of each of many sequences through `causal_conv1d`, their states updated in place.

    For sequence b the past is row `slots[b]` of `state`: the result is that of `causal_conv1d` with `initial_state = state[slots]`,
    whose final state is then stored in the same rows. A negative slot skips the sequence: its y is zero and no state is touched.
    No gradients.

    Args:
        x: `[B, T, D]`, T of 1 or some; any T works.
        weight: `[D, W]`, any floating dtype.
        state: `[N, W - 1, D]`, the last inputs of each sequence, oldest first, any floating dtype. Updated in place.
        bias: `[D]`, any floating dtype.
        activation: None or "silu".
        slots: integers `[B]` below N, no row twice. Default: row b for sequence b, then N = B. On a GPU, where values are not looked at, a
            sequence with a slot that is not below N touches no memory, and its y is no number.

    Returns:
        y `[B, T, D]` in the dtype of x. Sums are float32 (float64 with float64 inputs).

    Raises:
        ArgumentError: a shape, dtype, device or activation does not fit, or gradients are enabled and an argument requires one.

    Example:
        >>> import torch
        >>> state = torch.tensor([[[2.0]]])
        >>> causal_conv1d_step(torch.tensor([[[3.0]]]), torch.tensor([[10.0, 1.0]]), state).item(), state.item()
        (23.0, 3.0)
    """
    sizes = _check(x, weight, bias, activation)
    checks.shapes(("state", state, "N W-1 D"), D=sizes["D"], **{"W-1": sizes["W"] - 1})
    checks.floating(("state", state))
    checks.same_device(("x", x), ("weight", weight), ("state", state), ("bias", bias), ("slots", slots))
    checks.in_place(state)
    checks.slots(slots, sizes["B"], state.shape[0])
    checks.no_gradient(("x", x), ("weight", weight), ("state", state), ("bias", bias))
    return STEP.pick(x, D=sizes["D"], W=sizes["W"])(x, weight, state, bias, activation, slots)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> dict[str, int]:
    sizes = checks.shapes(("x", x, "B T D"), ("weight", weight, "D W"))
    if sizes["W"] < 1:
        raise ArgumentError(f"weight: expected [D, W] with at least one tap, got {list(weight.shape)}")
    if bias is not None:
        checks.shapes(("bias", bias, "D"), D=sizes["D"])
    if activation not in (None, "silu"):
        raise ArgumentError(f'activation: expected None or "silu", got {activation!r}')
    checks.floating(("x", x), ("weight", weight), ("bias", bias))
    return sizes
