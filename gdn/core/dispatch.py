"""Which implementation serves a call, and why.

An `Op` is a table of `Impl` rows in order of preference; the last row takes any call. Each row says what it `Needs` as data, so the same
rows choose at run time, explain themselves (`Op.explain`, `gdn doctor`), parametrise the tests and print the support table.

    OP = Op("gated_delta_rule", (
        Impl("chunked", "gdn.ops.delta_rule.chunked:gated_delta_rule", Needs()),
        Impl("reference", "gdn.ops.delta_rule.reference:gated_delta_rule"),
    ))
    OP.pick(q, K=128, V=128)(q, k, v, ...)

A row's module is imported when the row is first chosen. Chosen automatically, a row is logged once (logger "gdn.dispatch"); asked for by
name (`use`) and unable to serve, it raises `ImplementationError` with the reason. Nothing falls back silently. Under `TRITON_INTERPRET=1`
a Triton row asked for by name also serves the CPU.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
import operator
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from gdn.core import device as hardware
from gdn.core.errors import ImplementationError, nearest
from gdn.core.replay_known import forget

logger = logging.getLogger("gdn.dispatch")

ENTRY_POINTS = "gdn.implementations"
"""Entry-point group: each entry is a function without arguments that calls `Op.register`."""
OLDEST = 80
"""Compute capability of the oldest GPUs that the portable Triton rows are for: those with products of bfloat16."""

_OPS: dict[str, Op] = {}


@dataclass(frozen=True, kw_only=True)
class Call:
    """What the choice depends on: never the values of a tensor, never its length."""

    device: str
    index: int
    dtype: torch.dtype
    dims: tuple[tuple[str, int], ...] = ()
    compiled: bool = False
    """In a graph of torch.compile, not one that is exported."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What an implementation needs, as data. Empty means: anything."""

    device: str | None = None
    """Device type, "cpu" or "cuda"."""
    arch: int = 0
    """Least compute capability of the GPU, 90 for Hopper."""
    dtypes: tuple[torch.dtype, ...] = ()
    """Data types of the main input."""
    dims: Mapping[str, Container[int]] = field(default_factory=dict)
    """Allowed values of named dimensions: a tuple or a range."""
    packages: tuple[str, ...] = ()
    """Python packages that must be importable."""
    compiled: bool = False
    """Only in a graph of torch.compile."""

    def why_not(self, call: Call, *, interpreted: bool = False) -> str | None:
        """The reason why this call cannot be served, None when it can.

        With `interpreted` the CPU will do for a row that needs a GPU of any kind: Triton's interpreter runs its kernels.
        """
        if self.device and call.device != self.device and not (interpreted and call.device == "cpu" and self.arch <= OLDEST):
            return f"needs a {self.device} tensor, got {call.device}"
        if self.compiled and not call.compiled:
            return "needs torch.compile"
        for package in self.packages:
            if not hardware.has_package(package):
                return f'needs the package "{package}"'
        if call.device == "cuda" and 0 < hardware.capability(call.index) < self.arch:  # 0: `explain` was asked where there is no GPU
            return f"needs compute capability {self.arch / 10:.1f}, got {hardware.capability(call.index) / 10:.1f}"
        if self.dtypes and call.dtype not in self.dtypes:
            return f"needs {' or '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, got {call.dtype}"
        for name, value in call.dims:
            if name in self.dims and value not in self.dims[name]:
                return f"needs {name} in {self.dims[name]}, got {value}"
        return None


def triton_gpu(**dims: Container[int]) -> Needs:
    """What the portable Triton rows need: a GPU, not too old, Triton and a data type of at most 32 bits."""
    return Needs(device="cuda", arch=OLDEST, dtypes=(torch.bfloat16, torch.float16, torch.float32), dims=dims, packages=("triton",))


@dataclass(frozen=True)
class Impl:
    """One row: a name, where its function lives ("module:function") and what it needs."""

    name: str
    target: str
    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True)
class Verdict:
    """One row's answer to `Op.explain`."""

    name: str
    reason: str | None
    """None when the row can serve the call."""


class Op:
    """A named table of implementations."""

    def __init__(self, name: str, impls: tuple[Impl, ...]) -> None:
        self.name = name
        self.impls = impls
        self.forced: str | None = None
        self._functions: dict[str, Callable[..., Any]] = {}
        self._choices: dict[Any, str] = {}
        _OPS[name] = self

    def __repr__(self) -> str:
        return f"Op({self.name!r}: {', '.join(row.name for row in self.impls)})"

    def pick(self, tensor: torch.Tensor, **dims: int) -> Callable[..., Any]:
        """The function of the first row that can serve a call with this main input and these dimensions."""
        at = tensor.device
        sizes = tuple([(name, operator.index(size)) for name, size in dims.items()])
        compiled = torch.compiler.is_compiling() and not _exporting()  # who runs an exported graph may not compile it
        return self._functions[_choose(self.name, self.forced, at.type, at.index or 0, tensor.dtype, sizes, compiled)]

    def explain(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, *, index: int = 0, compiled: bool = False, **dims: int
    ) -> list[Verdict]:
        """For each row, why it cannot serve such a call (None: it can). The first that can is the automatic choice."""
        _plug_in()
        call = Call(device=device, index=index, dtype=dtype, dims=tuple(dims.items()), compiled=compiled)
        return [Verdict(row.name, row.needs.why_not(call)) for row in self.impls]

    def register(self, impl: Impl, *, before: str | None = None) -> None:
        """Add a row, before a named one (default: before all others)."""
        names = [row.name for row in self.impls]
        if impl.name in names:
            raise ImplementationError(f'{self.name} already has an implementation "{impl.name}"')
        if before is not None:
            self._check_name(before)
        at = names.index(before) if before is not None else 0
        self.impls = (*self.impls[:at], impl, *self.impls[at:])
        self._choices.clear()
        forget()

    def function(self, name: str) -> Callable[..., Any]:
        """The function of a row by name, imported now."""
        self._check_name(name)
        if name not in self._functions:
            row = next(row for row in self.impls if row.name == name)
            module, _, attribute = row.target.partition(":")
            self._functions[name] = getattr(importlib.import_module(module), attribute)
        return self._functions[name]

    def _check_name(self, name: str) -> None:
        names = [row.name for row in self.impls]
        if name not in names:
            raise ImplementationError(f'{self.name} has no implementation "{name}".{nearest(name, names)}')

    def _select(self, forced: str | None, call: Call) -> str:
        if forced is not None:
            _plug_in()
            needs = next(row.needs for row in self.impls if row.name == forced)
            by_triton = "triton" in needs.packages
            reason = needs.why_not(call, interpreted=by_triton and hardware.interprets_triton())
            if reason:
                may = by_triton and needs.why_not(call, interpreted=True) is None
                hint = "; or set TRITON_INTERPRET=1 in the environment: Triton then runs on the CPU, slowly" if may else ""
                raise ImplementationError(f'{self.name}: "{forced}" was asked for and cannot run: {reason}{hint}')
            return forced
        verdicts = self.explain(call.device, call.dtype, index=call.index, compiled=call.compiled, **dict(call.dims))
        for verdict in verdicts:
            if verdict.reason is None:
                return verdict.name
        reasons = "; ".join(f"{v.name}: {v.reason}" for v in verdicts)
        raise ImplementationError(f"{self.name}: no implementation can run. {reasons}")


def _choose(
    name: str,
    forced: str | None,
    device: str,
    index: int,
    dtype: torch.dtype,
    dims: tuple[tuple[str, int], ...],
    compiled: bool,
) -> str:
    """The chosen row's name. A constant to the compiler: its arguments are, and they are guarded."""
    op = _OPS[name]
    key = (forced, device, index, dtype, dims, compiled)
    chosen = op._choices.get(key)
    if chosen is None:
        chosen = op._select(forced, Call(device=device, index=index, dtype=dtype, dims=dims, compiled=compiled))
        if forced is None and chosen not in op._choices.values():
            logger.info("%s: %s (%s, %s, %s)", name, chosen, device, dtype, dict(dims))
        op.function(chosen)
        op._choices[key] = chosen
    return chosen


def _exporting() -> bool:
    """Called, not traced: where torch 2.11 traces `is_exporting` for torch.compile, it takes it for true."""
    return torch.compiler.is_exporting()


# What torch.compiler.assume_constant_result does, without its import of the whole compiler, half of the time that importing gdn takes.
for _function in (_choose, _exporting):
    vars(_function)["_dynamo_marked_constant"] = True


def ops() -> dict[str, Op]:
    """All tables by name, after importing every subject of gdn.ops."""
    import pkgutil

    package = importlib.import_module("gdn.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"gdn.ops.{module.name}")
    _plug_in()
    return dict(sorted(_OPS.items()))


@contextlib.contextmanager
def use(**implementations: str) -> Iterator[None]:
    """Force implementations by name inside a block: `with use(gated_delta_rule="reference"): ...`

    Process-wide, not per thread. Raises `ImplementationError` for unknown names at once, and at the call if the row cannot serve it.
    """
    tables = ops()
    for name, impl in implementations.items():
        if name not in tables:
            raise ImplementationError(f'no operator "{name}".{nearest(name, tables)}')
        tables[name]._check_name(impl)
    before = {name: tables[name].forced for name in implementations}
    try:
        for name, impl in implementations.items():
            tables[name].forced = impl
        forget()
        yield
    finally:
        for name, impl in before.items():
            tables[name].forced = impl
        forget()


_plugged = False


def _plug_in() -> None:
    """Let installed packages add their rows, once."""
    global _plugged
    if _plugged:
        return
    _plugged = True
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()()
