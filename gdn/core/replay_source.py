"""Straight-line Python for a replay: what a loop over steps would look up in lists is a name. Half of the time of such a loop.

    source = Source(torch.device("cuda", 0), given=1)
    source.allocate(1, (4, 5), (5, 1), torch.float32)
    source.launch(start, (8, 1, 1), between, [source.address(0), source.constant(2.5), source.address(1)], packed=False)
    body = source.finish([1, None])
    run = replaying(body, given=1)                  # run([x]) -> (a new tensor, None)

Numbers of the calls are not in the text but in the globals of the function, so one text, compiled once, serves all shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[Sequence[Tensor]], Any]
INDENT = "\n    "


class Body(NamedTuple):
    """Lines of a function that knows tensors by number, as `x0`, and addresses of those given, as `a0`; and the values of other names."""

    lines: tuple[str, ...]
    values: dict[str, Any]


class Source:
    """The text of one body, a line for each step. Tensors are numbered, those given first.

    Args:
        device: that on which everything happens.
        given: tensors whose addresses are known when the body begins: those below this number.
    """

    def __init__(self, device: torch.device, given: int = 0) -> None:
        self._values: dict[str, Any] = {
            "C": torch._C,
            "on": torch.cuda.device,
            "device": -1 if device.index is None else device.index,
            "empty": _allocator(device),
        }
        self._lines: list[str] = []
        self._given = given
        self._addresses: set[int] = set()
        self._parts: dict[int, tuple[int, int]] = {}
        self._streams = False

    def constant(self, value: Any) -> str:
        name = f"c{len(self._values)}"
        self._values[name] = value
        return name

    def address(self, tensor: int, offset: int = 0) -> str:
        """Of a tensor, or so many bytes after it."""
        name, after = self.place(tensor, offset)
        return f"{name} + {self.constant(after)}" if after else name

    def place(self, tensor: int, offset: int = 0) -> tuple[str, int]:
        """The address of the memory that has a tensor, or so many bytes after it, and how many bytes after that address it is."""
        whole, before = self._parts.get(tensor, (tensor, 0))
        if whole >= self._given and whole not in self._addresses:
            self._addresses.add(whole)
            self._lines.append(f"a{whole} = x{whole}.data_ptr()")
        return f"a{whole}", before + offset

    def allocate(self, tensor: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> None:
        self._lines.append(f"x{tensor} = empty({', '.join(map(self.constant, (shape, strides, dtype)))})")

    def part(self, tensor: int, whole: int, offset: int) -> None:
        """A tensor that is nothing but an address: so many bytes after the beginning of another."""
        self._parts[tensor] = whole, offset

    def launch(
        self, start: Callable[..., None], grid: Sequence[int], between: Sequence[Any], arguments: Sequence[str], packed: bool
    ) -> None:
        """`start(*grid, stream, *between, *arguments)`, or with the arguments as one tuple."""
        self._stream()
        handed = f"({''.join(f'{a}, ' for a in arguments)})" if packed else ", ".join(arguments)
        before = ", ".join([*map(self.constant, grid), "stream", *map(self.constant, between)])
        self._lines.append(f"{self.constant(start)}({before}, {handed})")

    def plan(self, start: Callable[..., None], addresses: Sequence[str]) -> None:
        """`start(stream, *addresses)`, which launches several kernels."""
        self._stream()
        self._lines.append(f"{self.constant(start)}({', '.join(['stream', *addresses])})")

    def product(self, multiply: Callable[..., None], addresses: Sequence[str]) -> None:
        """`multiply(*addresses)` of both factors and the product (portable_product.py)."""
        self._lines.append(f"{self.constant(multiply)}({', '.join(addresses)})")

    def _stream(self) -> None:
        if not self._streams:
            self._streams = True
            self._lines.append("stream = C._cuda_getCurrentRawStream(device)")

    def operator(self, makes: int | None, function: Callable[..., Any], arguments: Sequence[str], named: Mapping[str, str]) -> None:
        """A call of torch, which makes a tensor or none. Arguments are names: of tensors by their numbers, and of constants."""
        given = [*arguments, *[f"{name}={value}" for name, value in named.items()]]
        self._lines.append(f"{'' if makes is None else f'x{makes} = '}{self.constant(function)}({', '.join(given)})")

    def free(self, tensors: Sequence[int]) -> None:
        """Let go of tensors that no later step uses: what is allocated next can have their memory, in the order of the stream."""
        if tensors:
            self._lines.append(f"del {', '.join(f'x{i}' for i in tensors)}")

    def finish(self, results: int | Sequence[int | None]) -> Body:
        """The body, which returns this tensor, or these."""
        names = f"x{results}" if isinstance(results, int) else f"({''.join('None, ' if i is None else f'x{i}, ' for i in results)})"
        return Body((*self._lines, f"return {names}"), self._values)


def replaying(body: Body, given: int) -> Run:
    """The function of a list of so many tensors."""
    tensors = [f"{''.join(f'x{i}, ' for i in range(given))}= tensors"]
    return function("tensors", [*tensors, *[f"a{i} = x{i}.data_ptr()" for i in range(given)]], body)


def function(parameters: str, head: Sequence[str], body: Body) -> Any:
    """The function that begins with these lines and goes on with the body on its device."""
    device = [f"if C._cuda_getDevice() != device:{INDENT}    with on(device):{INDENT}        return again({parameters})"]
    values = dict(body.values)
    exec(
        _compiled(f"def again({parameters}):{INDENT}{INDENT.join([*head, *(device if 'device' in values else []), *body.lines])}\n"), values
    )
    return values["again"]


def _allocator(device: torch.device) -> Callable[..., Tensor]:
    """Of shape, strides and dtype, on the current device. What compiled graphs call takes half as long as `empty_strided`."""
    guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    return getattr(guards, f"_empty_strided_{device.type}", None) or functools.partial(_empty, device)


def _empty(device: torch.device, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


@functools.lru_cache(maxsize=1024)
def _compiled(text: str) -> CodeType:
    return compile(text, "<replay>", "exec")
