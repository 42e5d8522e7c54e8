"""The launches of a call by name: what all kernels are told alike is said once, and each takes what it has parameters for.

    schedule = Schedule(T=T, HV=HV, K=K)                       # what parameters of these names get, in any kernel
    schedule.add(sums_kernel, programs, warps=2, BH=16)        # the others are buffers: x, sums
    schedule.run({"x": x}, (workspace, space))

What is cached must be cached by all that the values, the dtypes and the absence of tensors depend on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

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
        at = dict(tensors)
        for workspace, space in spaces:
            at.update(workspace.views(space))
        for s in self._steps:
            launch(s.kernel, (s.programs,), *[at[name] for name in s.names], *s.rest, **s.options)
