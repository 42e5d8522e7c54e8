"""How far an implementation of an operator is from float64, and how far it may be.

    truth = run(OP, "reference", arguments(torch.float64))
    rounding = run(OP, "reference", arguments(torch.bfloat16))
    wrong = complaints(run(OP, "chunked", arguments(torch.bfloat16)), rounding, truth, torch.bfloat16)
    assert not wrong, wrong

The error of a tensor is the norm of its difference to the float64 reference over the norm of the reference. The same error of the reference
run at the working dtype says what rounding alone costs. An implementation may be at most twice as wrong as that, plus a few units of the
dtype's last place. The arguments must be the same numbers in every dtype: rounded to bfloat16 before they are widened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gdn import ops
from gdn.core.dispatch import Op, use

FLOOR = 4
"""Units of the dtype's last place that every implementation may be wrong by."""

SCALED = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
"""Turns a rounding error in float32 into one in float64."""


@dataclasses.dataclass(frozen=True)
class Results:
    """What `run` returns, in float64 on the CPU."""

    names: tuple[str, ...]
    """"output 0", ..., then the names of the arguments whose gradients (or, updated in place, whose values) follow."""
    tensors: tuple[Tensor, ...]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.names.index(name)]


def run(op: Op, impl: str, arguments: Mapping[str, Any]) -> Results:
    """Call an operator's contract through one row of its table.

    Args:
        op: the table.
        impl: the name of the row.
        arguments: of the contract, by name. Where a tensor among them (or in a dataclass among them) requires a gradient, the results
            hold the gradients of a fixed random weighting of all outputs; otherwise an argument called `state` counts as an output, being
            updated in place.
    """
    with use(**{op.name: impl}):
        return called(getattr(ops, op.name), arguments)


def called(function: Callable[..., Tensor | Sequence[Tensor]], arguments: Mapping[str, Any]) -> Results:
    """The same of a function, which may be compiled, instead of a row."""
    returned = function(**arguments)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    leaves = {name: t for name, t in named_tensors(arguments).items() if t.requires_grad}
    extra: dict[str, Tensor] = {}
    if leaves:
        extra = dict(zip(leaves, torch.autograd.grad(outputs, list(leaves.values()), weights(outputs))))
    elif "state" in arguments:
        extra = {"state": arguments["state"]}
    names = (*(f"output {i}" for i in range(len(outputs))), *extra)
    return Results(names, tuple(t.detach().double().cpu() for t in (*outputs, *extra.values())))


def weights(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Normal numbers shaped like the outputs, the same in every dtype: the gradient that `run` sends back."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=generator).bfloat16().to(o.device, o.dtype) for o in outputs]


def named_tensors(arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors among the arguments, and in the dataclasses among them."""
    found: dict[str, Tensor] = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif dataclasses.is_dataclass(value):
            inside = {f"{name}.{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
            found |= {path: tensor for path, tensor in inside.items() if isinstance(tensor, Tensor)}
    return found


def pool(draws: Sequence[Results]) -> Results:
    """Several draws of a problem as one, whose errors are those of all of them together."""
    return Results(draws[0].names, tuple(torch.stack(tensors) for tensors in zip(*(draw.tensors for draw in draws), strict=True)))


def error(actual: Tensor, truth: Tensor) -> float:
    """The relative error of one tensor; infinite if it is not finite everywhere."""
    if not bool(actual.isfinite().all()):
        return float("inf")
    return float((actual - truth).norm() / truth.norm().clamp(min=1e-30)) if truth.numel() else 0.0


def distance(actual: Results, truth: Results) -> float:
    """The largest relative error of any output or gradient."""
    assert actual.names == truth.names
    return max(error(a, b) for a, b in zip(actual.tensors, truth.tensors, strict=True))


def allowed(rounding: float, dtype: torch.dtype) -> float:
    """The error that an implementation may have where the reference at this dtype has the error `rounding`."""
    return 2 * rounding + FLOOR * torch.finfo(dtype).eps


def complaints(actual: Results, rounding: Results, truth: Results, dtype: torch.dtype, *, scale: float = 1.0) -> list[str]:
    """One line for each output or gradient that is more wrong than `allowed`; empty when the implementation is right.

    Args:
        actual: of the implementation at dtype.
        rounding: of plain torch at dtype, usually the reference.
        truth: of the reference in float64.
        dtype: of the activations.
        scale: factor on the errors of `rounding`. `SCALED` where the reference is the truth (float64) and `rounding` was run in float32.
    """
    assert actual.names == rounding.names == truth.names
    found = []
    for name in truth.names:
        is_wrong, may_be = error(actual[name], truth[name]), allowed(scale * error(rounding[name], truth[name]), dtype)
        if not is_wrong <= may_be:
            found.append(f"{name}: error {is_wrong:.3g}, at most {may_be:.3g} allowed")
    return found


def in_three_dtypes(op: Op, impl: str, build: Callable[[torch.dtype], Mapping[str, Any]]) -> list[str]:
    """The complaints about a row in float64, float32 and bfloat16, each naming its dtype.

    Args:
        build: makes the arguments of the contract at a dtype, the same numbers in each.
    """
    truth, narrow = (run(op, "reference", build(dtype)) for dtype in (torch.float64, torch.float32))
    found = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rounding = run(op, "reference", build(dtype)) if dtype == torch.bfloat16 else narrow
        scale = SCALED if dtype == torch.float64 else 1.0
        found += [f"{dtype}: {line}" for line in complaints(run(op, impl, build(dtype)), rounding, truth, dtype, scale=scale)]
    return found
