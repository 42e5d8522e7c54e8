"""Several writes a token: every row against the float64 recurrence, the promises of the contract, and the decoding step."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.core.device import has_package
from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.ops import gated_delta_product, gated_delta_product_step, gated_delta_rule
from gdn.ops.delta_product import OP
from gdn.ops.delta_product.problems import SMALL, Problem
from gdn.ops.delta_rule import problems as rule
from gdn.testing import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAST = ["chunked", "stretched"]
PROBLEMS = {problem.name: problem for problem in SMALL}

in_rows = pytest.mark.parametrize("impl", FAST)


@functools.cache
def reference(name: str, dtype: torch.dtype) -> compare.Results:
    return compare.run(OP, "reference", PROBLEMS[name].build(dtype=dtype))


def call(impl: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with use(gated_delta_product=impl):
        return gated_delta_product(**arguments)


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]


def gradients(outputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves(arguments), compare.weights(outputs))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def small(n: int = 2, gradient: bool = True, dtype: torch.dtype = torch.float64, device: str = "cpu", **sizes: Any) -> dict[str, Any]:
    problem = Problem(tokens=rule.Problem(**{"name": "", "T": 6, "K": 4, "V": 3, **sizes}), n=n)
    return problem.build(dtype=dtype, gradient=gradient, device=device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_agrees_with_the_recurrence(name: str, dtype: torch.dtype) -> None:
    """At most twice as wrong as plain torch at this dtype."""
    rounding, truth = reference(name, torch.float32 if dtype == torch.float64 else dtype), reference(name, torch.float64)
    scale = compare.SCALED if dtype == torch.float64 else 1.0
    for impl in FAST if dtype == torch.float64 else FAST[:1]:
        assert compare.complaints(compare.run(OP, impl, PROBLEMS[name].build(dtype=dtype)), rounding, truth, dtype, scale=scale) == []


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_dtypes_of_the_results_and_no_tokens(impl: str) -> None:
    o, state = call(impl, small(T=3, HV=2, V=5, dtype=torch.bfloat16))
    assert (o.dtype, list(o.shape), state.dtype, list(state.shape)) == (torch.bfloat16, [1, 3, 2, 5], torch.float32, [1, 2, 4, 5])
    arguments = small(T=0, B=2, initial=True)
    o, state = call(impl, arguments)
    assert list(o.shape) == [2, 0, 1, 3]
    close(state, arguments["initial_state"])


@pytest.mark.parametrize("impl", [*FAST, "reference"])
def test_one_write_is_the_gated_delta_rule(impl: str) -> None:
    arguments = small(n=1, T=70, H=2, HV=4, initial=True)
    plain = {name: x.squeeze(2) if name in ("k", "v", "beta") else x for name, x in arguments.items()}
    with use(gated_delta_rule="reference"):
        expected = gated_delta_rule(**plain)
    close(call(impl, arguments), expected)


def test_the_decay_stands_before_the_first_write_and_the_read_after_the_last() -> None:
    """By hand: memory 8, halved; a write of 2 at half strength makes 3, one of 5 makes 4."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    v = torch.tensor([2.0, 5.0], dtype=torch.float64).reshape(1, 1, 2, 1, 1)
    half = torch.full((1, 1, 2, 1), 0.5, dtype=torch.float64)
    halve = torch.full((1, 1, 1), 0.5, dtype=torch.float64).log()
    for impl in [*FAST, "reference"]:
        with use(gated_delta_product=impl):
            o, state = gated_delta_product(one, torch.ones_like(v), v, halve, half, initial_state=8 * one)
        assert (round(o.item(), 9), round(state.item(), 9)) == (4.0, 4.0)


@in_rows
def test_gradients_agree_with_finite_differences(impl: str) -> None:
    arguments = small(n=3, T=5, B=2, HV=2, K=2, lengths=(2, 0, 3, 5), initial=True)
    packing = arguments.pop("packing")
    arguments["g"] = (arguments["g"].detach() - 0.05).requires_grad_()  # differences must not cross zero

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return call(impl, {**dict(zip(arguments, tensors)), "packing": packing})

    assert torch.autograd.gradcheck(function, tuple(arguments.values()), fast_mode=True)


@pytest.mark.parametrize("use_o", [True, False])
def test_one_result_alone_has_its_gradient(use_o: bool) -> None:
    def result(impl: str) -> tuple[Tensor, ...]:
        arguments = small(T=40, HV=2, initial=True)
        loss = call(impl, arguments)[0 if use_o else 1].square().sum()
        return torch.autograd.grad(loss, leaves(arguments), materialize_grads=True)

    close(result("chunked"), result("reference"))


@in_rows
def test_packed_equals_separate(impl: str) -> None:
    lengths = [1, 16, 0, 17, 35, 1]
    arguments = small(n=3, T=sum(lengths), HV=2, lengths=tuple(lengths), initial=True, gradient=False)
    together = call(impl, arguments)
    outputs, states, begin = [], [], 0
    for i, length in enumerate(lengths):
        piece = {name: arguments[name][:, begin : begin + length] for name in ("q", "k", "v", "g", "beta")}
        o, state = call(impl, {**piece, "initial_state": arguments["initial_state"][i : i + 1]})
        outputs.append(o)
        states.append(state)
        begin += length
    close(together, (torch.cat(outputs, dim=1), torch.cat(states)))


@in_rows
def test_compiled_equals_eager(impl: str) -> None:
    torch._dynamo.reset()
    sizes = {"T": 40, "HV": 2, "initial": True, "lengths": (15, 0, 25)}
    with use(gated_delta_product=impl):
        eager, compiled = small(**sizes), small(**sizes)
        expected = gated_delta_product(**eager)
        actual = torch.compile(gated_delta_product, fullgraph=True, backend="aot_eager")(**compiled)
        close(actual, expected)
        close(gradients(actual, compiled), gradients(expected, eager))


def chosen(dtype: torch.dtype, **sizes: int) -> str:
    return next(verdict.name for verdict in OP.explain("cuda", dtype, **sizes) if verdict.reason is None)


@pytest.mark.skipif(not has_package("triton"), reason="needs Triton")
def test_a_gpu_takes_the_kernels() -> None:
    assert chosen(torch.bfloat16, K=128, V=256) == chosen(torch.float32, K=1, V=1) == "portable"
    assert chosen(torch.bfloat16, K=257, V=256) == chosen(torch.float64, K=128, V=128) == "chunked"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("name", "dtype"), [("packed, 2 writes", torch.float32), ("empty documents, 3 writes", torch.bfloat16)], ids=str)
def test_the_kernels_agree_with_the_recurrence(name: str, dtype: torch.dtype) -> None:
    pytest.importorskip("gdn.ops.delta_product.portable")
    actual = compare.run(OP, "portable", PROBLEMS[name].build(dtype=dtype, device=DEVICE))
    assert compare.complaints(actual, reference(name, dtype), reference(name, torch.float64), dtype) == []


@pytest.mark.usefixtures("poisoned_memory")
def test_the_kernels_give_the_same_bits_in_a_compiled_graph() -> None:
    """Packed: there the chunk table has rows beyond the end."""
    pytest.importorskip("gdn.ops.delta_product.portable")
    torch._dynamo.reset()
    found, sizes = [], {"T": 40, "lengths": (15, 25, 0), "initial": True}
    for run in (gated_delta_product, torch.compile(gated_delta_product, fullgraph=True, backend="aot_eager")):
        arguments = small(dtype=torch.float32, device=DEVICE, **sizes)
        with use(gated_delta_product="portable"):
            outputs = run(**arguments)
            found.append((*outputs, *gradients(outputs, arguments)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["packed, 2 writes", "empty documents, 3 writes", "odd sizes, 5 writes", "one token, 3 writes"])
def test_uninitialised_memory_is_not_read(name: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills the memory of torch.empty and its relatives with NaN
    try:
        actual = compare.run(OP, "chunked", PROBLEMS[name].build(dtype=torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert compare.complaints(actual, reference(name, torch.float32), reference(name, torch.float64), torch.float32) == []


def test_every_run_gives_the_same_bits_and_arguments_are_left_alone() -> None:
    runs, before = [], PROBLEMS["packed, 2 writes"].build(dtype=torch.float32)
    for _ in range(2):
        arguments = PROBLEMS["packed, 2 writes"].build(dtype=torch.float32)
        outputs = call("chunked", arguments)
        runs.append((*outputs, *gradients(outputs, arguments)))
        assert all(torch.equal(x, before[name]) for name, x in arguments.items() if isinstance(x, Tensor))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def saved_bytes(length: int) -> tuple[int, int]:
    """Bytes of the arguments, and of all memory that autograd keeps for the backward pass."""
    arguments = small(T=length, H=2, HV=2, K=64, V=64, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = call("chunked", arguments)
    assert outputs[0].requires_grad
    return sum(x.nbytes for x in leaves(arguments)), sum(kept.values())


def test_memory_grows_with_the_length_and_holds_no_state_per_token() -> None:
    inputs, once = saved_bytes(256)
    assert 1.8 * once < saved_bytes(512)[1] < 2.2 * once
    assert once < 2 * inputs  # a state for each token would be more than 12 times the inputs


def step(impl: str, arguments: dict[str, Any], state: Tensor, **more: Any) -> Tensor:
    tokens = {name: arguments[name] for name in ("q", "k", "v", "g", "beta")}
    with use(gated_delta_product_step=impl):
        return gated_delta_product_step(**tokens, state=state, **more)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("tokens", [1, 4])
def test_stepping_equals_the_sequence(impl: str, tokens: int) -> None:
    arguments = small(n=3, T=8, B=2, H=2, HV=4, initial=True, gradient=False)
    o, final = call("reference", arguments)
    state, outputs = arguments.pop("initial_state").clone(), []
    for at in range(0, 8, tokens):
        outputs.append(step(impl, {name: x[:, at : at + tokens] for name, x in arguments.items()}, state))
    close(torch.cat(outputs, dim=1), o)
    close(state, final)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_a_step_touches_only_the_rows_of_its_slots(impl: str) -> None:
    arguments = small(T=2, B=3, HV=2, gradient=False)
    pool = torch.randn(5, 2, 4, 3, dtype=torch.float64)
    before = pool.clone()
    o = step(impl, arguments, pool, slots=torch.tensor([3, -1, 0]))
    expected, final = call("reference", {**arguments, "initial_state": before[[3, 1, 0]]})
    assert not o[1].any()
    close(o[[0, 2]], expected[[0, 2]])
    close(pool[[3, 0]], final[[0, 2]])
    assert torch.equal(pool[[1, 2, 4]], before[[1, 2, 4]])


def test_narrow_memory_is_stored_rounded() -> None:
    arguments = small(T=2, B=2, HV=2, gradient=False, dtype=torch.float32)
    state = torch.randn(2, 2, 4, 3).bfloat16()
    expected, final = call("reference", {**arguments, "initial_state": state.float()})
    o = step("torch", arguments, state)
    torch.testing.assert_close(o, expected)
    assert torch.equal(state, final.bfloat16())


WRONG: dict[str, tuple[dict[str, Tensor | Packing], str]] = {
    "keys of one write": ({"k": torch.zeros(2, 6, 2, 4)}, r"k: expected 5 dimensions \[B, T, n, H, K\], got \[2, 6, 2, 4\]"),
    "other writes": ({"v": torch.zeros(2, 6, 2, 4, 3)}, r"v: expected \[B=2, T=6, n=3, HV, V\], got \[2, 6, 2, 4, 3\]"),
    "strength a token": ({"beta": torch.zeros(2, 6, 4)}, r"beta: expected 4 dimensions \[B, T, n, HV\], got \[2, 6, 4\]"),
    "decay a write": ({"g": torch.zeros(2, 6, 3, 4)}, r"g: expected 3 dimensions \[B, T, HV\], got \[2, 6, 3, 4\]"),
    "positive decay": ({"g": torch.ones(2, 6, 4)}, r"g: expected a log decay, so at most 0 everywhere, got 1"),
    "dtype": ({"k": torch.zeros(2, 6, 3, 2, 4).double()}, r"k: expected torch.float32 like q, got torch.float64"),
    "packing": ({"packing": Packing.from_lengths([6, 7])}, r"packing: describes 13 tokens"),
    "state": ({"initial_state": torch.zeros(2, 4, 3, 4)}, r"initial_state: expected \[N=2, HV=4, K=4, V=3\], got \[2, 4, 3, 4\]"),
    "narrow state": ({"initial_state": torch.zeros(2, 4, 4, 3).half()}, r"initial_state: expected torch.float32, got torch.float16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    changes, message = WRONG[case]
    arguments = small(n=3, B=2, H=2, HV=4, dtype=torch.float32, gradient=False)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        gated_delta_product(**{**arguments, **changes})


def test_wrong_arguments_of_the_step_are_named() -> None:
    arguments = small(n=3, B=2, H=2, HV=4, dtype=torch.float32, gradient=False)
    with pytest.raises(ArgumentError, match=r"k: expected .* at least one write a token"):
        empty = {name: arguments[name][:, :, :0] for name in ("k", "v", "beta")}
        gated_delta_product_step(**{**arguments, **empty}, state=torch.zeros(2, 4, 4, 3))
    with pytest.raises(ArgumentError, match=r"state: expected torch.float32, torch.bfloat16 or torch.float16, got torch.float64"):
        gated_delta_product_step(**arguments, state=torch.zeros(2, 4, 4, 3).double())
    with pytest.raises(ArgumentError, match=r"v: expected a tensor without gradient"):
        gated_delta_product_step(**{**arguments, "v": arguments["v"].clone().requires_grad_()}, state=torch.zeros(2, 4, 4, 3))
