"""The launches of a call, written down once for each shape, so that a later call has only addresses to fill in.

    schedule = Schedule(T=T, HV=HV, K=K)                       # what parameters of these names get, in any kernel
    schedule.add(sums_kernel, programs, warps=2, BH=16)        # the others are buffers: x, sums
    schedule.run({"x": x}, (workspace, space))

What is cached must be cached by all that the values, the dtypes, the device and the absence of tensors depend on; every tensor must begin at a
multiple of 16 bytes. The first run looks at each argument and lets Triton compile; the later ones call the compiled kernels with integers for
addresses, which Triton's launcher takes as they are.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdn.core.portable_launch import launch
from gdn.core.portable_workspace import Workspace

Tensors = Mapping[str, Tensor | None]


@dataclass
class _Step:
    kernel: Any
    programs: int
    options: dict[str, Any]
    names: tuple[str, ...]
    """Its buffers, the kernel's first parameters."""
    rest: tuple[Any, ...]
    """Its other arguments."""


class Schedule:
    """See the module's docstring. `values` are for all kernels; those of `add` come before them."""

    def __init__(self, **values: Any) -> None:
        self._values = values
        self._steps: list[_Step] = []
        self._compiled: list[tuple[Any, ...]] = []

    def add(
        self,
        kernel: Any,
        programs: int,
        *,
        warps: int,
        stages: int = 1,
        registers: int | None = None,
        names: Mapping[str, str] | None = None,
        **values: Any,
    ) -> None:
        """One more launch, of `programs` programs. `names` says which buffer a parameter of another name is."""
        parameters = list(kernel.arg_names)
        given = self._values | values
        unknown = [name for name in values if name not in parameters]
        if unknown:
            raise TypeError(f"{kernel.fn.__name__} has no parameter {unknown[0]}")
        buffers = [name for name in parameters if name not in given]
        if parameters[: len(buffers)] != buffers or len(buffers) < 2:
            raise TypeError(f"{kernel.fn.__name__}: expected two or more buffers before all values, got the buffers {', '.join(buffers)}")
        names = {} if names is None else names
        self._steps.append(
            _Step(
                kernel,
                programs,
                {"warps": warps, "stages": stages, "registers": registers},
                tuple(names.get(name, name) for name in buffers),
                tuple(given[name] for name in parameters[len(buffers) :]),
            )
        )

    def run(self, tensors: Tensors, *spaces: tuple[Workspace, Tensor]) -> None:
        """Launch all, on the current stream of the device of the tensors."""
        if not self._compiled:
            self._run_first(tensors, *spaces)
            return
        at = {name: 0 if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()}
        for workspace, space in spaces:
            at.update(workspace.addresses(space))
        device = spaces[0][1].get_device()
        if device != torch._C._cuda_getDevice():
            with torch.cuda.device(device):
                self._run_again(at, device)
        else:
            self._run_again(at, device)

    def _run_first(self, tensors: Tensors, *spaces: tuple[Workspace, Tensor]) -> None:
        at = dict(tensors)
        for workspace, space in spaces:
            at.update(workspace.views(space))
        kernels = [launch(s.kernel, (s.programs,), *[at[name] for name in s.names], *s.rest, **s.options) for s in self._steps]
        if all(kernel is not None for kernel in kernels):
            self._compiled = [
                (kernel.run, s.programs, kernel.function, kernel.packed_metadata, operator.itemgetter(*s.names), s.rest)
                for kernel, s in zip(kernels, self._steps, strict=True)
            ]

    def _run_again(self, at: Mapping[str, int], device: int) -> None:
        stream = torch._C._cuda_getCurrentRawStream(device)
        for run, programs, function, metadata, take, rest in self._compiled:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *take(at), *rest)
