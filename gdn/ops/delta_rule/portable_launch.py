"""Launching Triton kernels at little cost to the host.

Triton's own launch looks at each argument to find the compiled kernel, some 20 microseconds for thirty arguments. Here the caller names
what the choice depends on, and later launches with the same name go straight to the compiled kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.jit import JITFunction


@dataclass(frozen=True)
class Launch:
    """Block sizes and resources of one kernel."""

    block: int
    """Columns of V of a program; of K at a time for solve, scores and gradient."""
    warps: int
    stages: int = 2
    """Depth of the software pipeline over chunks, or over blocks of V."""
    inner: int = 0
    """Columns of V at a time, for the gradient kernel."""
    registers: int | None = None
    """Most registers a thread may use."""


_COMPILED: dict[Any, Any] = {}


def launch(kernel: Any, grid: tuple[int, ...], use: Launch, key: Any, *args: Any) -> None:
    """Run `kernel` on the current stream of the current device.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along each axis.
        use: number of warps and limit of registers.
        key: everything that the compiled code depends on besides the pointers: data types, constants, sizes. Pointers must be multiples
            of 16 bytes.
        args: the kernel's arguments, all of them, in order.
    """
    if not isinstance(kernel, JITFunction):  # the interpreter
        kernel[grid](*args)
        return
    device = torch.cuda.current_device()
    name = (kernel.fn.__name__, device, key)
    compiled = _COMPILED.get(name)
    if compiled is None:
        _COMPILED[name] = kernel[grid](*args, num_warps=use.warps, num_stages=1, maxnreg=use.registers)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)
