"""Linear attention with decay: the chunked rows against the float64 recurrence, and the promises of the three contracts."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import gpu
from torch import Tensor

from gdn import ops
from gdn.core.dispatch import Op, use
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.ops.linear_recurrence import GATED, LINEAR, VALUE_GATED, memory
from gdn.ops.linear_recurrence.problems import SMALL, Gates, Problem
from gdn.testing import compare

OPS: dict[Gates, Op] = {"head": LINEAR, "key": GATED, "value": VALUE_GATED}
TRITON = {gates: next(row.needs for row in op.impls if row.name == "portable") for gates, op in OPS.items()}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PROBLEMS = {problem.name: problem for problem in SMALL}

of_each_kind = pytest.mark.parametrize("gates", OPS)
Arguments = dict[str, Any]


@functools.cache
def reference(gates: Gates, name: str, dtype: torch.dtype) -> compare.Results:
    return compare.run(OPS[gates], "reference", PROBLEMS[name].build(gates, dtype=dtype))


def call(gates: Gates, arguments: Arguments, impl: str = "chunked") -> tuple[Tensor, Tensor]:
    with use(**{OPS[gates].name: impl}):
        return getattr(ops, OPS[gates].name)(**arguments)


def leaves(arguments: Arguments) -> list[Tensor]:
    return [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]


def gradients(outputs: tuple[Tensor, ...], arguments: Arguments) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves(arguments), compare.weights(outputs))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
@of_each_kind
def test_agrees_with_the_recurrence(gates: Gates, name: str, dtype: torch.dtype) -> None:
    rounding = reference(gates, name, torch.float32 if dtype == torch.float64 else dtype)
    actual = compare.run(OPS[gates], "chunked", PROBLEMS[name].build(gates, dtype=dtype))
    scale = compare.SCALED if dtype == torch.float64 else 1.0
    assert compare.complaints(actual, rounding, reference(gates, name, torch.float64), dtype, scale=scale) == []


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED: dict[Gates, tuple[list[str], list[str], tuple[int | None, ...]]] = {
    "head": (
        ["one token", "odd sizes", "packed", "empty documents", "forgets more strongly", "cleared"],
        ["chunk plus one", "packed and cleared"],
        (None, 1),
    ),
    "key": (["forgets more strongly"], ["cleared at boundaries"], (None,)),
    "value": (["forgets more strongly"], ["one chunk"], (None,)),
}
"""What Triton's interpreter, which is slow, runs: problems in float32, in bfloat16, and the chunks of a segment."""


def triton_cases() -> list[tuple[Gates, str, torch.dtype, int | None]]:
    """Kind of gates, problem, dtype and chunks of a segment (None: no segments)."""
    if DEVICE == "cuda":
        return [(g, name, dtype, segment) for g in OPS for name in PROBLEMS for dtype in TRITON[g].dtypes for segment in (None, 1)]
    cases: list[tuple[Gates, str, torch.dtype, int | None]] = []
    for gates, (single, half, segments) in INTERPRETED.items():
        for names, dtype in ((single, torch.float32), (half, torch.bfloat16)):
            cases.extend((gates, name, dtype, segment) for name in names for segment in segments)
    cases += [(gates, "short documents", torch.float32, 1) for gates in ("key", "value")]
    return [*cases, ("head", "forgets more strongly", torch.float16, None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@of_each_kind
def test_triton_is_chosen_by_itself_on_a_gpu(gates: Gates, device: str, dtype: torch.dtype) -> None:
    """Decay by channel not in float16, whose least number is too large for its gradients."""
    chosen = next(row.name for row in OPS[gates].explain(device, dtype, K=64, V=64) if row.reason is None)
    served = dtype != torch.float64 and (gates == "head" or dtype != torch.float16)
    assert chosen == ("portable" if device == "cuda" and served else "chunked")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("gates", "name", "dtype", "segment"), triton_cases(), ids=str)
def test_triton_agrees_with_the_recurrence(
    gates: Gates, name: str, dtype: torch.dtype, segment: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and gradients, without segments and cut into segments of one chunk."""
    plans = pytest.importorskip("gdn.ops.linear_recurrence.portable_plan")
    monkeypatch.setattr(plans, "segment_chunks", lambda *sizes: segment or 0)
    plans.plan.cache_clear()
    actual = compare.run(OPS[gates], "portable", PROBLEMS[name].build(gates, dtype=dtype, device=DEVICE))
    plans.plan.cache_clear()
    rounding, truth = reference(gates, name, dtype), reference(gates, name, torch.float64)
    assert compare.complaints(actual, rounding, truth, dtype) == []


@pytest.mark.usefixtures("poisoned_memory")
@of_each_kind
def test_triton_fills_memories_of_more_keys_than_values(gates: Gates) -> None:
    """Of several blocks of either, or turned."""
    problem = Problem(name="", T=66, H=2, HV=2, K=72, V=24, decay=0.01, initial=True)
    actual = compare.run(OPS[gates], "portable", problem.build(gates, dtype=torch.float32, device=DEVICE))
    rounding, truth = (compare.run(OPS[gates], "reference", problem.build(gates, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert compare.complaints(actual, rounding, truth, torch.float32) == []


@pytest.mark.usefixtures("poisoned_memory")
@of_each_kind
def test_triton_hands_nothing_on_past_a_boundary_inside_a_segment(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second segment of four holds a boundary; the third lies inside a document and hands on what enters it."""
    plans = pytest.importorskip("gdn.ops.linear_recurrence.portable_plan")
    monkeypatch.setattr(plans, "segment_chunks", lambda *sizes: 2)
    plans.plan.cache_clear()
    problem = Problem(name="", T=322, K=8, V=8, lengths=(129, 193), decay=0.01, initial=True)
    actual = compare.run(OPS[gates], "portable", problem.build(gates, dtype=torch.float32, device=DEVICE))
    plans.plan.cache_clear()
    rounding, truth = (compare.run(OPS[gates], "reference", problem.build(gates, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert compare.complaints(actual, rounding, truth, torch.float32) == []


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_triton_divides_a_group_of_value_heads_among_programs(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = pytest.importorskip("gdn.ops.linear_recurrence.portable_plan")
    assert [plans.group_parts(*sizes) for sizes in ((1024, 32, 132), (128, 32, 132), (2, 6, 132))] == [1, 4, 6]
    monkeypatch.setattr(plans, "group_parts", lambda *sizes: parts)
    plans.plan.cache_clear()
    problem = Problem(name="", T=67, H=1, HV=3, K=8, V=8, initial=True)
    actual = compare.run(LINEAR, "portable", problem.build("head", dtype=torch.float32, device=DEVICE))
    plans.plan.cache_clear()
    rounding, truth = (compare.run(LINEAR, "reference", problem.build("head", dtype=dtype)) for dtype in (torch.float32, torch.float64))
    assert compare.complaints(actual, rounding, truth, torch.float32) == []


@pytest.mark.usefixtures("poisoned_memory")
@of_each_kind
def test_triton_takes_views_one_result_and_no_tokens(gates: Gates) -> None:
    problem = Problem(name="", T=9, HV=2, K=8, V=8, initial=True)
    arguments = problem.build(gates, dtype=torch.float32, device=DEVICE)
    expected = torch.autograd.grad(call(gates, arguments, "portable")[1].square().sum(), leaves(arguments), materialize_grads=True)
    views = {name: torch.cat([x, x], 2)[:, :, : x.shape[2]] if x.ndim == 4 and name in "qkv" else x for name, x in arguments.items()}
    assert not views["v"].is_contiguous()
    found = torch.autograd.grad(call(gates, views, "portable")[1].square().sum(), leaves(arguments), materialize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not found[0].any() and bool(found[1].any())  # the final memory does not depend on queries
    none = {name: x[:, :0] if name in "qkvg" else x for name, x in arguments.items()}
    o, state = call(gates, none, "portable")
    assert list(o.shape) == [1, 0, 2, 8] and torch.equal(state, arguments["initial_state"])
    assert torch.equal(torch.autograd.grad(state.sum(), arguments["initial_state"])[0], torch.ones_like(state))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("width", [16, 64, 128, 256])
def test_triton_takes_four_warps_for_products_of_64_rows(width: int, wide: bool) -> None:
    """With eight, Triton 3.6 lets the second four read beyond shared memory (notes/triton_pipelines.md). No interpreter sees that."""
    table = pytest.importorskip("gdn.ops.linear_recurrence.portable_plan").launches(width, wide)
    rows = ("output", "gradient", "channels", "channel output", "channel read", "channel gradient", "other gradient")
    assert all(table[name].warps == 4 for name in rows)
    assert table["states"].warps * 16 <= max(64, width)


@pytest.mark.parametrize("width", [5, 16, 32, 64, 200])
def test_triton_takes_tiles_of_128_bytes_in_16_bits(width: int) -> None:
    """Tiles with narrower rows beside them made ptxas 12.8 read elsewhere (notes/triton_pipelines.md). No interpreter sees that."""
    plans = pytest.importorskip("gdn.ops.linear_recurrence.portable_plan")
    made = plans.plan(1, 64, 1, 1, 1, 1, width, width, False, False, 132)
    assert max(64, width) <= made.BK and all(
        launch.block >= 64 for name, launch in made.launches.items() if name not in ("gates", "between", "handover")
    )


@of_each_kind
def test_triton_gives_log_decays_below_the_smallest_no_gradient(gates: Gates) -> None:
    arguments = Problem(name="", T=2, K=8, V=8, initial=True).build(gates, dtype=torch.float32, device=DEVICE)
    for g, some in ((-60.0, True), (-100.0, False)):
        arguments["g"] = torch.full_like(arguments["g"], g).requires_grad_()
        found = torch.autograd.grad(call(gates, arguments, "portable")[0].sum(), arguments["g"])[0]
        assert bool(found.any()) == some


@of_each_kind
def test_triton_takes_gradients_with_any_stride_over_one_token(gates: Gates) -> None:
    arguments = Problem(name="", B=2, T=1, K=8, V=8).build(gates, dtype=torch.float32, device=DEVICE)
    o, _ = call(gates, arguments, "portable")
    weight = torch.randn(2, 3, 1, 8, device=o.device)[:, :1].contiguous()
    odd = weight.as_strided(weight.shape, (8, 1000, 8, 1))
    assert odd.is_contiguous() and odd.stride(1) == 1000
    found, expected = (torch.autograd.grad(o, leaves(arguments), w, retain_graph=True) for w in (odd, weight))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


@of_each_kind
def test_triton_compiles_as_one_graph(gates: Gates) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(getattr(ops, OPS[gates].name), fullgraph=True, backend="aot_eager")
    for T in (5, 7):  # the second length is a symbol of the graph
        arguments = Problem(name="", T=T, K=8, V=8, lengths=(3, T - 3)).build(gates, dtype=torch.float32, device=DEVICE)
        expected = gradients(call(gates, arguments, "portable"), arguments)
        with use(**{OPS[gates].name: "portable"}):
            found = gradients(compiled(**arguments), arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


WIDTHS = [
    (1, 2, 16, 32),
    (1, 1, 40, 24),
    (2, 2, 64, 64),
    (1, 32, 128, 64),
    (2, 2, 128, 256),
    (1, 1, 200, 400),
    (1, 1, 256, 64),
    (1, 1, 256, 512),
    (1, 1, 512, 256),
]
"""Heads of queries and of values, K and V."""


def takes(gates: Gates, K: int, V: int) -> bool:
    """Whether the Triton row serves these widths: the channels that decay, and keys of one decay per head, are at most 256."""
    dims = TRITON[gates].dims
    return all(size in dims.get(name, (size,)) for name, size in (("K", K), ("V", V)))


@gpu
@pytest.mark.parametrize(("gates", "H", "HV", "K", "V"), [(gates, *sizes) for gates in OPS for sizes in WIDTHS if takes(gates, *sizes[2:])])
def test_triton_head_widths(gates: Gates, H: int, HV: int, K: int, V: int) -> None:
    """With decay for each channel, blocks of 64 channels have the line of https://github.com/fla-org/flash-linear-attention/issues/640,
    wrong on Hopper elsewhere, but for masks (test_turned_products.py)."""
    problem = Problem(name="", T=300, H=H, HV=HV, K=K, V=V, initial=True, lengths=(130, 0, 170))
    truth = compare.run(OPS[gates], "reference", problem.build(gates))
    for dtype in TRITON[gates].dtypes:
        rounding = compare.run(OPS[gates], "reference", problem.build(gates, dtype=dtype))
        actual, again = (compare.run(OPS[gates], "portable", problem.build(gates, dtype=dtype, device="cuda")) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(actual.tensors, again.tensors)), "another run gave other bits"
        assert compare.complaints(actual, rounding, truth, dtype) == []


@gpu
@of_each_kind
def test_triton_works_under_a_graph_and_the_default_compiler(gates: Gates) -> None:
    arguments = Problem(name="", T=200, H=1, HV=2, K=64, V=64, lengths=(130, 70)).build(gates, dtype=torch.bfloat16, device="cuda")
    operator = getattr(ops, OPS[gates].name)
    with use(**{OPS[gates].name: "portable"}):
        expected = gradients(operator(**arguments), arguments)
        found = gradients(torch.compile(operator, fullgraph=True)(**arguments), arguments)
        with torch.no_grad():
            plain, graph = operator(**arguments), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = operator(**arguments)
            graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(torch.equal(a, b) for a, b in zip(plain, captured))


@of_each_kind
def test_several_blocks_and_segments_agree_with_the_recurrence(gates: Gates, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two sequences and segments of two chunks: memories are saved and handed on."""
    monkeypatch.setattr(memory, "BLOCK_ELEMENTS", 2 * 2 * 5 * 3)
    monkeypatch.setattr(memory, "SEGMENT_ELEMENTS", 1)
    problem = Problem(name="", T=272, H=1, HV=2, K=5, V=3, lengths=(130, 32, 70, 0, 40), decay=0.02, initial=True)
    actual, expected = (problem.build(gates) for _ in range(2))
    a, b = call(gates, actual), call(gates, expected, "reference")
    close(a, b)
    close(gradients(a, actual), gradients(b, expected))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@of_each_kind
def test_dtypes_of_the_results(gates: Gates, impl: str, dtype: torch.dtype) -> None:
    o, state = call(gates, Problem(name="", T=3, HV=2, V=5).build(gates, dtype=dtype), impl)
    assert (o.dtype, list(o.shape)) == (dtype, [1, 3, 2, 5])
    assert (state.dtype, list(state.shape)) == (torch.float64 if dtype == torch.float64 else torch.float32, [1, 2, 16, 5])
    assert o.is_contiguous() and state.is_contiguous()


@of_each_kind
def test_no_sequences_compile_with_a_gradient_of_the_state(gates: Gates) -> None:
    """A registered operator must not return an argument of its own."""
    pytest.importorskip("triton")
    arguments = Problem(name="", T=5, B=0, initial=True).build(gates, dtype=torch.float32, device=DEVICE)
    operator = OPS[gates].name
    with use(**{operator: "portable"}):
        _, final = torch.compile(getattr(ops, operator), fullgraph=True, backend="aot_eager")(**arguments)
    assert torch.autograd.grad(final.sum(), [arguments["initial_state"]])[0].shape == final.shape


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@of_each_kind
def test_no_tokens_hand_the_state_through(gates: Gates, impl: str) -> None:
    arguments = Problem(name="", T=0, B=2, HV=2, initial=True).build(gates)
    o, state = call(gates, arguments, impl)
    assert list(o.shape) == [2, 0, 2, 16]
    close(state, arguments["initial_state"])
    close(torch.autograd.grad(state.sum(), arguments["initial_state"])[0], torch.ones_like(state))


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("lengths", [None, ()])
@of_each_kind
def test_no_sequences(gates: Gates, impl: str, lengths: tuple[int, ...] | None) -> None:
    B, T = (0, 3) if lengths is None else (1, 0)
    o, state = call(gates, Problem(name="", B=B, T=T, lengths=lengths, initial=True).build(gates, dtype=torch.bfloat16), impl)
    assert (list(o.shape), o.dtype, list(state.shape), state.dtype) == ([B, T, 1, 16], torch.bfloat16, [0, 1, 16, 16], torch.float32)


@pytest.mark.parametrize("decay", [1e2, 1e4, 1e30, float("inf")])
@of_each_kind
def test_memory_that_forgets_everything_is_finite(gates: Gates, decay: float) -> None:
    arguments = Problem(name="", T=130, initial=True).build(gates, dtype=torch.float32)
    arguments["g"] = torch.full_like(arguments["g"], -decay).requires_grad_()
    outputs = call(gates, arguments)
    q, k, v = (arguments[name].double() for name in ("q", "k", "v"))
    torch.testing.assert_close(outputs[0].double(), 0.25 * (q * k).sum(-1, keepdim=True) * v, rtol=1e-5, atol=1e-5)
    assert all(bool(gradient.isfinite().all()) for gradient in gradients(outputs, arguments))
    assert not torch.autograd.grad(call(gates, arguments)[0].sum(), arguments["g"])[0].any()


@of_each_kind
def test_log_decays_below_the_smallest_act_as_it(gates: Gates) -> None:
    arguments = Problem(name="", T=1, initial=True).build(gates, gradient=False)
    results = []
    for g in (-64.0, -100.0, -torch.inf):
        o, state = call(gates, {**arguments, "k": 0 * arguments["k"], "g": torch.full_like(arguments["g"], g)})
        assert bool(state.any())
        results.append((o, state))
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0]))


@of_each_kind
def test_small_decays_after_large_ones_keep_their_digits(gates: Gates) -> None:
    """Channels that were cleared remember what came after; a running sum of log decays in float32 would have lost it."""
    arguments = Problem(name="", T=64, initial=True).build(gates)
    g = arguments["g"].detach().clone() / 100
    g[:, :24] = -60
    found = {}
    for dtype in (torch.float64, torch.float32):
        cast_ = {name: x.detach().to(dtype).requires_grad_() for name, x in {**arguments, "g": g.float()}.items()}
        outputs = call(gates, cast_, "reference" if dtype == torch.float64 else "chunked")
        found[dtype] = [x.detach().double() for x in (*outputs, *gradients(outputs, cast_))][:-1]  # the initial state is forgotten
    for exact, actual in zip(*found.values()):
        assert compare.error(actual, exact) < 1e-6


def test_equal_decays_of_all_channels_are_one_decay() -> None:
    arguments = Problem(name="", B=2, T=70, H=2, HV=4, K=6, V=5, initial=True).build("head", gradient=False)
    expected = call("head", arguments)
    per_key = arguments["g"][:, :, ::2]
    shared = {**arguments, "g": per_key.repeat_interleave(2, 2)}
    close(call("key", {**arguments, "g": per_key.unsqueeze(-1).expand(-1, -1, -1, 6)}), call("head", shared))
    close(call("value", {**arguments, "g": arguments["g"].unsqueeze(-1).expand(-1, -1, -1, 5)}), expected)


@of_each_kind
def test_gradients_agree_with_finite_differences(gates: Gates) -> None:
    for problem in (
        Problem(name="", T=5, B=2, H=1, HV=2, K=2, V=3, lengths=(2, 0, 3, 5), initial=True),
        Problem(name="", T=35, K=2, V=2, initial=True),
    ):
        arguments = problem.build(gates)
        packing = arguments.pop("packing", None)
        arguments["g"] = (arguments["g"].detach() - 0.05).requires_grad_()  # differences must not cross zero
        names = list(arguments)

        def function(*tensors: Tensor, names: list[str] = names, packing: Packing | None = packing) -> tuple[Tensor, Tensor]:
            return call(gates, {**dict(zip(names, tensors)), "packing": packing})

        assert torch.autograd.gradcheck(function, tuple(arguments.values()), fast_mode=True)


@pytest.mark.parametrize("use_o, use_state", [(True, False), (False, True)])
@of_each_kind
def test_one_result_alone_has_its_gradient(gates: Gates, use_o: bool, use_state: bool) -> None:
    def result(impl: str) -> tuple[Tensor, ...]:
        arguments = PROBLEMS["packed"].build(gates)
        o, state = call(gates, arguments, impl)
        return torch.autograd.grad((o if use_o else state).square().sum(), leaves(arguments), materialize_grads=True)

    close(result("chunked"), result("reference"))


@pytest.mark.parametrize("name", ["chunk plus one", "packed"])
@of_each_kind
def test_compiled_equals_eager(gates: Gates, name: str) -> None:
    def function(arguments: Arguments) -> tuple[Tensor, ...]:
        return tuple(x + 1 for x in getattr(ops, OPS[gates].name)(**{**arguments, "q": 2 * arguments["q"]}))

    torch._dynamo.reset()
    eager, compiled = PROBLEMS[name].build(gates), PROBLEMS[name].build(gates)
    expected = function(eager)
    actual = torch.compile(function, fullgraph=True, backend="aot_eager")(compiled)
    close(actual, expected)
    close(gradients(actual, compiled), gradients(expected, eager))


@functools.cache
def long_call(gates: Gates) -> tuple[Arguments, tuple[Tensor, Tensor]]:
    arguments = Problem(name="", T=100, H=1, HV=2, K=4, V=3, initial=True).build(gates, gradient=False)
    return arguments, call(gates, arguments, "reference")


@of_each_kind
@settings(max_examples=15, deadline=None, database=None)
@given(cuts=st.lists(st.integers(0, 100), max_size=4))
def test_a_split_anywhere_gives_the_same(gates: Gates, cuts: list[int]) -> None:
    arguments, (o, final) = long_call(gates)
    state, outputs = arguments["initial_state"], []
    for begin, end in itertools.pairwise([0, *sorted(cuts), 100]):
        piece = {name: x[:, begin:end] for name, x in arguments.items() if name != "initial_state"}
        part, state = call(gates, {**piece, "initial_state": state})
        outputs.append(part)
    close(torch.cat(outputs, dim=1), o)
    close(state, final)


@of_each_kind
@settings(max_examples=10, deadline=None, database=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 31, 63, 64, 65]), min_size=1, max_size=4))
def test_packed_equals_separate(gates: Gates, lengths: list[int]) -> None:
    problem = Problem(name="", T=sum(lengths), HV=2, K=4, V=3, lengths=tuple(lengths), initial=True)
    packed, whole = problem.build(gates), problem.build(gates)
    outputs, states, begin = [], [], 0
    for i, length in enumerate(lengths):
        piece = {name: whole[name][:, begin : begin + length] for name in ("q", "k", "v", "g")}
        o, state = call(gates, {**piece, "initial_state": whole["initial_state"][i : i + 1]})
        outputs.append(o)
        states.append(state)
        begin += length
    separate = torch.cat(outputs, dim=1), torch.cat(states)
    together = call(gates, packed)
    close(together, separate)
    close(gradients(together, packed), gradients(separate, whole))


@of_each_kind
def test_the_future_does_not_matter(gates: Gates) -> None:
    arguments = Problem(name="", T=90, B=2).build(gates, dtype=torch.float32, gradient=False)
    changed = {name: torch.cat([x[:, :50], x[:, 50:].flip(1)], 1) for name, x in arguments.items()}
    assert torch.equal(call(gates, arguments)[0][:, :50], call(gates, changed)[0][:, :50])


@of_each_kind
def test_every_run_gives_the_same_bits_and_leaves_its_arguments_alone(gates: Gates) -> None:
    runs, before = [], PROBLEMS["packed"].build(gates, dtype=torch.float32)
    arguments = PROBLEMS["packed"].build(gates, dtype=torch.float32)
    for _ in range(2):
        outputs = call(gates, arguments)
        runs.append((*outputs, *gradients(outputs, arguments)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert all(torch.equal(x, before[name]) for name, x in arguments.items() if isinstance(x, Tensor))


@of_each_kind
def test_strides_do_not_matter(gates: Gates) -> None:
    arguments = PROBLEMS["grouped values"].build(gates)
    strided = {name: x.detach().mT.contiguous().mT.requires_grad_() for name, x in arguments.items()}
    a, b = call(gates, arguments), call(gates, strided)
    close((*b, *gradients(b, strided)), (*a, *gradients(a, arguments)))


@pytest.mark.parametrize("name", ["batch of several chunks", "packed", "empty documents", "odd sizes", "one token"])
@of_each_kind
def test_uninitialised_memory_is_not_read(gates: Gates, name: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills the memory of torch.empty and its relatives with NaN
    try:
        assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
        actual = compare.run(OPS[gates], "chunked", PROBLEMS[name].build(gates, dtype=torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    found = reference(gates, name, torch.float32), reference(gates, name, torch.float64)
    assert compare.complaints(actual, *found, torch.float32) == []


def saved_bytes(gates: Gates, length: int) -> tuple[int, int]:
    """Bytes of the arguments, and of all memory that autograd keeps for the backward pass."""
    arguments = Problem(name="", T=length, H=2, HV=2, K=64, V=64).build(gates, dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = call(gates, arguments)
    assert outputs[0].requires_grad
    return sum(x.nbytes for x in leaves(arguments)), sum(kept.values())


@of_each_kind
def test_memory_grows_with_the_length_and_holds_no_state_per_token(gates: Gates) -> None:
    inputs, once = saved_bytes(gates, 1024)
    twice = saved_bytes(gates, 2048)[1]
    assert 1.8 * once < twice < 2.2 * once
    assert once < 1.5 * inputs  # a state for each token would be more than 20 times the inputs


@of_each_kind
def test_nothing_is_kept_without_gradients(gates: Gates) -> None:
    with torch.no_grad():
        assert not call(gates, PROBLEMS["packed"].build(gates))[0].requires_grad


def change(**changes: Callable[[Arguments], Any]) -> Callable[[Arguments], Arguments]:
    return lambda arguments: {**arguments, **{name: make(arguments) for name, make in changes.items()}}


WRONG: dict[str, tuple[Gates, Callable[[Arguments], Arguments], str]] = {
    "too few dimensions": ("head", change(q=lambda a: a["q"][0]), r"q: expected 4 dimensions \[B, T, H, K\], got \[6, 2, 16\]"),
    "gate with a width": ("head", change(g=lambda a: a["v"]), r"g: expected 3 dimensions \[B, T, HV\], got \[2, 6, 4, 5\]"),
    "gate without a width": ("key", change(g=lambda a: a["g"][..., 0]), r"g: expected 4 dimensions \[B, T, H, K\], got \[2, 6, 2\]"),
    "gate of the values": ("key", change(g=lambda a: -(a["v"] ** 2)), r"g: expected \[B=2, T=6, H=2, K=16\], got \[2, 6, 4, 5\]"),
    "gate of the keys": ("value", change(g=lambda a: -(a["k"] ** 2)), r"g: expected \[B=2, T=6, HV=4, V=5\], got \[2, 6, 2, 16\]"),
    "another length": ("key", change(k=lambda a: a["k"][:, :5]), r"k: expected \[B=2, T=6, H=2, K=16\], got \[2, 5, 2, 16\]"),
    "no multiple": (
        "head",
        lambda a: {**a, "v": a["v"][:, :, :3], "g": a["g"][:, :, :3]},
        r"v: expected a multiple of 2 value heads .*, got 3",
    ),
    "dtypes differ": ("value", change(v=lambda a: a["v"].double()), r"v: expected torch.float32 like q, got torch.float64"),
    "integer gate": ("head", change(g=lambda a: a["g"].long()), r"g: expected a floating dtype, got torch.int64"),
    "devices differ": ("key", change(k=lambda a: a["k"].to("meta")), r"k: expected on cpu like q, got meta"),
    "positive decay": ("value", change(g=lambda a: 0.5 - a["g"]), r"g: expected a log decay, so at most 0 everywhere, got \d"),
    "packing of another total": ("head", change(packing=lambda a: Packing.from_lengths([6, 7])), r"packing: describes 13 tokens, .* 2 x 6"),
    "state of another batch": (
        "key",
        change(initial_state=lambda a: a["initial_state"][:1]),
        r"initial_state: expected \[N=2, HV=4, K=16, V=5\], got \[1, 4, 16, 5\]",
    ),
    "state in low precision": (
        "value",
        change(initial_state=lambda a: a["initial_state"].bfloat16()),
        r"initial_state: expected torch.float32, got torch.bfloat16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    gates, spoil, message = WRONG[case]
    problem = Problem(name="", B=2, T=6, H=2, HV=4, V=5, initial=True)
    arguments = problem.build(gates, dtype=torch.float32, gradient=False)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        cast(Any, getattr(ops, OPS[gates].name))(**spoil(arguments))
