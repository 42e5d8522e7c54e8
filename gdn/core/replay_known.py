"""Which call is like one before: tables of what is known by the `signature` of arguments, and a quick look whether it is the same again.

    table = Table()
    results = table.replay(args, named)             # of a call like one of the last few of its size, else MISS
    found = signature(values)                       # what a call depends on, and its tensors
    table.keep(key, Known(run), emptied)
    table.hasten(known, args, named, emptied)       # from now on `replay` knows it

A signature takes 1.5 microseconds for each tensor, for many as long as all that follows it. The quick look asks torch, which compares them
in C with what they were, as torch.compile does before it runs what it has compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from gdn.core.replay_source import Body, Run, function

FIRST_DEVICE = 0
"""The CPU is device -1."""
MOST = 1024
"""Signatures in a table; it is emptied when full. One of a forward and its backward takes up to 50 KB."""
FEW = 4
"""Quick looks at a call, and those that one signature has."""
MISS = object()
"""In place of the results of a call that is not known."""

Conditions = frozenset[tuple[Callable[[], bool], bool]]
"""What has to be asked before each call, and the answer."""

Quick = Callable[[Sequence[Any], Any], Any]
"""Of arguments and named ones: what a call with them returns, or MISS."""

_VALUES = frozenset({int, float, bool, str, type(None), torch.dtype})
_TABLES: list[Table] = []
_LOCK = threading.RLock()
# Each look-up of a name in a module takes as long as one of these calls.
_modes, _transforms, _grad = torch._C._len_torch_dispatch_stack, torch._C._are_functorch_transforms_active, torch.is_grad_enabled


@dataclass(frozen=True)
class Known:
    """How to do a call again."""

    run: Run
    """With other tensors of the same signature."""
    body: Body | None = None
    """What `run` does, if that is launches alone."""
    conditions: Conditions = frozenset()
    """Of torch's settings, which no signature has (portable_product.py)."""
    looks: list[Quick | None] = field(default_factory=list)
    """What recognises such calls. Torch tells apart what is one signature: Tensor and Parameter, no_grad and inference mode, autocast."""


class Table(dict[tuple[Any, ...], Any]):
    """What is known by signature.

    Args:
        lasting: `forget` empties it; one that does not last goes with what holds it.
    """

    def __init__(self, *, lasting: bool = True) -> None:
        super().__init__()
        self.emptied = 0
        """How often `forget` has emptied it."""
        self._recent: dict[int | None, tuple[Quick, ...]] = {}
        """By the size of the first argument: most calls that are not alike differ in it, and a look that fails takes half a microsecond."""
        if lasting:
            _TABLES.append(self)

    def find(self, key: tuple[Any, ...]) -> Any:
        """What was kept, if it holds under torch's settings now."""
        known = self.get(key)
        return known if not known or all(ask() is answer for ask, answer in known.conditions) else None

    def keep(self, key: tuple[Any, ...], value: Any, emptied: int = 0) -> None:
        """Unless the table has been emptied since it had been so often: what another thread found out before does not hold any more."""
        with _LOCK:
            if emptied == self.emptied:
                if len(self) >= MOST:
                    self.clear()
                self[key] = value

    def clear(self) -> None:
        super().clear()
        self._recent = {}

    def replay(self, args: Sequence[Any], named: dict[str, Any] | None = None) -> Any:
        """What a call like one of the last few of its size returns; MISS for another."""
        if _modes() or _transforms() or forward_ad._current_level >= 0:
            return MISS
        first = args[0] if args else None
        for quick in self._recent.get(first.numel() if type(first) is Tensor else None, ()):
            results = quick(args, named)
            if results is not MISS:
                return results
        return MISS

    def hasten(self, known: Known, args: Sequence[Any], named: dict[str, Any] | None = None, emptied: int = 0) -> None:
        """Have `replay` look for calls like this one, which it has missed, unless the table has been emptied since (`keep`).

        The tensors must be distinct: torch recognises no others.
        """
        first = args[0] if args else None
        size = first.numel() if type(first) is Tensor else None
        recent = self._recent.get(size, ())
        found = [look for look in known.looks if look not in recent]
        if not found and len(known.looks) < FEW:
            found = [quick_look(known, args, named)]
            known.looks.extend(found)
        with _LOCK:
            if found and found[0] is not None and emptied == self.emptied:
                self._recent[size] = (found[0], *recent[: FEW - 1])


def forget() -> None:
    """Empty all tables."""
    with _LOCK:
        for table in _TABLES:
            table.emptied += 1
            table.clear()


def signature(values: Iterable[Any]) -> tuple[tuple[Any, ...], list[Tensor]] | None:
    """What a call with these arguments depends on apart from the contents of tensors, and the tensors; None if it must not be replayed.

    Objects take part whose type has a method `replay_parts` that lists their tensors and values.
    """
    if _modes() or _transforms() or forward_ad._current_level >= 0:
        return None
    key: list[Any] = [_grad()]
    tensors: list[Tensor] = []
    for value in values:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            device = value.get_device()
            if device < FIRST_DEVICE:
                return None
            tensors.append(value)
            strides = value.is_contiguous() or value.stride()  # of contiguous ones, which are alike in memory whatever they are
            key += (value.shape, strides, value.dtype, device, value.data_ptr() & 15, value.requires_grad)
        elif kind in _VALUES:
            key += (kind, value)  # True == 1 == 1.0, but kernels differ
        elif hasattr(kind, "replay_parts"):
            inside = signature(value.replay_parts())
            if inside is None:
                return None
            key += (kind, inside[0])
            tensors += inside[1]
        else:
            return None
    return tuple(key), tensors


def distinct(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor comes twice. Only then is it clear which one a kernel was given."""
    return len(set(map(id, tensors))) == len(tensors)


class _Look:
    """The text that takes the tensors out of arguments like these, and returns MISS for any others."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []
        self._names = 0

    def constant(self, value: Any) -> str:
        name = f"k{len(self.values)}"
        self.values[name] = value
        return name

    def miss(self, *conditions: str) -> None:
        self.lines.append(f"if {' or '.join(conditions)}: return MISS")

    def take(self, values: Sequence[Any], source: str, *, anything: bool = False) -> None:
        """As many values as these, each of its kind. Tensors are numbered in the order of a `signature`.

        Where there may be anything, torch must not be asked to compare a nested tensor, at which it ends the process.
        """
        names, conditions = list[str](), list[str]()
        before, self.lines = self.lines, []  # what is inside of objects can be taken when they have been
        for value in values:
            if isinstance(value, Tensor):
                names.append(name := f"x{len(self.tensors)}")
                self.tensors.append(value)
                if anything:
                    conditions.append(f"type({name}) is not {self.constant(type(value))} or {name}.is_nested")
                continue
            self._names += 1
            name, kind = f"v{self._names}", self.constant(type(value))
            names.append(name)
            if type(value) in _VALUES:
                known = self.constant(value)
                conditions.append(f"({name} is not {known} and (type({name}) is not {kind} or {name} != {known}))")
            else:
                conditions.append(f"type({name}) is not {kind}")
                self.lines.append(f"p{name} = {name}.replay_parts()")
                self.take(value.replay_parts(), f"p{name}")
        inside, self.lines = self.lines, before
        self.miss(f"len({source}) != {len(values)}")
        if names:
            self.lines.append(f"{', '.join(names)}, = {source}")
        if conditions:
            self.miss(*conditions)
        self.lines += inside


def quick_look(known: Known, args: Sequence[Any], named: dict[str, Any] | None) -> Quick | None:
    """For calls like this one; None where this torch cannot compare tensors in C."""
    look = _Look()
    if named:
        look.miss(f"tuple(named) != {look.constant(tuple(named))}")
    else:
        look.miss("named")
    look.take(args, "args", anything=named is not None)
    if named:
        look.lines.append("rest = named.values()")
        look.take(list(named.values()), "rest", anything=True)
    same = _same(look.tensors)
    if same is None:
        return None
    grad = f"grad() is not {look.constant(_grad())}"
    tensors = [f"x{i}" for i in range(len(look.tensors))]
    conditions = [f"{look.constant(ask)}() is not {answer}" for ask, answer in known.conditions]
    look.miss(grad, *conditions, f"not same({', '.join(tensors)})")
    look.lines += [f"a{i} = x{i}.data_ptr()" for i in range(len(tensors))]
    over = [x.data_ptr() & 15 for x in look.tensors]
    addresses = [f"a{i}" for i in range(len(tensors))]
    if any(over):
        look.miss(*[f"{a} & 15 != {look.constant(n)}" for a, n in zip(addresses, over, strict=True)])
    else:
        look.miss(f"({' | '.join(addresses)}) & 15")
    look.values |= {"MISS": MISS, "same": same, "grad": _grad}
    body = known.body or Body((f"return run([{', '.join(tensors)}])",), {"run": known.run})
    return function("args, named", look.lines, Body(body.lines, body.values | look.values))


def _same(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """Whether tensors have the types, dtypes, devices, shapes, strides and needs of gradients that these have, under modes as now.

    Torch keeps it to itself: None if it has none, or takes other arguments by now.
    """
    guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    shapes, strides = [list(x.shape) for x in tensors], [_strides(x) for x in tensors]
    try:
        return guards.TensorGuards(*tensors, dynamic_dims_sizes=shapes, dynamic_dims_strides=strides).check
    except (AttributeError, TypeError):
        return None


def _strides(x: Tensor) -> list[int | None]:
    """Those that its signature tells apart."""
    return [None if size == 1 and x.is_contiguous() else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
