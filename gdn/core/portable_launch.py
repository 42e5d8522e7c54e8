"""Launching Triton kernels at little cost to the host.

Triton's own launch binds names, looks at each argument and walks its cache: some 20 microseconds for a dozen arguments. Here the choice of
the compiled kernel is one dictionary lookup with what the code depends on: data types, alignment, constants. A new choice goes through
Triton once, which compiles or reads its cache on disk. Under `TRITON_INTERPRET=1` the interpreter runs the kernel on the CPU.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from gdn.core.replay import recorder

_COMPILED: dict[tuple[Any, ...], Any] = {}
_CONSTANTS: dict[Any, tuple[bool, ...]] = {}
_LARGEST_INT32 = 2**31 - 1


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 1, registers: int | None = None, key: Any = None
) -> Any:
    """Run `kernel` on the current stream of the device of its tensors. Nothing happens for an empty grid.

    Returns what was compiled; None for an empty grid and from the interpreter.

    Args:
        kernel: a `triton.jit` function.
        grid: programs along one to three axes; only the first may pass 65535.
        args: the kernel's arguments, all of them, in order; the first is a tensor.
        warps: of a program.
        stages: depth of the software pipeline of its loops.
        registers: most of them that a thread may use.
        key: everything that the compiled code depends on, if the caller knows it; else each argument is looked at.
    """
    if 0 in grid:
        return None
    seen = recorder()
    if not isinstance(kernel, JITFunction):
        if seen is not None:
            seen.refused = True
        kernel[grid](*args)
        return None
    device = args[0].get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            compiled = _launch(kernel, grid, args, device, warps, stages, registers, key)
    else:
        compiled = _launch(kernel, grid, args, device, warps, stages, registers, key)
    if seen is not None:
        seen.launch(starter(compiled), grid, args)
    return compiled


def _launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], device: int, warps: int, stages: int, registers: int | None, key: Any
) -> Any:
    kinds, plain = _kinds(kernel, args) if key is None else ((key,), args)
    name = (kernel.fn, device, warps, stages, registers, *kinds)
    compiled = _COMPILED.get(name)
    if compiled is None:
        compiled = _COMPILED[name] = kernel[grid](*args, num_warps=warps, num_stages=stages, maxnreg=registers)
        return compiled
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *plain)
    return compiled


def compile_together(calls: Iterable[tuple[Any, tuple[Any, ...], dict[str, Any]]]) -> None:
    """Compile what launches to come will need, each kernel in a thread of its own: Triton lets other threads run meanwhile.

    `calls` are kernels with their arguments and the options of `launch`. Where a kernel comes again with the same options, the first speaks for all.
    """
    wanted: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}
    for kernel, args, options in calls:
        resources = (options["warps"], options["stages"], options["registers"])
        if not isinstance(kernel, JITFunction) or (kernel.fn, *resources) in wanted:
            continue
        if (kernel.fn, args[0].get_device(), *resources, *_kinds(kernel, args)[0]) not in _COMPILED:
            wanted[kernel.fn, *resources] = kernel, args
    if len(wanted) > 1:
        with ThreadPoolExecutor(len(wanted)) as threads:
            for done in [threads.submit(_compile, *what, *key[1:]) for key, what in wanted.items()]:
                done.result()


def _compile(kernel: Any, args: tuple[Any, ...], warps: int, stages: int, registers: int | None) -> None:
    with torch.cuda.device(args[0].get_device()):  # a thread begins at the first device
        kernel.warmup(*args, grid=(1,), num_warps=warps, num_stages=stages, maxnreg=registers)


def starter(compiled: Any) -> tuple[Callable[..., None], tuple[Any, ...], bool]:
    """How to launch what was compiled: `start(x, y, z, stream, *between, *arguments)`, or with the arguments as one tuple.

    Triton's launcher is Python that finds scratch memory for kernels that need some and hands everything on to a function in C, in an order
    that changes between versions. It takes a third of a launch. So it is asked once, with a mark for the arguments, what it would hand on.
    """
    launcher, usual = compiled.run, (compiled.function, compiled.packed_metadata, None, None, None)
    if getattr(launcher, "global_scratch_size", None) == 0 and getattr(launcher, "profile_scratch_size", None) == 0:
        asked, mark, answers = copy.copy(launcher), object(), list[tuple[Any, ...]]()
        asked.launch = lambda *handed: answers.append(handed)
        asked(2, 3, 5, 7, *usual, mark)
        (handed,) = answers
        if handed[:4] == (2, 3, 5, 7) and (handed[-1] is mark or handed[-1] == (mark,)):
            return launcher.launch, handed[4:-1], handed[-1] is not mark
    return launcher, usual, False


def integer_kind(n: int) -> int:
    """What Triton specialises on in an integer argument: 1 is a constant of the code, of others it knows whether they are multiples of 16.

    Numbers, since `True == 1`: keys of 1 and of a multiple of 16 must differ.
    """
    return 1 if n == 1 else 16 if n % 16 == 0 else 0


def _kinds(kernel: Any, args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """What the code depends on in each argument, and the arguments with addresses for tensors, which Triton's launcher would ask each one for.

    Triton specialises on types, and on whether a pointer or an integer is a multiple of 16 or the integer is 1.
    """
    constants = _CONSTANTS.get(kernel.fn)
    if constants is None:
        constants = _CONSTANTS[kernel.fn] = tuple(parameter.is_constexpr for parameter in kernel.params)
    if len(args) != len(constants):
        raise TypeError(f"{kernel.fn.__name__}: expected {len(constants)} arguments, got {len(args)}")
    kinds: list[Any] = []
    plain = list(args)
    for i, constant in enumerate(constants):
        argument = args[i]
        if constant or argument is None:
            kinds.append(argument)
        elif isinstance(argument, Tensor):
            plain[i] = address = argument.data_ptr()
            kinds.append(argument.dtype if address % 16 == 0 else (argument.dtype,))
        elif isinstance(argument, int):
            kinds.append(integer_kind(argument) if argument <= _LARGEST_INT32 else (integer_kind(argument),))
        else:
            kinds.append(type(argument))
    return kinds, plain
