"""Launching Triton kernels at little cost to the host.

Triton's own launch binds names, looks at each argument and walks its cache: some 20 microseconds for a dozen arguments. Here the choice of
the compiled kernel is one dictionary lookup with what the code depends on: data types, alignment, constants. A new choice goes through
Triton once, which compiles or reads its cache on disk, in a thread, beside all that is foreseen (foresight.py). Under `TRITON_INTERPRET=1`
the interpreter runs the kernel on the CPU.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from gdn.core import device as hardware
from gdn.core import portable_plan
from gdn.core.foresight import THREAD, begin, taken
from gdn.core.replay import recorder


class Launch(NamedTuple):
    """What the compiled code of a launch depends on."""

    kernel: Any
    args: tuple[Any, ...]
    warps: int
    stages: int
    registers: int | None
    key: Any

    def name(self, device: int) -> tuple[tuple[Any, ...], list[Any]]:
        """The key of the compiled code, and the arguments with addresses for tensors."""
        kinds, plain = _kinds(self.kernel, self.args) if self.key is None else ((self.key,), list(self.args))
        return (self.kernel.fn, device, self.warps, self.stages, self.registers, *kinds), plain


_COMPILED: dict[tuple[Any, ...], Any] = {}
_COMPILING: dict[tuple[Any, ...], Future[Any]] = {}
"""What is being compiled or has been."""
_LOCK = threading.Lock()
_CORES = threading.Semaphore(os.cpu_count() or 1)
"""Ten compilations at the same time on two cores take a third more of them than two after two, and the first is done last."""
_TENSOR_MEMORY = "DISABLE_MMA_V5"
_without_tensor_memory = 0
"""Threads that compile without it."""
_CONSTANT, _PLAIN, _SPECIAL = range(3)
_PARAMETERS: dict[Any, tuple[int, ...]] = {}
_LEAST_INT32, _LARGEST_INT32 = -(2**31), 2**31 - 1


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 1, registers: int | None = None, key: Any = None
) -> Any:
    """Run `kernel` on the current stream of the device of its tensors. Nothing happens for an empty grid.

    Returns what was compiled; None for an empty grid, from the interpreter, and where launches are only written down (foresight.py).

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
    what = Launch(kernel, args, warps, stages, registers, key)
    if THREAD.launches is not None:
        THREAD.launches.append(what)
        return None
    seen = recorder()
    if not isinstance(kernel, JITFunction):
        if seen is not None:
            seen.refused = True
        from gdn.core.portable_interpreted import like_a_gpu

        with like_a_gpu():
            kernel[grid](*args)
        return None
    device = args[0].get_device()
    if device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            compiled = _launch(what, grid, device)
    else:
        compiled = _launch(what, grid, device)
    if seen is not None:
        seen.launch(portable_plan.of_compiled(compiled), starter(compiled), grid, args)
    return compiled


def _launch(what: Launch, grid: tuple[int, ...], device: int) -> Any:
    name, plain = what.name(device)
    compiled = _COMPILED.get(name)
    if compiled is None:
        compiled = _COMPILED[name] = _wait(what, name, device)
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *plain)
    return compiled


def compile_ahead(launches: Iterable[Launch], device: int) -> dict[tuple[Any, ...], Future[Any]]:
    """Begin to compile what launches to come will need, as many at a time as there are cores: Triton lets other threads run meanwhile.

    Returns what has begun, which is not all where no thread can be started: those left are compiled by the threads that launch them.
    """
    named = {what.name(device)[0]: what for what in launches if isinstance(what.kernel, JITFunction)}
    with _LOCK:
        new = [name for name in named if name not in _COMPILING]
        if new:
            driver.active.get_current_device()  # builds a module in C when it is first asked, in each thread that asks
            threads = ThreadPoolExecutor(len(new) + 1, "gdn compiles")
            with suppress(RuntimeError):  # too many threads, or the main one has ended and others still run
                for name in new:
                    _COMPILING[name] = threads.submit(_compile, named[name], device)
                threads.submit(portable_plan.module)
            threads.shutdown(wait=False)
        return {name: _COMPILING[name] for name in named if name in _COMPILING}


def _wait(what: Launch, name: tuple[Any, ...], device: int) -> Any:
    """The compiled code, when it is ready."""
    begun = compile_ahead([what], device)
    begin(taken(), device)
    if name not in begun:
        return _compile(what, device)
    try:
        return begun[name].result()
    except BaseException:
        with _LOCK:
            _COMPILING.pop(name, None)  # the next launch tries again
        raise


def _compile(what: Launch, device: int) -> Any:
    """The code. It is not loaded yet: that might be in the middle of the capture of a graph."""
    with _CORES, torch.cuda.device(device), through_registers(device):  # a thread begins at the first device
        compiled = what.kernel.warmup(*what.args, grid=(1,), num_warps=what.warps, num_stages=what.stages, maxnreg=what.registers)
        driver.active.launcher_cls(compiled.src, compiled.metadata)  # Triton 3.6 has it compiled from C, and will find it on disk
    return compiled


@contextmanager
def through_registers(device: int) -> Iterator[None]:
    """In here Triton compiles products for `mma.sync` on a B200 and its like, as for all GPUs but Hopper's, unless the user's environment says.

    For tensor memory Triton 3.6 and 3.7 end in an error of their own at the delta rule's pair, gradient and output kernels, or plan more columns
    than there are (notes/triton_pipelines.md). Triton asks the environment, which threads share: the first that compiles says so, and the last takes it back.
    """
    global _without_tensor_memory
    with _LOCK:
        ours = hardware.capability(device) // 10 in (10, 11) and (_without_tensor_memory > 0 or _TENSOR_MEMORY not in os.environ)
        if ours:
            _without_tensor_memory += 1
            os.environ[_TENSOR_MEMORY] = "1"
    try:
        yield
    finally:
        if ours:
            with _LOCK:
                _without_tensor_memory -= 1
                if not _without_tensor_memory:
                    os.environ.pop(_TENSOR_MEMORY, None)


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
    """What Triton specialises on in an integer argument: 1 is a constant of the code, of others it knows whether they are multiples of 16, and
    those beyond int32 are int64 (2 and 18).

    Numbers, since `True == 1`: keys of 1 and of a multiple of 16 must differ.
    """
    return 1 if n == 1 else (16 if n % 16 == 0 else 0) + (0 if _LEAST_INT32 <= n <= _LARGEST_INT32 else 2)


def _kinds(kernel: Any, args: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    """What the code depends on in each argument, and the arguments with addresses for tensors, which Triton's launcher would ask each one for.

    Triton specialises on types, and on whether a pointer or an integer is a multiple of 16 or the integer is 1.
    """
    parameters = _PARAMETERS.get(kernel.fn)
    if parameters is None:
        parameters = _PARAMETERS[kernel.fn] = tuple(map(_parameter, kernel.params))
    if len(args) != len(parameters):
        raise TypeError(f"{kernel.fn.__name__}: expected {len(parameters)} arguments, got {len(args)}")
    kinds: list[Any] = []
    plain = list(args)
    for i, parameter in enumerate(parameters):
        argument = args[i]
        if parameter == _CONSTANT or argument is None:
            kinds.append(argument)
        elif isinstance(argument, Tensor):
            plain[i] = address = argument.data_ptr()
            kinds.append(argument.dtype if address % 16 == 0 else (argument.dtype,))
        elif isinstance(argument, int):
            kind = integer_kind(argument) if parameter == _SPECIAL else 0
            kinds.append(kind if _LEAST_INT32 <= argument <= _LARGEST_INT32 else (kind,))
        else:
            kinds.append(type(argument))
    return kinds, plain


def _parameter(parameter: Any) -> int:
    return _CONSTANT if parameter.is_constexpr else _PLAIN if parameter.do_not_specialize else _SPECIAL
