"""The activations with a matrix against their references, in torch and in Triton (its interpreter where there is no GPU)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.core.foresight import written
from gdn.core.opaque import Opaque
from gdn.ops import gated_rms_norm_linear, parallel_linear, swiglu_linear
from gdn.ops.projection.problems import PROBLEMS, Problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Check = Callable[..., None]
BUILD: dict[Callable[..., Tensor], str] = {swiglu_linear: "build_swiglu", gated_rms_norm_linear: "build_norm"}

each = pytest.mark.parametrize("call", BUILD, ids=lambda f: f.__name__)
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)


def build(call: Callable[..., Tensor], problem: Problem, dtype: torch.dtype, device: str = DEVICE) -> dict[str, Any]:
    return getattr(problem, BUILD[call])(dtype=dtype, device=device)


@each
@each_problem
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_torch_matches_the_reference(
    call: Callable[..., Tensor], problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Check
) -> None:
    as_good_as_the_reference(call, "torch", build(call, problem, dtype, "cpu"))


@each
@each_problem
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_triton_matches_the_reference(
    call: Callable[..., Tensor], problem: Problem, dtype: torch.dtype, as_good_as_the_reference: Check
) -> None:
    as_good_as_the_reference(call, "portable", build(call, problem, dtype))


@pytest.mark.parametrize("impl", ["torch", "portable"])
def test_a_gate_through_a_sigmoid_matches_the_reference(impl: str, as_good_as_the_reference: Check) -> None:
    arguments = build(gated_rms_norm_linear, PROBLEMS[0], torch.float32)
    as_good_as_the_reference(gated_rms_norm_linear, impl, {**arguments, "activation": "sigmoid"})


WAYS = {
    (1, True): ["{name}_kernel"],
    (2, True): ["{name}_kernel"],
    (3, True): ["{before}", "linear_kernel"],
    (64, True): ["{before}", "linear_kernel"],
    (65, True): ["{before}"],
    (1, False): ["{before}"],
}
"""Kernels by tokens, and whether the matrix has no gaps; where the last is not a product, torch multiplies."""


@pytest.mark.parametrize(("tokens", "dense"), WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_few_tokens_are_one_kernel_or_two(tokens: int, dense: bool, dtype: torch.dtype) -> None:
    portable = pytest.importorskip("gdn.ops.projection.portable")
    x, weight = torch.zeros(tokens, 1, 2 * 48, dtype=dtype), torch.zeros(2, 10, 48, dtype=dtype)
    matrix = weight[0] if dense else weight.transpose(0, 1).reshape(10, 96)[:, :48]
    vectors = x[..., :48].view(tokens, 4, 12)
    for operator, before, arguments in (
        (portable._SWIGLU, "swiglu_kernel", (x, matrix)),
        (portable._GATED_RMS_NORM, "norm_kernel", (vectors, vectors, torch.zeros(12), matrix, 1e-5, True)),
    ):
        expected = [kernel.format(name=operator.name[5:].removesuffix("_portable"), before=before) for kernel in WAYS[tokens, dense]]
        assert kernels(operator, *arguments, False) == expected


def test_few_tokens_that_need_more_take_the_longer_way() -> None:
    """Gradients of the norm need a number of each head; float32 has no tensor cores; a head may be too wide for a program."""
    portable = pytest.importorskip("gdn.ops.projection.portable")

    def norm(x: Tensor, keep: bool) -> list[str]:
        return kernels(portable._GATED_RMS_NORM, x, x, x.new_zeros(x.shape[-1]), x.new_zeros(5, x[0].numel()), 1e-5, True, keep)

    narrow = torch.zeros(1, 2, 512, dtype=torch.bfloat16)
    assert norm(narrow, True) == ["norm_kernel", "linear_kernel"]
    assert norm(narrow, False) == norm(narrow.float(), False) == ["gated_rms_norm_linear_kernel"]
    assert norm(torch.zeros(1, 2, 513, dtype=torch.bfloat16), False) == ["norm_kernel", "linear_kernel"]
    assert norm(torch.zeros(3, 2, 512), False) == ["norm_kernel"]


def kernels(operator: Opaque, *arguments: Any) -> list[str]:
    """What the forward launches."""
    return [launch.kernel.fn.__name__ for launch in written(operator._hosts[0], *arguments)[1]]


def among(x: Tensor, before: int, after: int, *, rows: bool = False) -> Tensor:
    """The same numbers among ones that are none, which a kernel must not read: in wider rows, and with `rows` with others after them."""
    wide = torch.full((x.shape[0] + 3 * rows, before + x.shape[1] + after), math.nan, dtype=x.dtype, device=x.device)
    wide[: x.shape[0], before : before + x.shape[1]] = x
    return wide[: x.shape[0], before : before + x.shape[1]]


@pytest.mark.parametrize(("heads", "width"), [(5, 24), (3, 12), (3, 8)])
@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_few_tokens_read_nothing_else(tokens: int, dtype: torch.dtype, heads: int, width: int, as_good_as_the_reference: Check) -> None:
    """Heads and gates as parts of wider tensors, each of another, as a layer's first matrix gives them; factors with gaps; and beside the
    matrix other numbers."""
    arguments = Problem(name="", shape=(tokens, heads, width), M=20).build_norm(dtype=dtype, device=DEVICE)
    for name, before, after in (("x", 8, 4), ("gate", 16, 40)):
        arguments[name] = among(arguments[name].flatten(1), before, after).unflatten(1, (heads, width))
    arguments["norm_weight"] = among(arguments["norm_weight"][:, None], 1, 1)[:, 0]
    arguments["weight"] = among(arguments["weight"], 0, 0, rows=True)
    kind = "linear_kernel" if tokens > 2 else "{}_linear_kernel"
    portable = pytest.importorskip("gdn.ops.projection.portable")
    ours = dtype == torch.bfloat16 or tokens <= 2
    found = kernels(portable._GATED_RMS_NORM, *arguments.values(), 1e-5, True, False)[-1]
    assert found == (kind.format("gated_rms_norm") if ours else "norm_kernel")
    as_good_as_the_reference(gated_rms_norm_linear, "portable", arguments)
    arguments = Problem(name="", shape=(tokens, heads, width), M=20).build_swiglu(dtype=dtype, device=DEVICE)
    arguments = {"x": among(arguments["x"], 3, 5), "weight": among(arguments["weight"], 0, 0, rows=True)}
    assert kernels(portable._SWIGLU, *arguments.values(), False)[-1] == (kind.format("swiglu") if ours else "swiglu_kernel")
    as_good_as_the_reference(swiglu_linear, "portable", arguments)


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_smallest_eps_leaves_numbers(tokens: int) -> None:
    """In float32 it is 0, and the programs of a few tokens have heads that are none."""
    x = torch.ones(tokens, 3, 8, dtype=torch.bfloat16, device=DEVICE)
    with torch.no_grad(), use(gated_rms_norm_linear="portable"):
        y = gated_rms_norm_linear(x, 100 * x, x.new_ones(8), x.new_ones(5, 24), eps=1e-60)
    assert torch.equal(y, torch.full_like(y, 2400.0))


@pytest.mark.parametrize("call", ["swiglu", "norm"])
def test_what_goes_into_the_matrix_is_rounded_for_few_tokens_too(call: str) -> None:
    """Two numbers of it added up, so that it shows."""
    portable = pytest.importorskip("gdn.ops.projection.portable")
    problem = Problem(name="", shape=(2, 4, 16), M=32)
    arguments = (problem.build_swiglu if call == "swiglu" else problem.build_norm)(dtype=torch.float16, device=DEVICE)
    pairs = torch.eye(32, dtype=torch.float16, device=DEVICE).repeat_interleave(2, dim=1)
    with torch.no_grad():
        if call == "swiglu":
            y, before = portable.swiglu_linear(arguments["x"], pairs), portable._product(arguments["x"])
        else:
            rest = [arguments[name] for name in ("x", "gate", "norm_weight")]
            y = portable.gated_rms_norm_linear(*rest, pairs, 1e-5, True)
            before = portable._norm(*rest, 1e-5, True, False)[0].flatten(1)
    assert torch.equal(y, before.float().unflatten(1, (32, 2)).sum(2).half())


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
def test_products_of_the_user_s_are_not_replaced() -> None:
    portable = pytest.importorskip("gdn.ops.projection.portable")
    x, weight = torch.zeros(1, 96, dtype=torch.bfloat16), torch.zeros(10, 48, dtype=torch.bfloat16)
    products = torch.library.Library("aten", "IMPL")
    try:
        products.impl("mm", lambda a, b: a, "CUDA")
        for tokens in (1, 3):
            assert kernels(portable._SWIGLU, x.expand(tokens, 96).clone(), weight, False) == ["swiglu_kernel"]
    finally:
        products._destroy()
    assert kernels(portable._SWIGLU, x, weight, False) == ["swiglu_linear_kernel"]


def test_matches_torch() -> None:
    x, weight = build(swiglu_linear, PROBLEMS[0], torch.float64, "cpu").values()
    gate, up = x.chunk(2, dim=-1)
    for impl in ("torch", "reference"):
        with use(swiglu_linear=impl):
            torch.testing.assert_close(swiglu_linear(x, weight), F.linear(F.silu(gate) * up, weight))


@each
@pytest.mark.parametrize("impl", ["torch", "portable"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_keeps_its_arguments_and_at_most_one_number_a_head(call: Callable[..., Tensor], impl: str, compiled: bool) -> None:
    arguments = {name: t.requires_grad_() for name, t in build(call, PROBLEMS[0], torch.float32).items()}
    kept: dict[int, Tensor] = {}
    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    torch._dynamo.reset()
    with use(**{call.__name__: impl}), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        run(**arguments)
    for argument in arguments.values():
        kept.pop(argument.data_ptr(), None)
    assert sum(t.numel() for t in kept.values()) == (54 if call is gated_rms_norm_linear else 0)


@each
@pytest.mark.parametrize("impl", ["torch", "portable"])
def test_compiles_as_one_graph(call: Callable[..., Tensor], impl: str, as_good_as_the_reference: Check) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(call, impl, build(call, PROBLEMS[0], torch.float32), run=compiled)


@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_matrices_of_one_input(number: int, dtype: torch.dtype, compiled: bool, as_good_as_the_reference: Check) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 7, 12), "first": (9, 12), "second": (4, 12), "third": (1, 12)}
    arguments = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in list(shapes.items())[: 1 + number]
    }
    torch._dynamo.reset()
    run = torch.compile(parallel_linear, fullgraph=True, backend="aot_eager") if compiled else None
    as_good_as_the_reference(parallel_linear, "torch", arguments, run=run)


def test_a_matrix_whose_output_nobody_uses_gets_zeros() -> None:
    x, first, second = (torch.randn(3, 4, requires_grad=True) for _ in range(3))
    y, _ = parallel_linear(x, first, second)
    gradients = torch.autograd.grad(y.sum(), (x, first, second))
    torch.testing.assert_close(gradients, (first.sum(0).expand(3, 4), x.sum(0).expand(3, 4), torch.zeros(3, 4)))


@pytest.mark.parametrize("impl", ["torch", "portable"])
def test_two_backward_passes_agree(impl: str) -> None:
    arguments = {name: t.requires_grad_() for name, t in build(swiglu_linear, PROBLEMS[0], torch.float32).items()}
    with use(swiglu_linear=impl):
        y = swiglu_linear(**arguments)
    first, second = (torch.autograd.grad(y, list(arguments.values()), torch.ones_like(y), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    ("call", "change", "message"),
    [
        (swiglu_linear, {"x": torch.zeros(2, 24)}, r"x: expected \[..., 48\] to fit weight"),
        (swiglu_linear, {"weight": torch.zeros(10, 24, dtype=torch.float64)}, "weight: expected torch.float32 like x"),
        (gated_rms_norm_linear, {"weight": torch.zeros(10, 23)}, "weight: expected"),
        (gated_rms_norm_linear, {"gate": torch.zeros(2, 9, 24)}, "gate: expected"),
        (gated_rms_norm_linear, {"activation": "relu"}, 'activation: expected "silu" or "sigmoid"'),
        (gated_rms_norm_linear, {"eps": 0.0}, "eps: expected above 0"),
        (lambda **_: parallel_linear(torch.zeros(2, 3), torch.zeros(4, 3), None, torch.zeros(4, 3)), {}, "third: expected none without"),
        (lambda **_: parallel_linear(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4, 2)), {}, "second: expected"),
    ],
)
def test_wrong_arguments_are_named(call: Callable[..., Tensor], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        call(**{**build(call if call in BUILD else swiglu_linear, PROBLEMS[0], torch.float32, "cpu"), **change})
