"""All that a replay has the GPU do, handed to the CUDA driver in one call.

    kernel = of_compiled(compiled)                                            # what the driver has to know of a compiled Triton kernel
    start = plan([(kernel, (8, 1, 1), [(0, 0), [2.5], (1, 16)])], 2)          # arguments: (which address, bytes after it), or [a value]
    start(stream, first_address, second_address)

Triton's launcher takes 4 to 5 microseconds for each kernel, of which the driver needs most. launches.c has the driver run several as one
graph with other addresses, which takes 2 to 4 microseconds for all. Products by cuBLAS are part of it (`Nodes`, of portable_product.py). It is
compiled by Triton as Triton compiles its own launcher, once, and lies in Triton's cache. Where that is impossible (ROCm, drivers older than
CUDA 12.4, no compiler any more) `plan` returns None, and replays launch each kernel through Triton.
"""

from __future__ import annotations

import struct
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

_SOURCES = [Path(__file__).with_name(name) for name in ("launches.c", "products.c")]
_NAME = "gdn_launches"
_FORMATS = {
    "i1": "b",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u1": "B",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}
_ADDRESS, _NOWHERE = "*", bytes(8)
_PLAIN = {"num_ctas": 1, "launch_cooperative_grid": False, "launch_pdl": False, "global_scratch_size": 0, "profile_scratch_size": 0}
"""What is so of each kernel that is launched by its grid, threads and shared memory alone, where Triton's metadata has it."""
_SCRATCH = 2
"""Addresses that Triton adds to the parameters of a kernel: of scratch memory, which these have none of."""

Arguments = Sequence[tuple[int, int] | list[Any]]


class Kernel(NamedTuple):
    """What the driver has to know to launch it."""

    name: str
    function: int
    """The driver's handle."""
    threads: int
    shared: int
    """Bytes."""
    kinds: tuple[str | None, ...]
    """Of each argument: an address, how a number is packed, or None for a constant of the code."""


class Nodes(NamedTuple):
    """What cuBLAS has the GPU do in one of its calls."""

    chain: Any
    """As launches.c knows it."""
    workspace: int
    """Bytes."""


Launch = tuple[Kernel, tuple[int, ...], Arguments] | tuple[Nodes, tuple[()], Arguments]
"""Programs along three axes. The arguments of nodes are addresses of both factors, the product and the workspace, if there is one."""


def of_compiled(compiled: Any) -> Kernel | None:
    """None for a kernel that needs more than that, such as clusters or scratch memory."""
    metadata, source = compiled.metadata, compiled.src
    types = list(source.signature.values())
    kinds = [_ADDRESS if t[0] == "*" else None if t == "constexpr" else _FORMATS.get(t, "") for t in types]
    if "" in kinds or any(getattr(metadata, name, plain) != plain for name, plain in _PLAIN.items()):
        return None
    threads = metadata.num_warps * metadata.target.warp_size
    return Kernel(source.fn.__name__, compiled.function, threads, metadata.shared, tuple(kinds))


def plan(launches: Sequence[Launch], addresses: int) -> Callable[..., None] | None:
    """How to launch these in a row: `start(stream, *addresses)`. None where it cannot be done in one call.

    Args:
        launches: one after another.
        addresses: how many there are.
    """
    library = module()
    if library is None:
        return None
    try:
        return library.plan(tuple([_part(*launch) for launch in launches]), addresses)
    except (ValueError, OverflowError, struct.error):  # more addresses than it takes, or another Triton hands kernels other parameters
        return None


def _part(what: Kernel | Nodes, grid: tuple[int, ...], arguments: Arguments) -> tuple[Any, ...]:
    if isinstance(what, Nodes):
        return what.chain, tuple(arguments)
    return what.function, *grid, what.threads, what.shared, _parameters(what, arguments)


def _parameters(kernel: Kernel, arguments: Arguments) -> tuple[Any, ...]:
    found = list[Any]()
    for kind, argument in zip(kernel.kinds, arguments, strict=True):
        if kind is not None:
            found.append(argument if isinstance(argument, tuple) else struct.pack(kind, argument[0]))
    return (*found, *[_NOWHERE] * _SCRATCH)


_lock = threading.Lock()
_found: list[tuple[Any, str]] = []


def module() -> Any:
    """launches.c, compiled when it is first asked for; None where that fails."""
    return _once()[0]


def why_not() -> str:
    """What was in the way; nothing where there is a module."""
    return _once()[1]


def _once() -> tuple[Any, str]:
    with _lock:
        if not _found:
            _found.append(_built())
        return _found[0]


def _built() -> tuple[Any, str]:
    if torch.version.cuda is None:
        return None, "this torch is not for CUDA"
    from triton.backends.nvidia import driver
    from triton.runtime.build import compile_module_from_src

    try:
        return compile_module_from_src(
            "".join(source.read_text() for source in _SOURCES), _NAME, include_dirs=list(driver.include_dirs)
        ), ""
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as problem:
        return None, f"launches.c cannot be compiled or loaded: {problem}"
