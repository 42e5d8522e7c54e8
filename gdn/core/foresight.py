"""What a host would launch, found out without launching, so that kernels can be compiled before they are needed and at the same time.

    results, launches = written(forward, *arguments)            # nothing runs
    with foreseeing(lambda: [launches, more]): ...              # the first compilation in here begins these too

The other side is `portable_launch`; this one needs no Triton.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import _pop_mode_temporarily

R = TypeVar("R")
logger = logging.getLogger("gdn.foresight")
Launches = Iterable[list[Any]]
"""Some, then others that take longer to be found."""


class _Thread(threading.local):
    launches: list[Any] | None = None
    """Where launches are written down instead of done."""
    more: Callable[[], Launches] | None = None
    """What else will have to be compiled as soon as anything has to."""


THREAD = _Thread()


def written(host: Callable[..., R], *args: Any) -> tuple[R, list[Any]]:
    """What `host` returns from arguments `without_data`, and its launches, which are not done. No mode of torch sees anything of it."""
    before, THREAD.launches = THREAD.launches, []
    try:
        with torch._C.DisableTorchFunction(), without_modes(), torch.no_grad(), torch._C._DisableAutocast():
            return host(*without_data(args)), THREAD.launches
    finally:
        THREAD.launches = before


@contextmanager
def without_modes() -> Iterator[None]:
    """Outside of all dispatch modes. Torch's own way imports its compiler, most of a second."""
    with ExitStack() as modes:
        while torch._C._len_torch_dispatch_stack():
            modes.enter_context(_pop_mode_temporarily())
        yield


@contextmanager
def foreseeing(more: Callable[[], Launches]) -> Iterator[None]:
    """The first launch in here whose kernel has to be compiled has all that `more` gives compiled too, at the same time."""
    before, THREAD.more = THREAD.more, more
    try:
        yield
    finally:
        THREAD.more = before


def taken() -> Launches:
    """What `more` gives, the first time it is wanted."""
    more, THREAD.more = THREAD.more, None
    return () if more is None else more()


def begin(launches: Launches, device: int) -> None:
    """Compile for these launches, without waiting for it. No call fails because they cannot be found out."""
    try:
        for some in launches:
            if some:
                from gdn.core.portable_launch import compile_ahead

                compile_ahead(some, device)
    except Exception:  # of any kind: what is wrong with a call is for the call to say, and this only saves it time
        logger.warning("kernels cannot be foreseen; each is compiled when it is launched", exc_info=True)


def without_data(value: Any) -> Any:
    """Tensors, also in tuples and lists, as tensors of the same geometry on the meta device."""
    if isinstance(value, (tuple, list)):
        return type(value)([without_data(each) for each in value])
    if isinstance(value, Tensor):
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device="meta")
    return value
