"""The gates in Triton, any GPU from sm_80 on: one pass each way. Gradients of the two parameters are summed by at most `PARTS` programs
over their tokens, then over the programs: no atomics, one order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.opaque import Opaque
from gdn.core.portable_launch import launch
from gdn.core.portable_math import exp, int64, sigmoid, softplus
from gdn.core.portable_rows import fresh, power_of_two

BLOCK = 1024
"""Numbers of a program."""
PARTS = 256
"""Most programs of the backward pass of the decay."""


@triton.jit
def decay(a, A_log, dt_bias):
    return -exp(A_log) * softplus(a + dt_bias)


@triton.jit
def decay_gradients(a, A_log, dt_bias, dg):
    """Of a (and dt_bias), and of A_log."""
    rate = -exp(A_log)
    z = a + dt_bias
    return dg * rate * sigmoid(z), dg * rate * softplus(z)


@triton.jit
def decay_kernel(a, A_log, dt_bias, g, count, HV, BLOCK: tl.constexpr):
    i = int64(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    h = i % HV
    rate, bias = tl.load(A_log + h, mask=valid, other=0.0), tl.load(dt_bias + h, mask=valid, other=0.0)
    value = tl.load(a + i, mask=valid, other=0.0).to(tl.float32)
    tl.store(g + i, decay(value, rate.to(tl.float32), bias.to(tl.float32)), mask=valid)


@triton.jit
def decay_backward_kernel(a, A_log, dt_bias, dg, da, partial, tokens, each, HV, BH: tl.constexpr, BT: tl.constexpr):
    """`each` blocks of BT tokens one after another, all heads; partial [2, parts, HV]. Grid [parts]."""
    part = int64(tl.program_id(0))
    h = tl.arange(0, BH)
    rate = tl.load(A_log + h, mask=h < HV, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(dt_bias + h, mask=h < HV, other=0.0).to(tl.float32)[None, :]
    rates = tl.zeros((BT, BH), tl.float32)
    biases = tl.zeros((BT, BH), tl.float32)
    for step in range(each):
        t = (part * each + step) * BT + tl.arange(0, BT)
        valid = (t < tokens)[:, None] & (h < HV)[None, :]
        at = t[:, None] * HV + h[None, :]
        value = tl.load(a + at, mask=valid, other=0.0).to(tl.float32)
        slope = tl.load(dg + at, mask=valid, other=0.0).to(tl.float32)
        of_a, of_rate = decay_gradients(value, rate, bias, slope)
        tl.store(da + at, of_a.to(da.dtype.element_ty), mask=valid)
        rates += of_rate
        biases += of_a
    tl.store(partial + part * HV + h, tl.sum(rates, 0), mask=h < HV)
    tl.store(partial + (tl.num_programs(0) + part) * HV + h, tl.sum(biases, 0), mask=h < HV)


@triton.jit
def write_kernel(b, beta, top, count, BLOCK: tl.constexpr):
    i = int64(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    tl.store(beta + i, top * sigmoid(tl.load(b + i, mask=valid, other=0.0).to(tl.float32)), mask=valid)


@triton.jit
def write_backward_kernel(b, dbeta, db, top, count, BLOCK: tl.constexpr):
    i = int64(tl.program_id(0)) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    s = sigmoid(tl.load(b + i, mask=valid, other=0.0).to(tl.float32))
    slope = tl.load(dbeta + i, mask=valid, other=0.0).to(tl.float32)
    tl.store(db + i, (slope * top * s * (1.0 - s)).to(db.dtype.element_ty), mask=valid)


def decay_gate(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """See `gdn.ops.decay_gate`."""
    return _DECAY(a, A_log, dt_bias)[0]


def write_gate(b: Tensor, top: float) -> Tensor:
    """See `gdn.ops.write_gate`."""
    return _WRITE(b, float(top))[0]


def _decay(a: Tensor, A_log: Tensor, dt_bias: Tensor, keep: bool) -> tuple[Tensor]:
    g = torch.empty(a.shape, dtype=torch.float32, device=a.device)
    launch(
        decay_kernel, (-(-a.numel() // BLOCK),), a.contiguous(), A_log.contiguous(), dt_bias.contiguous(), g, a.numel(), a.shape[2], BLOCK
    )  # fmt: skip
    return (g,)


def _decay_fake(a: Tensor, A_log: Tensor, dt_bias: Tensor, keep: bool) -> tuple[Tensor]:
    return (a.new_empty(a.shape, dtype=torch.float32),)


def _decay_backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor]:
    a, A_log, dt_bias = args
    (dg,) = grads
    assert dg is not None
    HV = a.shape[2]
    da = fresh(a)
    tokens, BH, BT, each, parts = parts_of(a.shape[0] * a.shape[1], HV)
    partial = torch.empty((2, parts, HV), dtype=torch.float32, device=a.device)
    launch(
        decay_backward_kernel, (parts,), a.contiguous(), A_log.contiguous(), dt_bias.contiguous(), dg.contiguous(), da, partial, tokens,
        each, HV, BH, BT,
    )  # fmt: skip
    return [da, partial[0].sum(0), partial[1].sum(0)]


def parts_of(tokens: int, HV: int) -> tuple[int, int, int, int, int]:
    """Tokens, padded heads, tokens of a block, blocks of a program, programs."""
    BH = power_of_two(HV)
    BT = max(1, BLOCK // BH)
    blocks = -(-tokens // BT)
    each = max(1, -(-blocks // PARTS))
    return tokens, BH, BT, each, -(-blocks // each)


def _write(b: Tensor, top: float, keep: bool) -> tuple[Tensor]:
    beta = torch.empty(b.shape, dtype=torch.float32, device=b.device)
    launch(write_kernel, (-(-b.numel() // BLOCK),), b.contiguous(), beta, top, b.numel(), BLOCK)
    return (beta,)


def _write_fake(b: Tensor, top: float, keep: bool) -> tuple[Tensor]:
    return (b.new_empty(b.shape, dtype=torch.float32),)


def _write_backward(args: tuple[Any, ...], saved: tuple[Tensor, ...], grads: Sequence[Tensor | None]) -> list[Tensor]:
    b, top = args
    (dbeta,) = grads
    assert dbeta is not None
    db = fresh(b)
    launch(write_backward_kernel, (-(-b.numel() // BLOCK),), b.contiguous(), dbeta.contiguous(), db, top, b.numel(), BLOCK)
    return [db]


_DECAY = Opaque(
    "gdn::decay_gate_portable", _decay, _decay_backward, fake=_decay_fake, results=1, differentiable=("a", "A_log", "dt_bias"), replay=True
)
_WRITE = Opaque("gdn::write_gate_portable", _write, _write_backward, fake=_write_fake, results=1, differentiable=("b",), replay=True)
