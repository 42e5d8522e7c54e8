"""The two gates of the delta rule, one number a token and value head: contracts and tables."""

from __future__ import annotations

from torch import Tensor

from gdn.core import checks
from gdn.core.dispatch import Impl, Op, triton_gpu
from gdn.core.errors import ArgumentError
from gdn.core.replay import replayed

DECAY_GATE = Op(
    "decay_gate",
    (
        Impl("portable", "gdn.ops.gates.portable:decay_gate", triton_gpu(A_log=(32,), HV=range(1, 1025))),
        Impl("torch", "gdn.ops.gates.plain:decay_gate"),
        Impl("reference", "gdn.ops.gates.reference:decay_gate"),
    ),
)
"""Rows take `(a, A_log, dt_bias)`."""

WRITE_GATE = Op(
    "write_gate",
    (
        Impl("portable", "gdn.ops.gates.portable:write_gate", triton_gpu()),
        Impl("torch", "gdn.ops.gates.plain:write_gate"),
        Impl("reference", "gdn.ops.gates.reference:write_gate"),
    ),
)
"""Rows take `(b, top)`."""


@replayed
def decay_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    r"""How much of the memory each token forgets, as a log decay:

        g = -exp(A_log) softplus(a + dt_bias),        softplus(z) = log(1 + exp(z))

    The parametrisation of Mamba2 (arXiv 2405.21060), used by Gated DeltaNet (arXiv 2412.06464).

    Args:
        a: projected input `[B, T, HV]`, any floating dtype. Minus infinity (padding) forgets nothing.
        A_log: `[HV]`, float32 (or float64). Minus infinity is a head that never forgets.
        dt_bias: `[HV]`, the dtype of A_log.

    Returns:
        g `[B, T, HV]`, at most 0, float32 whatever the dtype of a (float64 if an argument is). Differentiable with respect to all three;
        values and gradients are finite for every finite argument with A_log below 88.

    Raises:
        ArgumentError: a shape, dtype or device does not fit.

    Example:
        softplus(0) is log 2.

        >>> import torch
        >>> decay_gate(torch.zeros(1, 1, 1), torch.zeros(1), torch.zeros(1)).item()
        -0.6931471824645996
    """
    checks.shapes(("a", a, "B T HV"), ("A_log", A_log, "HV"), ("dt_bias", dt_bias, "HV"))
    checks.floating(("a", a))
    checks.same_dtype(("A_log", A_log), ("dt_bias", dt_bias))
    if A_log.dtype != checks.accumulate_dtype(A_log.dtype):
        raise ArgumentError(f"A_log: expected float32 (the gate loses its precision otherwise), got {A_log.dtype}")
    checks.same_device(("a", a), ("A_log", A_log), ("dt_bias", dt_bias))
    return DECAY_GATE.pick(a, HV=a.shape[2], A_log=8 * A_log.element_size())(a, A_log, dt_bias)


@replayed
def write_gate(b: Tensor, *, top: float = 1.0) -> Tensor:
    r"""How strongly each token writes:

        beta = top sigmoid(b)

    top = 2 allows transitions with negative eigenvalues (arXiv 2411.12537).

    Args:
        b: projected input `[B, T, HV]`, any floating dtype. Minus infinity (padding) writes nothing.
        top: largest strength, above 0 and at most 2.

    Returns:
        beta `[B, T, HV]`, float32 whatever the dtype of b (float64 for float64). Differentiable.

    Raises:
        ArgumentError: a shape or dtype does not fit, or top is out of range.

    Example:
        >>> import torch
        >>> write_gate(torch.zeros(1, 1, 1), top=2.0).item()
        1.0
    """
    checks.shapes(("b", b, "B T HV"))
    checks.floating(("b", b))
    top = checks.number("top", top, above=0, most=2)
    return WRITE_GATE.pick(b)(b, top)
