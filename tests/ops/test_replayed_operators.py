"""Replayed calls of the operators that have Triton rows: the same bits as calls that run as written, forward, gradients and memories."""

from __future__ import annotations

import dataclasses
import functools
import gc
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import gpu
from torch import Tensor, _compile
from torch.autograd.graph import get_gradient_edge

pytest.importorskip("triton")

from gdn import ops
from gdn.core import checks, foresight, opaque, portable_launch, portable_plan, portable_product, replay, replay_known
from gdn.core.dispatch import use
from gdn.core.packing import Packing
from gdn.ops import loss as losses_of
from gdn.ops.attention import problems as attentions
from gdn.ops.delta_channel import problems as channels
from gdn.ops.delta_fused import GateParameters
from gdn.ops.delta_fused import problems as cores
from gdn.ops.delta_product import problems as products
from gdn.ops.delta_rule import problems as rules
from gdn.ops.delta_step import problems as steps
from gdn.ops.gates import problems as gates
from gdn.ops.linear_recurrence import problems as linears
from gdn.ops.linear_step import problems as linear_steps
from gdn.ops.loss import portable as loss_row
from gdn.ops.loss import problems as losses
from gdn.ops.norm import problems as norms
from gdn.ops.projection import problems as projections
from gdn.ops.qkv import problems as qkvs
from gdn.ops.rotary import problems as rotaries
from gdn.ops.short_conv import problems as convs
from gdn.ops.state_space import problems as spaces

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
Build = Callable[[int], dict[str, Any]]


def short(problems: Any, *names: str, make: str = "build", drop: tuple[str, ...] = ()) -> list[tuple[str, Build]]:
    """Named problems, or all, in bfloat16."""

    def builder(problem: Any) -> Build:
        def build(seed: int) -> dict[str, Any]:
            found = getattr(problem, make)(dtype=torch.bfloat16, device=DEVICE, seed=seed)
            return {name: value for name, value in found.items() if name not in drop}

        return build

    return [(problem.name, builder(problem)) for problem in problems.PROBLEMS if not names or problem.name in names]


def linear_step(kind: linears.Gates, *names: str) -> list[tuple[str, Build]]:
    problems = [problem for problem in linear_steps.PROBLEMS if problem.name in names]
    return [(p.name, lambda seed, p=p: p.build(kind, dtype=torch.bfloat16, device=DEVICE, seed=seed)) for p in problems]


def rule(name: str, **sizes: Any) -> tuple[str, Build]:
    return name, lambda seed: rules.Problem(name=name, **sizes).build(dtype=torch.bfloat16, device=DEVICE, seed=seed)


def product(name: str, n: int, **sizes: Any) -> tuple[str, Build]:
    tokens = rules.Problem(name="", HV=2, **sizes)
    return name, lambda seed: products.Problem(tokens=tokens, n=n).build(dtype=torch.bfloat16, device=DEVICE, seed=seed)


def channel(name: str, **sizes: Any) -> tuple[str, Build]:
    problem = channels.Problem(rule=rules.Problem(name="", **sizes))
    return name, lambda seed: problem.build(dtype=torch.bfloat16, device=DEVICE, seed=seed)


def linear(name: str, kind: linears.Gates, **sizes: Any) -> tuple[str, Build]:
    return name, lambda seed: linears.Problem(name="", **sizes).build(kind, dtype=torch.bfloat16, device=DEVICE, seed=seed)


def sigmoid(name: str, **sizes: Any) -> tuple[str, Build]:
    problem = attentions.Problem(name="", T=66, window=7, **sizes)
    return name, lambda seed: problem.build(slopes=True, dtype=torch.bfloat16, device=DEVICE, seed=seed)


CASES: dict[str, list[tuple[str, Build]]] = {
    "l2norm": short(norms, "heads", drop=("gate", "weight")),
    "rms_norm": short(norms, "heads", "one vector", drop=("gate",)),
    "add_rms_norm": short(norms, "heads", "zero vectors", make="build_add"),
    "gated_rms_norm": short(norms, "heads", "zero vectors"),
    "decay_gate": short(gates, "some", make="build_decay"),
    "write_gate": short(gates, "some", make="build_write"),
    "rotary_embedding": short(rotaries, "some"),
    "scale_heads": short(spaces, "groups, odd", make="build_scale"),
    "skip_gated_rms_norm": short(spaces, "groups, odd", make="build_norm"),
    "causal_conv1d": short(convs, "plain", "linear with bias and state", "one tap", "packed with state", "packed rows"),
    "gated_delta_step": short(steps, "grouped values", "pool, one skipped", "float16 memory in a pool"),
    "channel_delta_step": short(steps, "grouped values", "pool, one skipped", "bfloat16 memory", make="build_channel"),
    "gated_delta_product_step": short(steps, "grouped values", "pool, one skipped", "bfloat16 memory", make="build_product"),
    "linear_attention_step": linear_step("head", "grouped values", "pool, one skipped", "bfloat16 memory"),
    "gated_linear_attention_step": linear_step("key", "grouped values", "pool, one skipped"),
    "value_gated_linear_attention_step": linear_step("value", "grouped values", "pool, one skipped"),
    "gated_delta_rule": [
        rule("plain", B=2, T=70),
        rule("grouped", T=66, H=1, HV=2, K=16, V=24, initial=True),
        rule("packed", T=80, lengths=(1, 66, 0, 13), initial=True),
        rule("padded width", T=5, K=12, V=9, initial=True),
    ],
    "delta_core": [*short(cores, "packed"), *short(cores, "grouped values, negative eigenvalues, state")],
    "gated_delta_product": [product("plain", 2, B=2, T=33), product("initial", 3, T=40, initial=True)],
    "channel_delta_rule": [channel("plain", B=2, T=40), channel("packed", T=50, lengths=(1, 40, 0, 9), initial=True)],
    "linear_attention": [linear("initial", "head", T=66, HV=2, initial=True), linear("packed", "head", T=60, lengths=(7, 0, 53))],
    "gated_linear_attention": [linear("initial", "key", T=66, HV=2, initial=True), linear("packed", "key", T=60, lengths=(7, 0, 53))],
    "value_gated_linear_attention": [
        linear("initial", "value", T=66, H=2, HV=2, initial=True),
        linear("packed", "value", T=60, lengths=(7, 0, 53)),
    ],
    "convolved_qkv": short(qkvs)[:4],
    "swiglu_linear": short(projections, "two rows", "several blocks", "more than few rows", make="build_swiglu"),
    "gated_rms_norm_linear": short(projections, "two rows", "several blocks", "more than few rows", make="build_norm"),
    "windowed_sigmoid_attention": [sigmoid("plain"), sigmoid("packed", lengths=(60, 6))],
}


PARTLY = {
    "gated_delta_product": [product("packed", 3, T=30, lengths=(1, 24, 0, 5), initial=True)],
    "linear_attention": [linear("padded width", "head", T=5, K=12, V=9)],
    "linear_cross_entropy": short(losses)[:4],
}
"""Calls whose kernels are replayed, and what stands before them is not."""


@pytest.fixture(autouse=True)
def narrow_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for cuBLAS takes them on a CPU too."""
    monkeypatch.setattr(loss_row, "_takes_narrow", lambda device: True)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """With every tensor changed that may have a gradient."""
    if isinstance(value, dict):
        return {name: each if name in ("cos", "sin") else changed(each, change) for name, each in value.items()}
    if isinstance(value, GateParameters):
        return GateParameters(change(value.A_log), change(value.dt_bias), value.top)
    return change(value) if isinstance(value, Tensor) and value.dtype.is_floating_point else value


def tensors_of(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def run(name: str, build: Build, seed: int, gradient: str) -> list[Tensor]:
    """Results, gradients of all of them or of the first or last alone, and what is updated in place."""
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_(gradient != "none"))
        return leaves[-1]

    results = tensors_of(getattr(ops, name)(**changed(build(seed), leaf)))
    if gradient == "none":
        return results + leaves
    generator = torch.Generator().manual_seed(seed)
    chosen = results if gradient == "all" else results[:1] if gradient == "first" else results[-1:]
    slopes = [torch.randn(x.shape, generator=generator).to(x) for x in chosen]
    found = torch.autograd.grad(chosen, leaves, slopes, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in results] + list(found)


def gradients_of(name: str) -> tuple[str, ...]:
    """Of none, of all results, and of the last alone where there are several."""
    if name.endswith("_step"):
        return ("none",)
    several = (
        "add_rms_norm",
        "causal_conv1d",
        "gated_delta_rule",
        "gated_delta_product",
        "delta_core",
        "channel_delta_rule",
        "convolved_qkv",
    )
    return ("none", "all", "last") if name in several or name.endswith("linear_attention") else ("none", "all")


@pytest.mark.parametrize(
    ("name", "build", "gradient"),
    [
        pytest.param(n, b, g, id=f"{n}-{p}-{g}")
        for cases_of in (CASES, PARTLY)
        for n, cases in cases_of.items()
        for p, b in cases
        for g in gradients_of(n)
    ],
)
def test_replays_give_the_bits_of_calls_as_written(
    name: str, build: Build, gradient: str, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)  # as on a GPU, where no value is looked at
    monkeypatch.setattr(checks, "slots", lambda *arguments: None)
    with use(**{name: "portable", "gated_delta_rule": "portable"}):
        expected = []
        for seed in (1, 2):
            replay_known.forget()
            expected.append(run(name, build, seed, gradient))
        assert not replayed_here
        monkeypatch.setattr(opaque._Call, "_host", _not_again)
        monkeypatch.setattr(opaque._Call, "_backward_host", _not_again)
        for seed in (1, 2):
            replayed_here.clear()
            for actual, right in zip(run(name, build, seed, gradient), expected[seed - 1], strict=True):
                assert actual.dtype == right.dtype and actual.stride() == right.stride() and torch.equal(actual, right)
            assert replayed_here


@pytest.mark.parametrize("lengths", [None, (130, 200)])
@pytest.mark.parametrize("segment", [0, 2])
def test_segments_and_slabs_are_replayed(
    segment: int, lengths: tuple[int, ...] | None, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward of up to five kernels and a backward of up to ten and more, all with their buffers in two allocations."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: segment)
    monkeypatch.setattr(portable, "slab_chunks", lambda *sizes: 2)
    portable.plan.cache_clear()
    _, build = rule("", T=330, HV=2, initial=True, lengths=lengths)
    expected = []
    with use(gated_delta_rule="portable"):
        for seed in (1, 2):
            replay_known.forget()
            expected.append(run("gated_delta_rule", build, seed, "all"))
        assert not replayed_here
        for right, actual in zip(expected, [run("gated_delta_rule", build, seed, "all") for seed in (1, 2)], strict=True):
            assert all(torch.equal(a, b) for a, b in zip(actual, right, strict=True))
    portable.plan.cache_clear()
    assert len(replayed_here) >= 2 * 6


def test_products_of_few_tokens_are_replayed_while_torch_has_its_own(replayed_here: list[str]) -> None:
    """Not after a user has put another one in its place; and again when it is gone."""

    def kernels() -> list[str]:
        replayed_here.clear()
        x, weight = (torch.ones(shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((1, 96), (10, 48)))
        with torch.no_grad():
            y = ops.swiglu_linear(x, weight)
        torch.testing.assert_close(y, torch.full_like(y, 35.0), rtol=0.02, atol=0)
        return replayed_here.copy()

    with use(swiglu_linear="portable"):
        assert [kernels() for _ in range(3)] == [[], ["swiglu_linear_kernel"], ["swiglu_linear_kernel"]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(portable_product, "_OVERRIDES", {"aten/mm/CUDA"})
            assert [kernels() for _ in range(3)] == [[], ["swiglu_kernel"], ["swiglu_kernel"]]
        assert [kernels() for _ in range(2)] == [["swiglu_linear_kernel"], ["swiglu_linear_kernel"]]


def test_a_product_is_handed_to_the_driver_with_what_stands_around_it(replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    planned, plan = list[int](), replay.plan
    monkeypatch.setattr(replay, "plan", lambda launches, addresses: (planned.append(len(launches)), plan(launches, addresses))[1])
    x, weight = (torch.randn(shape, dtype=torch.bfloat16, device=DEVICE) for shape in ((256, 96), (16, 48)))
    with use(swiglu_linear="portable"), torch.no_grad():
        expected = ops.swiglu_linear(x, weight)
        assert torch.equal(ops.swiglu_linear(x, weight), expected)
    assert set(planned) == {2} and replayed_here == ["swiglu_kernel", "product"]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_loss_in_chunks_is_replayed(reduction: str, autocast: bool, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which all but the first add to the gradient of the matrix; of what torch has narrowed too."""
    monkeypatch.setattr(loss_row, "CHUNK_LOGITS", 8 * 40)
    monkeypatch.setattr(loss_row, "ROOMY", 2**62)
    generator = torch.Generator().manual_seed(0)

    def drawn() -> dict[str, Tensor]:
        x, weight = (torch.randn(shape, generator=generator).to(DEVICE, torch.bfloat16) for shape in ((20, 16), (40, 16)))
        x, weight = (x.float(), weight.float()) if autocast else (x, weight)
        return {"x": x, "weight": weight, "targets": torch.randint(40, (20,), generator=generator).to(DEVICE)}

    def train(arguments: dict[str, Tensor]) -> list[Tensor]:
        leaves = [arguments[name].requires_grad_() for name in ("x", "weight")]
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            loss = ops.linear_cross_entropy(**arguments, reduction=reduction)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, torch.full_like(loss, 0.5))]

    several = [drawn() for _ in range(3)]
    with use(linear_cross_entropy="portable"):
        expected = []
        for arguments in several:
            replay_known.forget()
            expected.append(train(arguments))
        assert not replayed_here
        monkeypatch.setattr(opaque._Call, "_host", _not_again)
        monkeypatch.setattr(opaque._Call, "_backward_host", _not_again)
        for arguments, right in zip(several, expected, strict=True):
            replayed_here.clear()
            assert all(torch.equal(a, b) for a, b in zip(train(arguments), right, strict=True))
            chunk = ["product", "softmax_kernel"]
            before, rest = (3 * chunk, []) if reduction == "none" else ([], ["total_kernel", "scale_kernel", "scale_kernel"])
            assert replayed_here == [*before, *3 * [*chunk, "product", "product"], *rest]


def test_the_loss_under_another_autocast_is_another_call(replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no signature has: the dtype of the products follows it. Each is replayed without checks and choice of a row."""
    x, weight = torch.randn(20, 16, device=DEVICE), torch.randn(40, 16, device=DEVICE)
    targets, settings = torch.arange(20, device=DEVICE), (None, torch.bfloat16, torch.float16, torch.bfloat16, None)

    def loss(dtype: torch.dtype | None) -> Tensor:
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            return ops.linear_cross_entropy(x, weight, targets)

    with use(linear_cross_entropy="portable"):
        expected = {}
        for dtype in settings:
            replay_known.forget()
            expected[dtype] = loss(dtype)
        assert torch.equal(expected[None], expected[torch.float16]) and not torch.equal(expected[None], expected[torch.bfloat16])
        replay_known.forget()
        for _ in range(3):
            replayed_here.clear()
            for dtype in settings:
                for _ in range(2):
                    assert torch.equal(loss(dtype), expected[dtype]), dtype
        assert replayed_here.count("total_kernel") == 2 * len(settings)
        monkeypatch.setattr(losses_of.OP, "pick", _not_again)
        for dtype in settings:
            assert torch.equal(loss(dtype), expected[dtype])


@pytest.mark.parametrize(
    ("name", "build"),
    [pytest.param(n, b, id=f"{n}-{p}") for cases_of in (CASES, PARTLY) for n, cases in cases_of.items() for p, b in cases],
)
def test_kernels_are_foreseen(name: str, build: Build, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first launch of each forward knows all compiled code that it and its backward will want, if what is usual has a gradient: the
    results, but not the last state of a sequence. Nothing in that imports torch's compiler, which takes a second."""
    launch, foreseen, wanted, files = portable_launch._launch, set[Any](), list[Any](), set[str]()

    def code(what: portable_launch.Launch) -> tuple[Any, ...]:
        return what._replace(kernel=compiler(what.kernel.fn)).name(-1)[0]

    def launched(what: portable_launch.Launch, grid: tuple[int, ...], device: int) -> Any:
        if not backward:
            before = sys.getprofile()
            sys.setprofile(lambda frame, *event: files.add(frame.f_code.co_filename))
            foreseen.update(code(each) for some in foresight.taken() for each in some)
            sys.setprofile(before)
        wanted.append(code(what))
        return launch(what, grid, device)

    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)
    monkeypatch.setattr(portable_launch, "_launch", launched)
    backward: list[bool] = []
    gradients = opaque._Call._backward_host
    monkeypatch.setattr(opaque._Call, "_backward_host", lambda *arguments: (backward.append(True), gradients(*arguments))[1])
    with use(**{name: "portable", "gated_delta_rule": "portable"}):
        run(name, build, 1, "none" if name.endswith("_step") else "all" if name == "add_rms_norm" else "first")
    assert wanted and bool(backward) != name.endswith("_step")
    assert name.endswith("_step") or foreseen == set(wanted)
    assert _compile.__file__ not in files


@functools.cache
def compiler(kernel: Any) -> Any:
    """What would compile a kernel, which in the interpreter knows nothing of its parameters."""
    from triton.runtime.jit import JITFunction

    return JITFunction(kernel)


def _not_again(*arguments: Any) -> Any:
    raise AssertionError("a host ran as written")


@pytest.mark.parametrize("name", CASES)
def test_operators_are_replayed_whole(name: str, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without their checks and without choosing a row, with gradients and without."""
    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)
    operator = getattr(ops, name)
    with use(**{name: "portable", "gated_delta_rule": "portable"}):
        for change in (Tensor.detach, lambda x: x.detach().requires_grad_(not name.endswith("_step"))):
            arguments = changed(CASES[name][0][1](1), change)
            operator(**arguments)
            with monkeypatch.context() as patch:
                patch.setattr(operator, "__wrapped__", _not_again)
                operator(**arguments)
        with torch.no_grad():  # of parameters
            operator(**arguments)
            with monkeypatch.context() as patch:
                patch.setattr(operator, "__wrapped__", _not_again)
                operator(**arguments)


@pytest.mark.parametrize("name", CASES)
def test_results_are_to_autograd_what_they_are_as_written(name: str, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Views, which may not be written to, or none."""
    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)
    with use(**{name: "portable", "gated_delta_rule": "portable"}):
        for gradient in (False, True)[: 1 if name.endswith("_step") else 2]:
            arguments = changed(CASES[name][0][1](1), lambda x, gradient=gradient: x.detach().requires_grad_(gradient))
            found = [[(x.requires_grad, x.is_leaf, x._is_view()) for x in tensors_of(getattr(ops, name)(**arguments))] for _ in range(3)]
            assert found[0] == found[1] == found[2]
    assert replayed_here


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("_step")])
def test_operators_are_replayed_in_inference_mode(name: str, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever comes first: a signature does not tell it from `no_grad`."""
    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)
    arguments = changed(CASES[name][0][1](1), Tensor.detach)
    with use(**{name: "portable", "gated_delta_rule": "portable"}), torch.inference_mode():
        first = tensors_of(getattr(ops, name)(**arguments))
        assert not replayed_here
        again = tensors_of(getattr(ops, name)(**arguments))
    assert replayed_here and all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", [name for name in CASES if not name.endswith("_step")])
def test_no_graph_of_autograd_outlives_a_call(name: str, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that is written down nor a replay: what accumulates gradients of a leaf is made anew by each call, on its stream."""
    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)  # as on a GPU, where no value is looked at
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_())
        return leaves[-1]

    arguments = changed(CASES[name][0][1](1), leaf)

    def in_use() -> bool:
        for x in leaves:
            get_gradient_edge(x).node.metadata["seen"] = True  # kept if somebody else holds the node
        return any("seen" in get_gradient_edge(x).node.metadata for x in leaves)

    def is_left() -> bool:
        """For a while, at most: the thread of a GPU's backward lets go of its last node a moment after it has said that it is done."""
        ends = time.monotonic() + 10
        while in_use() and time.monotonic() < ends:
            time.sleep(0.01)
        return not in_use()

    with use(**{name: "portable", "gated_delta_rule": "portable"}):
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                results = tensors_of(getattr(ops, name)(**arguments))
                assert in_use()
                torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results])
                del results
                assert is_left()
        finally:
            gc.enable()
    assert replayed_here


@gpu
@pytest.mark.parametrize("name", CASES)
def test_a_graph_captures_replays(name: str, replayed_here: list[str]) -> None:
    """Forward and backward, from memory of the graph's own, with the numbers that are there when it is launched."""
    build, gradient = CASES[name][0][1], "none" if name.endswith("_step") else "all"
    leaves: list[Tensor] = []

    def leaf(x: Tensor) -> Tensor:
        leaves.append(x.detach().clone().requires_grad_(gradient == "all"))
        return leaves[-1]

    arguments = changed(build(1), leaf)

    def call() -> list[Tensor]:
        results = tensors_of(getattr(ops, name)(**arguments))
        return results if gradient == "none" else list(torch.autograd.grad(results, leaves, [torch.ones_like(x) for x in results]))

    def start(seed: int) -> None:
        numbers: list[Tensor] = []
        changed(build(seed), lambda x: (numbers.append(x), x)[1])
        with torch.no_grad():
            for x, now in zip(leaves, numbers, strict=True):
                x.copy_(now)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        call()
    torch.cuda.current_stream().wait_stream(stream)
    assert replayed_here
    with torch.cuda.graph(graph):
        captured = call()
    for seed in (2, 3):
        start(seed)
        graph.replay()
        found = [x.detach().clone() for x in captured]
        start(seed)
        assert all(torch.equal(a, b) for a, b in zip(found, call(), strict=True))


@gpu
def test_what_is_forgotten_ends_no_capture(replayed_here: list[str]) -> None:
    x = torch.randn(8, 64, device=DEVICE)
    with use(l2norm="portable"):
        for _ in range(5):
            expected = ops.l2norm(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replay_known.forget()
            gc.collect()
            y = 2 * x
            z = ops.l2norm(y)
    graph.replay()
    torch.testing.assert_close(z, expected)


@gpu
def test_a_new_thread_replays(replayed_here: list[str]) -> None:
    """One that has not used the device before."""
    x = torch.randn(8, 64, device=DEVICE)
    found: list[Tensor] = []
    with use(l2norm="portable"):
        for _ in range(5):
            expected = ops.l2norm(x)
        replayed_here.clear()
        thread = threading.Thread(target=lambda: found.append(ops.l2norm(x)))
        thread.start()
        thread.join()
    assert replayed_here and torch.equal(found[0], expected)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(1, 2048, 2048), (4, 512, 72), (300, 200, 520), (3, 333, 77), (4096, 2048, 5632), (77, 1, 64), (5, 64, 1)], ids=str
)
def test_products_have_the_bits_of_torchs(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Of matrices as they are, turned and with gaps between rows, in one stream, in another and from another thread."""
    n, k, m = sizes
    normal = functools.partial(torch.randn, device=DEVICE, dtype=dtype)
    for a in (normal(n, k), normal(k, n).T, normal(n, k + 8)[:, :k], normal(n, k + 3)[:, :k]):
        for b in (normal(k, m), normal(m, k).T):
            made = portable_product.multiplied(a, b)
            assert made is not None, "cuBLAS is not asked"
            out, multiply = made
            expected = torch.mm(a, b)
            assert out.stride() == expected.stride() and torch.equal(out, expected)

            def again(a: Tensor = a, b: Tensor = b, out: Tensor = out, multiply: Any = multiply) -> None:
                out.zero_()
                multiply(a.data_ptr(), b.data_ptr(), out.data_ptr())

            with torch.cuda.stream(torch.cuda.Stream()):
                again()
            torch.cuda.synchronize()
            assert torch.equal(out, expected)
            thread = threading.Thread(target=again)
            thread.start()
            thread.join()
            torch.cuda.synchronize()
            assert torch.equal(out, expected)
            planned(multiply, a, b, out, expected)


def planned(multiply: Any, a: Tensor, b: Tensor, out: Tensor, expected: Tensor) -> int | None:
    """None if the multiplication cannot be part of a plan. Else it has the same bits there, whatever the addresses, in a graph and outside;
    and the bytes of its workspace."""

    def copied(x: Tensor, y: Tensor) -> Tensor:
        """x, as y lies in memory."""
        return torch.empty_strided(y.shape, y.stride(), dtype=y.dtype, device=DEVICE).copy_(x)

    before = copied(out, out)
    found = portable_product.nodes(multiply, a, b, out)
    assert torch.equal(out, before), "something was computed"
    assert torch.equal(torch.mm(a, b), torch.mm(a, b))
    if found is None:
        return None
    given = [(0, 0), (1, 0), (2, 0), (3, 0)][: 3 + (found.workspace > 0)]
    start = portable_plan.plan([(found, (), given)], len(given))
    assert start is not None
    for n in range(6):
        kept = torch.empty(1000 * n + 1, device=DEVICE)  # other addresses
        workspace = torch.full((found.workspace,), 255, dtype=torch.uint8, device=DEVICE)
        tensors = [copied(x, y) for x, y in ((a, a), (b, b), (before, out))]
        places = [x.data_ptr() for x in (*tensors, workspace)][: len(given)]
        stream = torch.cuda.current_stream() if n < 5 else torch.cuda.Stream()
        torch.cuda.synchronize()
        start(stream.cuda_stream, *places)
        torch.cuda.synchronize()
        assert torch.equal(tensors[2], expected), n
        del kept
    graph = torch.cuda.CUDAGraph()
    tensors[2].copy_(before)
    with torch.cuda.graph(graph):
        start(torch.cuda.current_stream().cuda_stream, *places)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(tensors[2], expected)
    return found.workspace


@gpu
def test_products_of_many_tokens_are_parts_of_plans() -> None:
    """Those of projections and of the head's loss: with and without workspace. On other GPUs than Hopper's, where cuBLAS has other kernels,
    they have the right bits if they are."""
    normal = functools.partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
    workspaces = list[int | None]()
    for n, k, m in ((512, 2048, 2048), (8192, 2048, 2048), (32768, 5632, 2048)):
        a, b = normal(n, k), normal(m, k).T
        made = portable_product.multiplied(a, b)
        assert made is not None
        workspaces.append(planned(made[1], a, b, made[0], torch.mm(a, b)))
    assert not HOPPER or (0 in workspaces and any(workspaces))
    for a, b in ((normal(8192, 2048), normal(32000, 2048).T), (normal(8192, 32000).T, normal(8192, 2048))):
        there = torch.randn(len(a), b.shape[1], device=DEVICE)
        for added in (True, False):
            out, theirs = there.clone(), there.clone()
            made = portable_product.multiplied(a, b, out, added=added)
            assert made is not None
            if added:
                torch.addmm(theirs, a, b, out_dtype=torch.float32, out=theirs)
                out.copy_(there)
            else:
                torch.mm(a, b, out_dtype=torch.float32, out=theirs)
            workspaces.append(planned(made[1], a, b, out, theirs))
    assert not (HOPPER and None in workspaces)


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(2, 2048, 2048), (300, 200, 520), (3, 333, 77), (2048, 4096, 1536), (77, 1, 64), (5, 64, 2)], ids=str)
def test_products_in_float32_have_the_bits_of_torchs(sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Written, and added to what is there, also where rows are parts of wider ones."""
    n, k, m = sizes
    for a in (torch.randn(n, k, device=DEVICE, dtype=dtype), torch.randn(k, n, device=DEVICE, dtype=dtype).T):
        b, there = torch.randn(m, k, device=DEVICE, dtype=dtype).T, torch.randn(n, m + 8, device=DEVICE)
        for columns in (m, m + 8):
            ours, theirs = (there.flatten()[: n * columns].clone().view(n, columns)[:, :m] for _ in range(2))
            for added in (True, False):
                made = portable_product.multiplied(a, b, ours, added=added)
                assert made is not None and made[0] is ours, "cuBLAS is not asked"
                if added:
                    torch.addmm(theirs, a, b, out_dtype=torch.float32, out=theirs)
                else:
                    torch.mm(a, b, out_dtype=torch.float32, out=theirs)
                assert torch.equal(ours, theirs)
                if added:
                    torch.addmm(theirs, a, b, out_dtype=torch.float32, out=theirs)
                planned(made[1], a, b, ours, theirs)


@gpu
def test_products_wait_for_the_current_stream(replayed_here: list[str]) -> None:
    stream = torch.cuda.Stream()
    x, weight = torch.randn(128, 256, device=DEVICE, dtype=torch.bfloat16), torch.randn(48, 128, device=DEVICE, dtype=torch.bfloat16)
    ops.swiglu_linear(x, weight)
    torch.cuda.synchronize()
    replayed_here.clear()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        x.copy_(2 * x)
        y = ops.swiglu_linear(x, weight)
    assert replayed_here
    stream.synchronize()
    assert torch.equal(y, ops.swiglu_linear(x.clone(), weight))


@gpu
def test_replays_run_on_the_current_stream(replayed_here: list[str]) -> None:
    x, stream = torch.randn(1024, 128, device=DEVICE), torch.cuda.Stream()
    for gradient in (False, True):
        leaf = x.clone().requires_grad_(gradient)
        ops.l2norm(leaf)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream), torch.no_grad():
            torch.cuda._sleep(100_000_000)
            leaf.copy_(3 * x + 1)
        with torch.cuda.stream(stream):
            y = ops.l2norm(leaf).detach()
        stream.synchronize()
        assert torch.equal(y, ops.l2norm(3 * x + 1))
    assert replayed_here


def test_parts_are_all_that_a_call_reads() -> None:
    gates = GateParameters(torch.zeros(1), torch.ones(1), 2.0)
    assert all(a is b for a, b in zip(gates.replay_parts(), vars(gates).values(), strict=True))
    read = {field.name for field in dataclasses.fields(Packing)} - {"host", "_rows", "_stretched"}
    packing = Packing.from_lengths([3, 4])
    assert {id(part) for part in packing.replay_parts()} == {id(getattr(packing, name)) for name in read}
