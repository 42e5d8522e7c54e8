"""Comparison of an implementation with the float64 reference: it may be at most twice as wrong as the reference run at the same dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.core.device import has_package, interprets_triton
from gdn.core.dispatch import use
from gdn.core.replay_known import forget

Arguments = dict[str, Any]


def change_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every floating tensor in it changed, also inside a dataclass of tensors."""
    if isinstance(value, Tensor):
        return change(value) if value.dtype.is_floating_point else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type) and any(f.name == "A_log" for f in dataclasses.fields(value)):
        return dataclasses.replace(value, **{f.name: change_tensors(getattr(value, f.name), change) for f in dataclasses.fields(value)})
    return value


def surrounded(tensor: Tensor) -> Tensor:
    """A copy in the middle of memory that is NaN elsewhere: whoever reads beside the tensor, or between numbers of a view, is found out."""
    if 0 in tensor.stride():
        return tensor.clone()
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride())) + 1 if tensor.numel() else 0
    around = tensor.new_full((extent + 256,), float("nan"))
    return around.as_strided(tensor.shape, tensor.stride(), 128).copy_(tensor)


def evaluate(call: Callable[..., Any], impl: str, arguments: Arguments, *, run: Callable[..., Any] | None = None) -> dict[str, Tensor]:
    """Outputs, and gradients of a fixed random weighting of them; for operators on a `state` in place, the output and the new state."""
    leaves: list[Tensor] = []
    in_place = "state" in arguments

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(surrounded(tensor.detach()).requires_grad_(not in_place))
        return leaves[-1]

    arguments = {name: change_tensors(value, leaf) for name, value in arguments.items()}
    with use(**{call.__name__: impl}):
        results = (run or call)(**arguments)
    outputs = [results] if isinstance(results, Tensor) else list(results)
    found = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if in_place:
        return found | {"state": arguments["state"]}
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device) for o in outputs]
    loss = torch.stack([(o.double() * w).sum() for o, w in zip(outputs, weights)]).sum()
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return found | {f"gradient {i}": g for i, g in enumerate(gradients)}


def distance(actual: Tensor, truth: Tensor) -> float:
    assert actual.shape == truth.shape
    return float((actual.double() - truth.double()).norm() / truth.double().norm().clamp(min=1e-300)) if truth.numel() else 0.0


def check(
    call: Callable[..., Any],
    impl: str,
    arguments: Arguments,
    *,
    run: Callable[..., Any] | None = None,
    beside: dict[str, str] | None = None,
) -> None:
    """Compare a row of `call`'s table with the float64 reference on the same numbers. `beside` names rows whose error at this dtype is
    the measure, by operator; without it the reference's is."""
    dtype = next(v.dtype for v in arguments.values() if isinstance(v, Tensor))
    # Some units in the last place of the sums, which are float32 for every narrow dtype; float64 is its own truth up to their order.
    floor = 2**-46 if dtype == torch.float64 else 4 * torch.finfo(torch.float32).eps
    truth = evaluate(call, "reference", {n: change_tensors(v, Tensor.double) for n, v in arguments.items()})
    with use(**(beside or {})):
        plain = evaluate(call, (beside or {}).get(call.__name__, "reference"), arguments)
    ours = evaluate(call, impl, arguments, run=run)
    for name, value in ours.items():
        assert value.dtype == plain[name].dtype, f"{name} is {value.dtype}, the reference gives {plain[name].dtype}"
        assert value.isfinite().all(), f"{name} is not finite"
        error, allowed = distance(value, truth[name]), 2 * distance(plain[name], truth[name]) + floor
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


@pytest.fixture
def as_good_as_the_reference() -> Callable[..., None]:
    return check


@pytest.fixture(scope="session", autouse=True)
def interpreter_computes_like_a_gpu(quick_interpreter: None) -> Iterator[None]:
    """Kernels of the tests themselves too."""
    if not (has_package("triton") and interprets_triton()):
        yield
        return
    from gdn.core.portable_interpreted import like_a_gpu

    with like_a_gpu():
        yield


@pytest.fixture(autouse=True)
def nothing_replayed_of_other_tests() -> None:
    """Tests change constants and launch parameters, of which a recording knows nothing."""
    forget()


@pytest.fixture(params=["half", "twice"])
def warps(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every launch has half or twice the warps that it asks for."""
    pytest.importorskip("triton")
    from warps import FACTORS, warps_times

    with warps_times(FACTORS[request.param]):
        yield request.param


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (the largest value, for integers), so that whoever reads what nobody wrote is found out."""
    torch.use_deterministic_algorithms(True)  # this is what makes torch.empty fill
    yield
    torch.use_deterministic_algorithms(False)
