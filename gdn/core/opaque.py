"""A hand-written forward and backward, as autograd in eager mode and as one registered operator under torch.compile.

    def forward(x: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor]: ...      # results, then what backward wants saved
    def backward(args, saved, grads): ...                                               # one gradient (or None) per differentiable name
    def fake(x, scale, keep): ...                                                       # empty tensors shaped like forward's

    scaled = Opaque("gdn::scaled", forward, backward, fake=fake, results=1, differentiable=("x",))
    y, = scaled(x, 2.0)

In eager mode a call costs one `torch.autograd.Function`; without gradients it costs nothing. Under the compiler the same functions are
`gdn::scaled` and `gdn::scaled_backward`, so that the graph never breaks. `InPlace` is the counterpart for kernels that write into their
arguments. Both run with autocast off: a hand-written kernel chooses its own precision, and a matrix product that says float32 means it.
With `replay=True` an eager call or its backward that is like one before is replayed (replay.py), and the Triton kernels of both are
compiled at the same time (foresight.py), from the first launch on, or under the compiler while it still traces.
"""

from __future__ import annotations

import functools
import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gdn.core import replay_known
from gdn.core.foresight import Launches, begin, foreseeing, written
from gdn.core.portable_product import ordinary, untouched
from gdn.core.replay import Recording, record, witness
from gdn.core.replay_known import MISS, Conditions, Known, Table, distinct, signature

Arguments = tuple[Any, ...]
Tensors = tuple[Tensor, ...]


class _Kernels(ABC):
    """What calls in eager mode have in common, with a gradient or without."""

    name: str
    results: int

    def __init__(self, replay: bool) -> None:
        self._replay = replay
        self._calls = Table()

    @abstractmethod
    def keeps(self, args: Arguments) -> bool:
        """Whether a backward will follow."""

    @abstractmethod
    def run(self, args: Arguments, keep: bool) -> Tensors:
        """The results, and if `keep` what backward wants saved."""

    def _eager(self, args: Arguments) -> Tensors:
        seen = witness() if self._replay else None
        if seen is not None:
            return seen.call(self._find, args)
        call, tensors = self._find(args)
        return call.first(tensors)

    def _find(self, args: Arguments) -> tuple[_Call, Sequence[Tensor]]:
        """The call with these arguments, known or new, and its tensors."""
        found = signature(args) if self._replay else None
        if found is None:
            tensors = [a for a in args if isinstance(a, Tensor)]
            if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(a).tangent is not None for a in tensors):
                raise RuntimeError(
                    f"{self.name} has no forward-mode derivative, and an argument has a tangent; use the reference row, or reverse mode"
                )
            return _Call(self, args, replay=False), tensors
        key, tensors = found
        call = self._calls.find(key)
        if call is None:
            call = _Call(self, args, replay=True)
            self._calls.keep(key, call, self._calls.emptied)
        return call, tensors


class Opaque(_Kernels):
    """See the module's docstring.

    Args:
        name: "gdn::<name>" of the registered operator.
        forward: annotated (Tensor, Tensor | None, float, int, bool); its last parameter is `keep: bool`, whether a backward will follow.
            Returns `results` tensors, then the tensors to save; when `keep` is false the saved ones may be empty tensors.
        backward: `(args, saved, grads) -> gradients`; `args` are forward's arguments without `keep`, `grads` hold None for results
            that were not used. One gradient per name in `differentiable`; None where the argument was None.
        fake: like forward, on tensors without data.
        results: how many of forward's tensors are results.
        differentiable: names of the tensor arguments that backward gives a gradient for.
        follows: more arguments that have a gradient, by name: each the one of another argument.
        without: the arguments that backward gets as None, so that nothing keeps them alive, each with the place among the saved tensors of
            one of its shape and dtype.
        saved_results: how many of the results, the last ones, are saved too, before what else is.
        replay: a promise: both launch kernels by `portable_launch.launch` alone, and decide by their arguments' `replay_known.signature`;
            which kernels follows from what meta tensors have too.
        expected: how many of the results usually have a gradient: the kernels of the backward are compiled ahead for these.
    """

    def __init__(
        self,
        name: str,
        forward: Callable[..., Tensors],
        backward: Callable[[Arguments, Tensors, Sequence[Tensor | None]], Sequence[Tensor | None]],
        *,
        fake: Callable[..., Tensors],
        results: int,
        differentiable: tuple[str, ...],
        follows: Mapping[str, str] | None = None,
        without: Mapping[str, int] | None = None,
        saved_results: int = 0,
        replay: bool = False,
        expected: int | None = None,
    ) -> None:
        super().__init__(replay)
        names = list(inspect.signature(forward).parameters)
        if names[-1] != "keep":
            raise TypeError(f"{name}: the last parameter of forward must be keep, got {names[-1]}")
        self.name = name
        self._hosts = forward, backward
        self.forward = _without_autocast(forward)
        self.backward = _without_autocast(backward)
        if replay:
            self.forward = _foreseeing(self.forward, self._launches)
            self.backward = _foreseeing(self.backward, self._backward_launches)
        self.fake = fake
        self.results = results
        self.expected = results if expected is None else expected
        self._begun: set[Any] = set()
        self.places = tuple(names.index(n) for n in differentiable)
        self.followers = {names.index(n): names.index(first) for n, first in (follows or {}).items()}
        self.without = {names.index(n): place for n, place in (without or {}).items()}
        self.first_saved = results - saved_results
        self._operator = self._register()

    def __call__(self, *args: Any) -> Tensors:
        if torch.compiler.is_compiling():
            tensors = self._operator(*args, self.keeps(args))
            return (tensors,) if self._alone else tensors[: self.results]
        return self._eager(args)

    def keeps(self, args: Arguments) -> bool:
        return torch.is_grad_enabled() and any(args[i] is not None and args[i].requires_grad for i in (*self.places, *self.followers))

    def run(self, args: Arguments, keep: bool) -> Tensors:
        tensors = self.forward(*args, keep)
        return tensors if keep else tensors[: self.results]

    def gradients(self, args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients for every argument, None for those that have none. With no gradient to propagate, all are None."""
        out: list[Tensor | None] = [None] * len(args)
        if any(g is not None for g in grads):
            for place, gradient in zip(self.places, self.backward(args, saved, grads), strict=True):
                out[place] = gradient
            self._follow(out)
        return out

    def _follow(self, gradients: list[Tensor | None]) -> None:
        for place, first in self.followers.items():
            gradients[place] = gradients[first]

    def kept(self, args: Sequence[Any]) -> list[Tensor]:
        """The tensors among the arguments that backward gets."""
        return [a for i, a in enumerate(args) if isinstance(a, Tensor) and i not in self.without]

    def _launches(self, *args: Any) -> Launches:
        """Of forward, and of the backward that will follow."""
        tensors, launches = written(self._hosts[0], *args)
        yield launches
        if args[-1]:
            grads = [x if i < self.expected else None for i, x in enumerate(tensors[: self.results])]
            given = tuple(None if i in self.without else a for i, a in enumerate(args[:-1]))
            yield from self._backward_launches(given, tensors[self.first_saved :], grads)

    def _backward_launches(self, args: Arguments, saved: Tensors, grads: Sequence[Tensor | None]) -> Launches:
        yield written(self._hosts[1], args, saved, grads)[1]

    def _traced(self, *args: Any) -> Tensors:
        """`fake`, and what will run begins to be compiled."""
        if self._replay and torch.cuda.is_initialized():
            self._compile_ahead(args)
        return self.fake(*args)

    def _compile_ahead(self, args: Arguments) -> None:
        parts = [(*a.shape, *a.stride()) if isinstance(a, Tensor) else (a,) for a in args]
        device = _first_tensor(args).get_device()
        if device < replay_known.FIRST_DEVICE or any(isinstance(n, (torch.SymInt, torch.SymFloat)) for part in parts for n in part):
            return
        key = (device, *parts, *[a.dtype for a in args if isinstance(a, Tensor)])
        if key not in self._begun:
            self._begun.add(key)
            begin(self._launches(*args), device)

    def _register(self) -> Callable[..., Any]:
        """Register `name` and `name_backward` with fakes and an autograd formula.

        A tensor alone is registered as one, not as a tuple of one: from such a tuple torch asks for the sizes as numbers, and a graph of
        symbols becomes one for these sizes alone.
        """
        run, fake, schema = self.forward, self._traced, _schema(self.forward)
        self._alone = typing.get_type_hints(self._hosts[0])["return"] == tuple[Tensor]
        if self._alone:
            run, fake, schema = _first(run), _first(fake), f"{schema.rpartition('->')[0]}-> Tensor"
        forward = torch.library.custom_op(self.name, run, mutates_args=(), schema=schema)
        forward.register_fake(fake)

        backward = self._register_backward()

        def setup(ctx: Any, inputs: Arguments, output: Any) -> None:
            args = inputs[:-1]
            tensors = (output,) if self._alone else output
            ctx.rest = tuple(None if isinstance(a, Tensor) else a for a in args)
            ctx.is_tensor = tuple(isinstance(a, Tensor) for a in args)
            ctx.is_kept = tuple(isinstance(a, Tensor) and i not in self.without for i, a in enumerate(args))
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*self.kept(args), *tensors[self.first_saved :])

        def formula(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            stored = iter(ctx.saved_tensors)
            args = [next(stored) if is_kept else other for is_kept, other in zip(ctx.is_kept, ctx.rest)]
            out: list[Tensor | None] = [None] * (len(args) + 1)
            if any(g is not None for g in grads[: self.results]):
                gradients = backward(*args, list(stored), *grads[: self.results])
                for place, gradient in zip(self.places, gradients, strict=True):
                    out[place] = gradient if ctx.is_tensor[place] else None
                self._follow(out)
            return tuple(out)

        forward.register_autograd(formula, setup_context=setup)
        return forward._opoverload

    def _register_backward(self) -> Callable[..., Any]:
        arguments = _schema(self.forward).rpartition("->")[0].strip().removeprefix("(").removesuffix(")")
        declared = arguments.split(", ")[:-1]
        arguments = ", ".join(d.replace("Tensor ", "Tensor? ") if i in self.without else d for i, d in enumerate(declared))
        grads = ", ".join(f"Tensor? grad{i}" for i in range(self.results))
        schema = f"({arguments}, Tensor[] saved, {grads}) -> Tensor[]"

        def run(*inputs: Any) -> list[Tensor]:
            args, saved, grads = inputs[: -self.results - 1], inputs[-self.results - 1], inputs[-self.results :]
            gradients = self.backward(args, tuple(saved), grads)
            like = _first_tensor((*args, *saved))
            return [like.new_empty(0) if g is None else g.contiguous() for g in gradients]

        def fake(*inputs: Any) -> list[Tensor]:
            saved = inputs[-self.results - 1]
            like = _first_tensor((*inputs[: -self.results - 1], *saved))
            chosen = [saved[self.without[place]] if place in self.without else inputs[place] for place in self.places]
            return [like.new_empty(0) if a is None else a.new_empty(a.shape) for a in chosen]

        operator = torch.library.custom_op(f"{self.name}_backward", run, mutates_args=(), schema=schema)
        operator.register_fake(fake)
        return operator._opoverload


class InPlace(_Kernels):
    """A kernel that writes into some of its arguments: a plain call in eager mode, one registered operator under torch.compile.

    It has no gradient; the caller must refuse arguments that need one.

    Args:
        name: "gdn::<name>" of the registered operator.
        function: annotated (Tensor, Tensor | None, float, int, bool); returns new tensors that share no memory with the arguments.
        mutates: names of the arguments that it writes into.
        fake: like function, on tensors without data; returns new empty tensors and writes nothing.
        replay: as for `Opaque`, and that it returns one tensor.
    """

    results = 1

    def __init__(
        self, name: str, function: Callable[..., Any], *, mutates: tuple[str, ...], fake: Callable[..., Any], replay: bool = False
    ) -> None:
        super().__init__(replay)
        self.name = name
        self.function = _without_autocast(function)
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        operator = torch.library.custom_op(name, self.function, mutates_args=mutates, schema=schema)
        operator.register_fake(fake)
        self._operator = operator._opoverload

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._operator(*args)
        return self._eager(args)[0] if self._replay else self.function(*args)

    def keeps(self, args: Arguments) -> bool:
        return False

    def run(self, args: Arguments, keep: bool) -> Tensors:
        return (self.function(*args),)


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*args)
        device = _first_tensor(args).device.type
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def _first(function: Callable[..., Tensors]) -> Callable[..., Tensor]:
    return lambda *args: function(*args)[0]


def _foreseeing(function: Callable[..., Any], more: Callable[..., Launches]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with foreseeing(lambda: more(*args)):
            return function(*args)

    return run


def _first_tensor(args: Arguments) -> Tensor:
    """The first tensor of the arguments, which may come as a tuple or a list in the first of them."""
    return next(a for a in (args[0] if isinstance(args[0], (tuple, list)) else args) if isinstance(a, Tensor))


def decided(decide: Callable[[], int], *given: Tensor | int | None) -> Any:
    """In a fake: a size that follows from those of tensors and from integers. Where one of these is a symbol, it is a symbol of its own."""
    return decide() if all_numbers(*given) else torch.library.get_ctx().new_dynamic_size()


def all_numbers(*given: Tensor | int | None) -> bool:
    """Whether no size of the tensors and none of the integers is a symbol."""
    sizes = (x.shape if isinstance(x, Tensor) else (x,) for x in given if x is not None)
    return all(isinstance(n, int) for shape in sizes for n in shape)


def _schema(function: Callable[..., Any]) -> str:
    return torch.library.infer_schema(function, mutates_args=())


class _Call:
    """A call with everything but its tensors, and what is written down of it. Ready for other tensors of the same signature."""

    def __init__(self, owner: _Kernels, args: Arguments, *, replay: bool) -> None:
        self.owner, self.replay, self.keep = owner, replay, owner.keeps(args)
        self.is_tensor = tuple(isinstance(a, Tensor) for a in args)
        self.rest = tuple(None if isinstance(a, Tensor) else a for a in args)
        self.replay_forward: Callable[[Sequence[Tensor]], Any] | None = None
        """Once it is known."""
        self._recording: Recording | None = None
        self.first_saved, without = (owner.first_saved, owner.without) if isinstance(owner, Opaque) else (owner.results, {})
        self.is_kept = tuple(is_tensor and i not in without for i, is_tensor in enumerate(self.is_tensor))
        self._backwards = Table(lasting=False)

    def first(self, tensors: Sequence[Tensor]) -> Tensors:
        return _Function.apply(self, *tensors) if self.keep else self.forward(tensors)

    def again(self) -> Callable[[Sequence[Tensor]], Tensors]:
        return self._recorded if self.keep else self.replay_forward or self.forward

    @property
    def conditions(self) -> Conditions:
        """Before it is written down, which another call may do, those that it may have."""
        if self._recording is not None:
            return self._recording.conditions
        return frozenset((ask, ask()) for ask in (ordinary, untouched)) if self.replay else frozenset()

    def launches(self) -> Recording | None:
        return self._recording if self._recording is not None and self._recording.launches_only and not self.keep else None

    def _recorded(self, tensors: Sequence[Tensor]) -> Tensors:
        return _apply(self, *tensors)

    def forward(self, tensors: Sequence[Tensor]) -> Tensors:
        """The results, and if a backward will follow what it wants saved."""
        if self.replay_forward is not None:
            return self.replay_forward(tensors)
        if not (self.replay and distinct(tensors)):
            return self._host(tensors)
        results, self._recording = record(lambda: self._host(tensors), tensors)
        self.replay = self._recording is not None
        self.replay_forward = None if self._recording is None else _known(self._recording).run
        return results

    def _host(self, tensors: Sequence[Tensor]) -> Tensors:
        args, _ = self._arguments(tensors, self.is_tensor)
        return self.owner.run(args, self.keep)

    def _arguments(self, stored: Sequence[Tensor], is_stored: Sequence[bool]) -> tuple[Arguments, Tensors]:
        """All arguments, and what comes after them."""
        left = iter(stored)
        return tuple(next(left) if here else other for here, other in zip(is_stored, self.rest)), tuple(left)

    def kept(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of the tensors among the arguments those that backward gets."""
        if self.is_kept == self.is_tensor:
            return tensors
        return [x for x, is_kept in zip(tensors, (k for k, t in zip(self.is_kept, self.is_tensor) if t), strict=True) if is_kept]

    def backward(self, stored: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        """A gradient, or None, for each tensor."""
        if not self.replay:
            return self._backward_host(stored, grads)
        given = (*stored, *grads)
        gradients = self._backwards.replay(given)
        if gradients is not MISS:
            return gradients
        found = signature(given)
        if found is None:
            return self._backward_host(stored, grads)
        key, tensors = found
        known = self._backwards.find(key)
        if known is not None:
            if known is False:
                return self._backward_host(stored, grads)
            if distinct(tensors):
                self._backwards.hasten(known, given)
            return known.run(tensors)
        if not distinct(tensors):
            return self._backward_host(stored, grads)
        gradients, recording = record(lambda: self._backward_host(stored, grads), tensors)
        self._backwards.keep(key, recording is not None and _known(recording))
        return gradients

    def _backward_host(self, stored: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        assert isinstance(self.owner, Opaque)
        args, saved = self._arguments(stored, self.is_kept)
        gradients = self.owner.gradients(args, saved, grads)
        return [gradient for gradient, is_tensor in zip(gradients, self.is_tensor, strict=True) if is_tensor]


def _known(recording: Recording) -> Known:
    known = recording.known()
    return known if known.body is not None else replace(known, run=_without_autocast(known.run))


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: Tensor) -> Tensors:
        results = (call.replay_forward or call.forward)(tensors)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*call.kept(tensors), *results[call.first_saved :])
        return results[: call.owner.results]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (None, *ctx.call.backward(stored, grads))
        with torch.no_grad():
            gradients = ctx.call.backward(stored, grads)
        return (None, *_Once.apply(ctx.call.owner.name, len(gradients), *gradients, *stored, *grads))


class _Once(torch.autograd.Function):
    """The first tensors as they are, out of all of them: who asks for a second derivative comes by here. Torch's `once_differentiable` lets
    its part of one be left out in silence if only the arguments need a gradient, or if it is asked for by `torch.autograd.grad`."""

    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.name = name
        return tuple(None if x is None else x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(f"{ctx.name} is once_differentiable: its gradient has none")


_apply = cast("Any", super(torch.autograd.Function, _Function)).apply
"""Without looking for transforms of functorch: a call with a signature has none."""
