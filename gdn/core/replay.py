"""Calls written down once and replayed: a call like one before costs the host what it allocates and launches, and little more.

    @replayed                                           # an operator: checks its arguments, chooses a row, runs it
    def l2norm(x, *, eps=1e-6): ...

Nearly all that the host does in a call of Triton kernels follows from the `signature` of the arguments: shapes, strides, dtypes, device and
alignment of the tensors, whether they need gradients, and all other values. So two things are kept by signature. A `Recording` is what the
host of some kernels did: allocations, launches and torch operators, with blanks for the tensors. An outline is which of an operator's
tensors went into which calls of `Opaque` and `InPlace` (opaque.py); where these do nothing but launch, it is one recording of all. A replay
allocates anew and takes the current stream: no address and no tensor outlives its call, and a CUDA graph may capture it.

What cannot be replayed runs as if this file were not there: calls on the CPU, under torch.compile, functorch or a dispatch mode, those of
tensor subclasses, and those in which anything else happened to tensors, such as reading a value. A host promises (`replay=True` there) that
it launches by `portable_launch.launch` alone and decides by nothing but its arguments' signature and what it has `asked`. Launches and
products that follow each other are handed to the driver at once (portable_plan.py, portable_product.py), and buffers between them are parts
of few allocations, as far as that takes 32 MiB at most or no more memory than buffers that are allocated where they are first needed and
freed after their last use, whatever the host did. A call that raises leaves nothing behind. `forget` drops all, as `use` and `Op.register`
do.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from gdn.core.foresight import without_modes
from gdn.core.portable_plan import Kernel, Nodes, plan
from gdn.core.portable_product import Multiply, multiplied, nodes, ordinary, untouched, workspace_as_now
from gdn.core.replay_known import MISS, Conditions, Known, Table, distinct, signature
from gdn.core.replay_source import Body, Source, replaying

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=Sequence[Tensor | None])
Tensors = Sequence[Tensor]

_ALLOCATIONS = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.empty_strided, torch.ops.aten.new_empty}
_TAGS = ("data_dependent_output", "dynamic_output_shape", "inplace_view", "nondeterministic_seeded")
_MATRIX_PRODUCT = torch.ops.aten.mm.default
_PRODUCT_INTO, _PRODUCT_ADDED = torch.ops.aten.mm.dtype_out, torch.ops.aten.addmm.dtype_out
_PRODUCTS = {_MATRIX_PRODUCT, _PRODUCT_INTO, _PRODUCT_ADDED}
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""The last thing that `matmul` does: a view that torch calls none, so that it may be written to."""
_SMALL, _SPARE, _ALIGNMENT = 1 << 20, 1 << 25, 256
"""Bytes."""
_UNFORESEEABLE = {getattr(torch.Tag, name) for name in _TAGS}


def record(host: Callable[[], S], tensors: Tensors) -> tuple[S, Recording | None]:
    """What `host` returns from distinct tensors, and how to do the same with others; None where that is impossible."""
    with Recorder(tensors) as recorder:
        results = host()
    return results, recorder.finish(results)


def recorder() -> Recorder | None:
    """The one that sees what happens now."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Recorder) else None


def asked(ask: Callable[[], bool]) -> bool:
    """The answer to a question on which the call depends and that no signature has, such as a setting of torch. What is written down now is
    replayed while the answer is the same."""
    answer = ask()
    mode = None if is_compiling() else _get_current_dispatch_mode()
    if isinstance(mode, Recorder | Witness):
        mode.conditions[ask] = answer
    return answer


def may_multiply() -> bool:
    """Whether a host may multiply matrices by a kernel of its own: if no user has one in place of torch's."""
    return asked(untouched)


Address = tuple[int, int]
"""A tensor, and bytes after its beginning."""


@dataclass(frozen=True)
class _Launch:
    driven: Kernel | None
    """As the driver knows it."""
    start: Callable[..., None]
    grid: tuple[int, ...]
    between: tuple[Any, ...]
    packed: bool
    """Whether it takes its arguments as one tuple."""
    arguments: list[Address | list[Any]]
    """An address, or a list of one constant."""

    def tensors(self) -> list[int]:
        return [a[0] for a in self.arguments if isinstance(a, tuple)]

    def write(self, source: Source) -> None:
        """Through Triton."""
        arguments = [source.address(*a) if isinstance(a, tuple) else source.constant(a[0]) for a in self.arguments]
        source.launch(self.start, self.grid, self.between, arguments, self.packed)


@dataclass(frozen=True)
class _Operator:
    function: Callable[..., Any]
    arguments: list[Any]
    named: dict[str, Any]
    places: list[tuple[int | str, int]]
    """Which argument, by its place or its name, is which tensor."""
    makes: int | None
    """A new tensor; or it writes into an argument."""

    def tensors(self) -> list[int]:
        return [i for _, i in self.places] + ([] if self.makes is None else [self.makes])

    def write(self, source: Source) -> None:
        places = dict(self.places)
        given = [(n, f"x{places[n]}" if n in places else source.constant(a)) for n, a in (*enumerate(self.arguments), *self.named.items())]
        arguments, named = [a for n, a in given if isinstance(n, int)], {n: a for n, a in given if isinstance(n, str)}
        source.operator(self.makes, getattr(self.function, "_op", self.function), arguments, named)  # an overload calls this


class _Fresh(NamedTuple):
    """A tensor that is allocated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    bytes: int


@dataclass(frozen=True)
class _Product:
    multiply: Multiply
    driven: Nodes | None
    """As the driver knows it."""
    arguments: list[Address]
    """Both factors, the product, and the workspace that nodes may need."""
    grid: tuple[()] = ()

    def tensors(self) -> list[int]:
        return [i for i, _ in self.arguments]

    def write(self, source: Source) -> None:
        """Through cuBLAS."""
        source.product(self.multiply, [source.address(*a) for a in self.arguments[:3]])


Step = _Launch | _Product | _Operator
Groups = Sequence[Sequence[Step]]


@dataclass(frozen=True)
class Recording:
    """What a host did with tensors. They are numbered, those that it was given first."""

    device: torch.device
    given: int
    count: int
    fresh: dict[int, _Fresh]
    steps: Sequence[Step]
    results: int | Sequence[int | None]
    conditions: Conditions = frozenset()

    @property
    def launches_only(self) -> bool:
        """Products too: nothing that torch has to do."""
        return not any(isinstance(step, _Operator) for step in self.steps)

    def body(self) -> Body:
        """It, done again."""
        layout, results = self._layout(), self._ends()
        source = Source(self.device, self.given)
        for i, (whole, offset) in layout.parts.items():
            source.part(i, whole, offset)
        if layout.size is not None:
            source.allocate(self.count, (layout.size,), (1,), torch.uint8)
        for n, group in enumerate(layout.groups):
            for i, x in self.fresh.items():
                if layout.first.get(i) == n and i not in layout.parts:
                    source.allocate(i, x.shape, x.strides, x.dtype)
            _write(group, source)
            ended = [i for i, end in layout.last.items() if end == n and i >= self.given]
            source.free([i for i in ended if i not in results and i not in layout.parts])
        for i in results - layout.first.keys():  # what no step touches, as it has no elements
            if i in self.fresh:
                x = self.fresh[i]
                source.allocate(i, x.shape, x.strides, x.dtype)
        return source.finish(self.results)

    def _ends(self) -> set[int]:
        return {self.results} if isinstance(self.results, int) else {i for i in self.results if i is not None}

    def _layout(self) -> _Layout:
        """Launches that follow each other done at once, unless that takes much more memory."""
        together: list[list[Step]] = []
        for step in self.steps:
            if together and _is_driven(step) and _is_driven(together[-1][-1]):
                together[-1].append(step)
            else:
                together.append([step])
        alone = _Layout.of([[step] for step in self.steps], *self._side_by_side())
        if len(together) == len(alone.groups) > 1:
            return alone
        found = _Layout.of(together, *self._interleaved())
        return found if self._peak(found) <= max(self._peak(alone), _SPARE) else alone

    def _peak(self, layout: _Layout) -> int:
        """The most memory of fresh tensors at any time."""
        first, last = layout.first, layout.last | {i: len(layout.groups) for i in self._ends()}
        living = [(_aligned(x.bytes), first[i], last[i]) for i, x in self.fresh.items() if i in first and i not in layout.parts]
        peaks = [sum(size for size, begin, end in living if begin <= n <= end) for n in range(len(layout.groups))]
        return (layout.size or 0) + max(peaks, default=0)

    def _inner(self) -> dict[int, int]:
        """Tensors that only kernels see, and their bytes."""
        seen = self._ends().union(*(step.tensors() for step in self.steps if isinstance(step, _Operator)))
        used = {i for step in self.steps for i in step.tensors()}
        return {i: _aligned(x.bytes) for i, x in self.fresh.items() if i in used and i not in seen}

    def _side_by_side(self) -> tuple[dict[int, Address], int | None]:
        """An allocation takes half as long as a launch: small tensors that only kernels see are parts of one, which has so many bytes."""
        small = {i: size for i, size in self._inner().items() if self.fresh[i].bytes <= _SMALL}
        *offsets, end = itertools.accumulate(small.values(), initial=0)
        return ({i: (self.count, n) for i, n in zip(small, offsets, strict=True)}, end) if len(small) > 1 else ({}, None)

    def _interleaved(self) -> tuple[dict[int, Address], int | None]:
        """Each tensor that only kernels see is part of another one: of a result that is not written yet, or of one more, which has so many
        bytes, at a place that nobody needs at that time."""
        first, last = _lives([[step] for step in self.steps])
        results = [i for i in self._ends() if i in self.fresh and i in first]
        sizes, parts, end = self._inner(), dict[int, Address](), None
        for i in sorted(sizes, key=sizes.__getitem__, reverse=True):
            for whole in [*(r for r in results if last[i] < first[r]), self.count]:
                there = [
                    (begin, sizes[n])
                    for n, (where, begin) in parts.items()
                    if where == whole and first[i] <= last[n] and first[n] <= last[i]
                ]
                offset = _gap(there, sizes[i])
                if whole == self.count or offset + sizes[i] <= self.fresh[whole].bytes:
                    break
            parts[i] = whole, offset
            if whole == self.count:
                end = max(end or 0, offset + sizes[i])
        return parts, end

    def known(self) -> Known:
        body = self.body()
        return Known(replaying(body, self.given), body if self.launches_only else None, self.conditions)


def _is_driven(step: Step) -> bool:
    """Whether it can be handed to the driver with others."""
    return not isinstance(step, _Operator) and step.driven is not None


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    """The first place for so many bytes beside others, each with its place and size."""
    place = 0
    for begin, length in sorted(taken):
        if begin < place + size:
            place = max(place, begin + length)
    return place


class _Layout(NamedTuple):
    """What is done at once, and where tensors are."""

    groups: Groups
    parts: dict[int, Address]
    """Tensors inside of others."""
    size: int | None
    """Bytes of one more, if it is needed."""
    first: dict[int, int]
    last: dict[int, int]
    """Groups that need each tensor or a part of it."""

    @classmethod
    def of(cls, groups: Groups, parts: dict[int, Address], size: int | None) -> _Layout:
        first, last = _lives(groups)
        for i, (whole, _) in parts.items():
            if whole in first:
                first[whole] = min(first[whole], first[i])
        return cls(groups, parts, size, first, last)


def _lives(groups: Groups) -> tuple[dict[int, int], dict[int, int]]:
    """The first group and the last one that use each tensor."""
    uses = [(i, n) for n, group in enumerate(groups) for step in group for i in step.tensors()]
    return dict(reversed(uses)), dict(uses)


def _write(group: Sequence[Step], source: Source) -> None:
    """What the driver can be told of in one call, or else each step by itself."""
    names: dict[str, int] = {}
    launches: list[Any] = [
        (step.driven, step.grid, [_place(source, a, names) if isinstance(a, tuple) else a for a in step.arguments])
        for step in group
        if not isinstance(step, _Operator) and step.driven is not None
    ]
    start = plan(launches, len(names)) if len(launches) == len(group) else None
    if start is not None:
        source.plan(start, list(names))
        return
    for step in group:
        step.write(source)


def _place(source: Source, address: Address, names: dict[str, int]) -> Address:
    """Which of the names of addresses, and bytes after it."""
    name, after = source.place(*address)
    return names.setdefault(name, len(names)), after


class _Mode(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Else the first use imports torch's compiler, a second, to keep it out of here, where it never comes."""
        return False


class Recorder(_Mode):
    """Sees what a host does with the tensors that it is given and with those that it makes."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.refused = False
        self.conditions: dict[Callable[[], bool], bool] = {}
        self._device = tensors[0].device
        self._held: list[Tensor] = []
        self._names: dict[int, int] = {}
        self._memory: dict[int, int | None] = {}
        self._fresh: list[int] = []
        self._workspaces: dict[int, _Fresh] = {}
        """Of products."""
        self._parts: set[int | None] = set()
        """Views of what was given."""
        self._steps: list[Step] = []
        for x in tensors:
            self._hold(x)
        self._given = len(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func in _PRODUCTS:
            product = _multiplication(func, args, named)
            if product is not None or not ordinary():
                self.conditions[ordinary] = product is not None
            if product is not None:
                return self._product(*product)
        out = func(*args, **named)
        if func.is_view and (not isinstance(out, Tensor) or out.untyped_storage()._cdata in self._memory):
            return out  # `_base` finds it by its memory if it is used
        if not isinstance(out, Tensor) or out.device != self._device or _UNFORESEEABLE.intersection(func.tags):
            self.refused = True
        elif func.overloadpacket in _ALLOCATIONS:
            self._fresh.append(self._hold(out))
        elif func is _UNSAFE_VIEW:
            if not self._reshaped(args[0], out):
                self._steps.append(_Operator(func, [None, *args[1:]], named, [(0, self._place(args[0]))], self._make(out)))
        else:
            self._operator(func, args, named, out)
        return out

    def launch(self, kernel: Kernel | None, starter: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """By `portable_launch.launch`: a kernel was launched. The starter is how to launch it again through Triton."""
        start, between, packed = starter
        arguments = [self._address(a) if isinstance(a, Tensor) else [a] for a in args]
        self._steps.append(_Launch(kernel, start, (*grid, 1, 1)[:3], between, packed, arguments))

    def finish(self, results: Sequence[Tensor | None]) -> Recording | None:
        places = [None if x is None else self._place(x) for x in results]
        if self.refused or not self._parts.isdisjoint(places):
            return None
        fresh = {i: _fresh(self._held[i]) for i in self._fresh} | self._workspaces
        return Recording(self._device, self._given, len(self._held), fresh, self._steps, places, frozenset(self.conditions.items()))

    def _hold(self, x: Tensor) -> int:
        """One more tensor, and it is known by itself and by its memory, if that is its alone."""
        i = len(self._held)
        self._held.append(x)
        self._names[id(x)] = i
        memory = x.untyped_storage()._cdata
        self._memory[memory] = i if memory not in self._memory else None
        return i

    def _operator(self, func: Any, args: Sequence[Any], named: dict[str, Any], out: Tensor) -> None:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *named.items()]
        tensors = [(n, self._place(a)) for n, a in given if isinstance(a, Tensor)]
        if len(tensors) != sum(isinstance(leaf, Tensor) for leaf in tree_leaves((args, named))):
            self.refused = True  # tensors in lists
        makes = None
        if id(out) not in self._names and not any(out is a for _, a in given):
            makes = self._hold(out)
        without = {n: None if isinstance(a, Tensor) else a for n, a in named.items()}
        self._steps.append(_Operator(func, [None if isinstance(a, Tensor) else a for a in args], without, tensors, makes))

    def _product(self, left: Tensor, right: Tensor, into: Tensor | None, out: Tensor, multiply: Multiply) -> Tensor:
        self.refused |= out.device != self._device
        arguments = [self._address(x) for x in (left, right)]
        if into is None:
            self._fresh.append(self._hold(out))
        arguments.append(self._address(out))
        driven = nodes(multiply, left, right, out)
        if driven is not None:
            self.conditions |= workspace_as_now()
        if driven is not None and driven.workspace:
            i = self._hold(torch.empty(0, dtype=torch.uint8, device=out.device))  # nobody needs it now
            self._workspaces[i] = _Fresh((driven.workspace,), (1,), torch.uint8, driven.workspace)
            arguments.append((i, 0))
        self._steps.append(_Product(multiply, driven, arguments))
        return out

    def _reshaped(self, x: Tensor, out: Tensor) -> bool:
        """Whether x can be allocated in another shape: to kernels and products it is an address."""
        i = self._names.get(id(x), -1)
        if i not in self._fresh or any(i in step.tensors() for step in self._steps if isinstance(step, _Operator)):
            return False
        self._held[i] = out
        self._names[id(out)] = i
        del self._names[id(x)]
        return True

    def _base(self, x: Tensor) -> int:
        """The only tensor that has the memory of x."""
        base = self._memory.get(x.untyped_storage()._cdata)
        if base is None:
            self.refused = True
        return base or 0

    def _address(self, x: Tensor) -> Address:
        known = self._names.get(id(x))
        if known is not None:
            return known, 0
        base = self._base(x)  # also of what an operator makes, which lies in memory as its arguments' signature says
        return base, _bytes_before(x) - _bytes_before(self._held[base])

    def _place(self, x: Tensor) -> int:
        """Which tensor x is. A view is one more."""
        known = self._names.get(id(x))
        if known is not None:
            return known
        base = self._base(x)
        held = self._held[base]
        if x.dtype != held.dtype:
            self.refused = True
        geometry = x.size(), x.stride(), x.storage_offset() - held.storage_offset()
        if geometry == (held.size(), held.stride(), 0) and base >= self._given:
            return base
        i = self._make(x)
        if base < self._given:
            self._parts.add(i)
        self._steps.append(_Operator(_part, [None, *geometry], {}, [(0, base)], i))
        return i

    def _make(self, x: Tensor) -> int:
        """One more tensor in memory of another."""
        i = len(self._held)
        self._held.append(x)
        self._names[id(x)] = i
        return i


def _multiplication(func: Any, args: Sequence[Any], named: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Multiply] | None:
    """Of an operator that multiplies matrices: both factors, into what, the product and its repetition. None where that is for torch."""
    into, added = named.get("out"), func is _PRODUCT_ADDED
    if into is not None and into.dtype != args[-1]:
        return None
    if added and (args[0] is not into or len(named) > 1):  # to something else, or with factors
        return None
    left, right = args[1:3] if added else args[:2]
    made = multiplied(left, right, into, added=added)
    return None if made is None else (left, right, into, *made)


def _part(x: Tensor, size: Sequence[int], strides: Sequence[int], after: int) -> Tensor:
    """A view that begins so many numbers after x."""
    return x.as_strided(size, strides, x.storage_offset() + after)


def _bytes_before(x: Tensor) -> int:
    """In its memory. From `data_ptr` it would be wrong for a tensor without elements, which is at 0."""
    return int(x.storage_offset()) * x.element_size()


def _fresh(x: Tensor) -> _Fresh:
    return _Fresh(tuple(x.shape), x.stride(), x.dtype, x.untyped_storage().nbytes())


Results = tuple[Tensor, ...]


class Call(Protocol):
    """One of an operator that can be done again."""

    @property
    def conditions(self) -> Conditions:
        """Under which it is done in this way."""
        ...

    def first(self, tensors: Tensors) -> Results: ...

    def again(self) -> Callable[[Tensors], Results]:
        """How to do it with other tensors of the same signature, after the first time."""
        ...

    def launches(self) -> Recording | None:
        """What it does, if that is launches alone."""
        ...


class _Reshaped(NamedTuple):
    """What stands between calls: a tensor without gaps in another shape."""

    shape: tuple[int, ...]
    conditions: Conditions = frozenset()

    def again(self) -> Callable[[Tensors], Results]:
        return lambda tensors: (tensors[0].view(self.shape),)


Calls = list[tuple[Call | _Reshaped, list[int]]]
"""Each with its tensors; the results of each are numbered after all tensors before."""


def _outline(calls: Calls, given: int, results: int | list[int]) -> Known:
    """What an operator did with its tensors."""
    recording = _joined(calls, given, results)
    if recording is not None:
        return recording.known()
    steps = [(call.again(), places) for call, places in calls]
    conditions = Conditions().union(*(call.conditions for call, _ in calls))
    if len(steps) == 1 and steps[0][1] == list(range(given)) and isinstance(results, int) and results >= given:
        return Known(_one_result(steps[0][0], results - given), conditions=conditions)

    def run(tensors: Tensors) -> Any:
        held = list(tensors)
        for again, places in steps:
            held += again([held[i] for i in places])
        return held[results] if isinstance(results, int) else tuple([held[i] for i in results])

    return Known(run, conditions=conditions)


def _one_result(again: Callable[[Tensors], Results], result: int) -> Callable[[Tensors], Tensor]:
    """Of the only call, which takes the tensors as they are."""
    return lambda tensors: again(tensors)[result]


def _joined(calls: Calls, given: int, results: int | list[int]) -> Recording | None:
    """All calls as one, if they launch and do nothing else."""
    held = list(range(given))
    fresh: dict[int, _Fresh] = {}
    steps: list[Step] = []
    recordings: list[Recording] = []
    reshaped: set[int] = set()
    for call, places in calls:
        if isinstance(call, _Reshaped):
            reshaped.add(len(held))
            held.append(held[places[0]])  # to kernels it is the same address
            continue
        recording = call.launches()
        if recording is None:
            return None
        recordings.append(recording)
        number = {i: held[place] for i, place in enumerate(places)}
        for i, x in recording.fresh.items():
            number[i] = given + len(fresh)
            fresh[given + len(fresh)] = x
        for step in recording.steps:
            assert not isinstance(step, _Operator)
            arguments: list[Any] = [(number[a[0]], a[1]) if isinstance(a, tuple) else a for a in step.arguments]
            steps.append(replace(step, arguments=arguments))
        assert not isinstance(recording.results, int)
        held += [number[i] for i in recording.results if i is not None]  # a forward returns tensors alone
    if not reshaped.isdisjoint([results] if isinstance(results, int) else results):
        return None
    ends = held[results] if isinstance(results, int) else [held[i] for i in results]
    return Recording(
        recordings[0].device, given, given + len(fresh), fresh, steps, ends, Conditions().union(*(r.conditions for r in recordings))
    )


class Witness(_Mode):
    """Sees which calls an operator makes, and whether it does anything else to tensors."""

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        self.conditions: dict[Callable[[], bool], bool] = {}
        self._refused = False
        self._held: list[Tensor] = []
        self._names: dict[int, int] = {}
        self._memory: dict[int, int | None] = {}
        self._calls: Calls = []
        self._gradients = torch.is_grad_enabled()
        self._given = len(tensors)
        self._hold(tensors)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._refused |= not func.is_view  # what a view is used for `_place` finds by its memory
        return func(*args, **(kwargs or {}))

    def call(self, find: Callable[[tuple[Any, ...]], tuple[Call, Tensors]], args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """By a call that can be replayed, which `find` gives with its tensors."""
        with without_modes():
            call, tensors = find(args)
            results = call.first(tensors)
        places = [self._place(x) for x in tensors]
        self._calls.append((call, places))
        self._hold(results)
        return results

    def finish(self, results: Any) -> Known | None:
        ends = self._place(results) if isinstance(results, Tensor) else [self._place(x) for x in results]
        calls = any(not isinstance(call, _Reshaped) for call, _ in self._calls)
        if self._refused or not calls:
            return None
        known = _outline(self._calls, self._given, ends)
        return replace(known, conditions=known.conditions.union(self.conditions.items()))

    def _hold(self, tensors: Tensors) -> None:
        for x in tensors:
            self._names[id(x)] = i = len(self._held)
            self._held.append(x)
            memory = x.untyped_storage()._cdata
            self._memory[memory] = i if memory not in self._memory else None

    def _place(self, x: Tensor) -> int:
        known = self._names.get(id(x))
        if known is not None:
            return known
        base = self._memory.get(x.untyped_storage()._cdata)
        held = None if base is None else self._held[base]
        # A view made without gradients says that it requires one, and has nobody to hand it on to.
        detached = held is not None and self._gradients and held.requires_grad != (x.grad_fn is not None)
        if base is None or held is None or detached or not _is_reshaped(x, held):
            self._refused = True
            return 0
        self._names[id(x)] = i = len(self._held)
        self._held.append(x)
        self._calls.append((_Reshaped(tuple(x.shape)), [base]))
        return i


def _is_reshaped(x: Tensor, held: Tensor) -> bool:
    """Whether x is all of what is held, without gaps."""
    alike = (x.dtype, x.numel(), x.storage_offset()) == (held.dtype, held.numel(), held.storage_offset())
    return alike and x.is_contiguous() and held.is_contiguous()


def witness() -> Witness | None:
    """The one that sees what happens now."""
    mode = _get_current_dispatch_mode()
    return mode if isinstance(mode, Witness) else None


def replayed(function: Callable[P, R]) -> Callable[P, R]:
    """Replay the calls of an operator: a function of tensors that returns a tensor or a tuple of them. See the module's docstring."""
    outlines = Table()

    def call(*args: Any, **named: Any) -> Any:
        if is_compiling():
            return function(*args, **named)
        results = outlines.replay(args, named)
        if results is not MISS:
            return results
        found = signature((len(args), *args, *named, *named.values()))
        if found is None:
            return written(*args, **named)
        key, tensors = found
        emptied = outlines.emptied
        outline = outlines.find(key)
        if outline is not None:
            if outline is False:
                return written(*args, **named)
            if distinct(tensors):
                outlines.hasten(outline, args, named, emptied)
            return outline.run(tensors)
        if not distinct(tensors):
            return written(*args, **named)
        with Witness(tensors) as seen:
            results = written(*args, **named)
        outlines.keep(key, seen.finish(results) or False, emptied)
        return results

    def written(*args: Any, **named: Any) -> Any:
        return vars(call)["__wrapped__"](*args, **named)

    # torch.compile knows what it has compiled by the code object: each operator has one of its own.
    call.__code__ = call.__code__.replace(co_name=function.__name__)
    return cast("Callable[P, R]", functools.update_wrapper(call, function))
