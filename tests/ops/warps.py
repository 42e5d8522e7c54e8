"""Every launch with another number of warps than it asks for: results must not depend on it, and compilers have made them do so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest

from gdn.core import portable_launch
from gdn.core.replay_known import forget

FACTORS = {"half": Fraction(1, 2), "twice": Fraction(2)}
MOST = 16
HELD = {
    *(f"delta_rule.portable_scan.{part}_kernel" for part in ("backward", "backward_summary", "handover", "output", "states", "summary")),
    "delta_rule.portable_prepare.pair_kernel",
    "delta_rule.portable_grad.gradient_kernel",
    "delta_channel.portable_scan.backward_kernel",
    "delta_channel.portable_grad.gradient_kernel",
    *(f"linear_recurrence.portable_channels.{part}_kernel" for part in ("channels", "channel_read", "channel_output")),
    *(f"linear_recurrence.portable_channels.{part}_gradient_kernel" for part in ("channel", "other")),
    *(f"linear_recurrence.portable_heads.{part}_kernel" for part in ("gradient", "output")),
    *(f"attention.portable.{part}_gradient_kernel" for part in ("key", "query")),
}
"""Kernels that get no more warps than they ask for: with twice as many, Triton 3.6 and 3.7.1 compile them wrong for Hopper. They have
products of fewer rows than 16 a warp with the first operand in shared memory, and read beyond it (notes/triton_pipelines.md).
test_warps.py finds out, without a GPU, that these kernels have such products then and no others do."""


def name_of(kernel: Any) -> str:
    """Subject, module and name of a kernel."""
    return f"{kernel.fn.__module__.removeprefix('gdn.ops.')}.{kernel.fn.__name__}"


@contextmanager
def warps_times(factor: Fraction, *, hold: bool = True) -> Iterator[None]:
    """In here every launch takes `factor` times the warps that it asks for, from 1 to 16; those that are `HELD` no more, if `hold`.

    A limit of registers is one for that number of warps, and goes where it changes. Replays hold compiled code: they are forgotten before
    and after.
    """
    original = portable_launch.Launch

    def changed(kernel: Any, args: tuple[Any, ...], warps: int, stages: int, registers: int | None, key: Any) -> portable_launch.Launch:
        held = hold and factor > 1 and name_of(kernel) in HELD
        found = warps if held else min(max(int(warps * factor), 1), MOST)
        return original(kernel, args, found, stages, registers if found == warps else None, key)

    forget()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(portable_launch, "Launch", changed)
            yield
    finally:
        forget()
