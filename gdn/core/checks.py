"""Argument checks that name the argument, say what came and what was expected.

sizes = shapes(("q", q, "B T H K"), ("k", k, "B T H K"), ("v", v, "B T HV V"))     # {"B": 2, "T": 128, ...}
"""

from __future__ import annotations

import math
import numbers
import sys

import torch
from torch import Tensor

from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing


def shapes(*arguments: tuple[str, Tensor, str], **known: int) -> dict[str, int]:
    """Check `(name, tensor, "letters")` against each other and return the size of each letter. `known` fixes letters in advance."""
    sizes = dict(known)
    for name, tensor, letters in arguments:
        pattern = letters.split()
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: expected a tensor [{', '.join(pattern)}], got {type(tensor).__name__}")
        shape = tensor.shape
        if len(shape) != len(pattern):
            raise ArgumentError(f"{name}: expected {len(pattern)} dimensions [{', '.join(pattern)}], got {list(shape)}")
        for letter, size in zip(pattern, shape):
            if sizes.setdefault(letter, size) != size:
                expected = ", ".join(f"{x}={sizes[x]}" if x in sizes else x for x in pattern)
                raise ArgumentError(f"{name}: expected [{expected}], got {list(shape)}")
    return sizes


def value_heads(sizes: dict[str, int]) -> None:
    """HV value heads must be a multiple of the H heads of q and k, of which there must be one. Nor may heads be without channels."""
    for name, letter, what in (("q", "H", "head"), ("q", "K", "channel"), ("v", "HV", "head"), ("v", "V", "channel")):
        if sizes[letter] < 1:
            raise ArgumentError(f"{name}: expected at least one {what}, got none")
    if sizes["HV"] % sizes["H"]:
        raise ArgumentError(f"v: expected a multiple of {sizes['H']} value heads (the heads of q), got {sizes['HV']}")


def scale(given: float | None, K: int) -> float:
    """The factor on reads or scores: a number, since it has no gradient; `K ** -0.5` where none is given."""
    if given is None:
        if K < 1:
            raise ArgumentError("q: expected at least one channel, got none")
        return K**-0.5
    if isinstance(given, Tensor):
        raise ArgumentError("scale: expected a number, got Tensor; what has a gradient belongs to q")
    return number("scale", given)


def number(name: str, given: float, *, above: float = -math.inf, most: float = math.inf) -> float:
    """A finite number above one bound and at most the other. No tensor: its value would have to be read from the device."""
    if isinstance(given, bool) or not isinstance(given, (numbers.Real, torch.SymFloat, torch.SymInt)):
        raise ArgumentError(f"{name}: expected a number, got {_kind(given)}")
    try:
        value = given if isinstance(given, (torch.SymFloat, torch.SymInt)) else float(given)  # numpy's float32 has bounds of its own
    except OverflowError:
        value = math.inf
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise ArgumentError(f"{name}: expected a finite number, got {given}")
    if not above < value <= most:
        raise ArgumentError(f"{name}: expected above {above}{f' and at most {most}' if most < math.inf else ''}, got {given}")
    return value


def integer(name: str, given: int, *, least: int, most: int = 2**63 - 1) -> int:
    """An integer between two bounds. No tensor, as for `number`; and no float, not even one without a fraction."""
    if isinstance(given, bool) or not isinstance(given, (numbers.Integral, torch.SymInt)):
        raise ArgumentError(f"{name}: expected an integer, got {_kind(given)}")
    if given < least:
        raise ArgumentError(f"{name}: expected at least {least}, got {given}")
    if given > most:
        raise ArgumentError(f"{name}: expected at most {most}, got {given}")
    return given if isinstance(given, torch.SymInt) else int(given)


def _kind(given: object) -> str:
    return "Tensor; take its value with .item()" if isinstance(given, Tensor) else type(given).__name__


def tensors(*arguments: tuple[str, Tensor]) -> None:
    """What `shapes` says of arguments without dimensions of known number."""
    for name, tensor in arguments:
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: expected a tensor, got {type(tensor).__name__}")


def same_device(*arguments: tuple[str, Tensor | None]) -> None:
    """All tensors given must be tensors, and where the first one is."""
    first, reference = arguments[0]
    assert reference is not None
    for name, tensor in arguments[1:]:
        if tensor is not None and not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor is not None and tensor.device != reference.device:
            raise ArgumentError(f"{name}: expected on {reference.device} like {first}, got {tensor.device}")


def same_dtype(*arguments: tuple[str, Tensor | None]) -> None:
    """All tensors given must have the floating dtype of the first, of 16 bits or more: with fewer torch does no arithmetic."""
    first, reference = arguments[0]
    assert reference is not None
    if not reference.dtype.is_floating_point:
        raise ArgumentError(f"{first}: expected a floating dtype, got {reference.dtype}")
    if reference.dtype.itemsize < 2:
        raise ArgumentError(f"{first}: expected at least 16 bits a number, got {reference.dtype}")
    for name, tensor in arguments[1:]:
        if tensor is not None and tensor.dtype != reference.dtype:
            raise ArgumentError(f"{name}: expected {reference.dtype} like {first}, got {tensor.dtype}")


def floating(*arguments: tuple[str, Tensor | None]) -> None:
    """All tensors given must have a floating dtype."""
    for name, tensor in arguments:
        if tensor is not None and not tensor.dtype.is_floating_point:
            raise ArgumentError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def not_positive(name: str, tensor: Tensor, meaning: str) -> None:
    """No element may be above zero. Looks at the values on the CPU in eager mode only: on a GPU it would stall the stream."""
    if torch.compiler.is_compiling() or tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    largest = tensor.detach().max()
    if bool(largest > 0):
        raise ArgumentError(f"{name}: expected {meaning}, so at most 0 everywhere, got {float(largest):.4g}")


def padding(mask: Tensor | None, batch: int, length: int) -> None:
    """A mask must be bool `[batch, length]` and False on the left only. Looks at the values where `not_positive` does."""
    if mask is None:
        return
    if mask.dtype != torch.bool or mask.shape != (batch, length):
        raise ArgumentError(f"mask: expected bool {[batch, length]}, got {str(mask.dtype)[6:]} {list(mask.shape)}")
    if torch.compiler.is_compiling() or mask.device.type != "cpu":
        return
    wrong = (mask[:, :-1] & ~mask[:, 1:]).any(1)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ArgumentError(f"mask: expected padding on the left only, row {row} has a token before padding; move it to the left")


def boundaries(packing: Packing | None, batch: int, length: int, device: torch.device) -> None:
    """Packed documents, if there are any, must be those of `[batch, length]` tokens on `device`."""
    if packing is None:
        return
    if not isinstance(packing, Packing):
        made = "make one with Packing.from_cu_seqlens or from_lengths"
        raise ArgumentError(f"packing: expected a gdn.Packing, got {type(packing).__name__}; {made}")
    packing.check(batch, length, device)


def no_gradient(*arguments: tuple[str, Tensor | None]) -> None:
    """No tensor given may require a gradient while gradients are enabled: for operators that have none."""
    for name, tensor in arguments:
        if tensor is not None and torch.is_grad_enabled() and tensor.requires_grad:
            raise ArgumentError(f"{name}: expected a tensor without gradient, this operator has none; call it under torch.no_grad()")


def in_place(state: Tensor) -> None:
    """A state that is updated in its place: no two elements may be the same memory, as those of an expanded tensor are."""
    if any(stride == 0 and size > 1 for stride, size in zip(state.stride(), state.shape)):
        raise ArgumentError(
            f"state: expected memory of its own for each element, got one expanded to {list(state.shape)}; use .contiguous()"
        )


def slots(tensor: Tensor | None, batch: int, pool: int) -> None:
    """Rows of a pool of states, one for each sequence of the batch; negative ones are skipped. None stands for all rows in order.

    Looks at the values on the CPU in eager mode only.
    """
    if tensor is None:
        if pool != batch:
            raise ArgumentError(f"state: expected {batch} rows, one for each sequence, got {pool}; or say with slots which rows to use")
        return
    shapes(("slots", tensor, "B"), B=batch)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(f"slots: expected int32 or int64, got {tensor.dtype}")
    if torch.compiler.is_compiling() or tensor.device.type != "cpu":
        return
    used = [i for i in tensor.tolist() if i >= 0]
    if used and max(used) >= pool:
        raise ArgumentError(f"slots: expected rows below {pool}, got {max(used)}")
    if len(set(used)) < len(used):
        raise ArgumentError("slots: expected each row at most once, got one twice")


def memory(state: Tensor, dtype: torch.dtype) -> None:
    """The state of a decoding step: the dtype of sums for activations of `dtype`, or stored in half of float32's width."""
    floating(("state", state))
    exact = accumulate_dtype(dtype)
    if state.dtype != exact and state.element_size() != 2:
        raise ArgumentError(f"state: expected {exact}, torch.bfloat16 or torch.float16, got {state.dtype}")
    in_place(state)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32
