"""The gated delta rule: every row that runs on the CPU against the float64 recurrence, and the promises of the contract."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from on_gpu import gpu
from textbook import textbook_chunks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdn.core import device as hardware
from gdn.core.dispatch import Impl, use
from gdn.core.errors import ArgumentError
from gdn.core.packing import CHUNK, Packing
from gdn.ops import gated_delta_rule
from gdn.ops.delta_rule import OP, chunked, scan
from gdn.ops.delta_rule.problems import SMALL, Problem
from gdn.testing import bench, compare

ROWS = [verdict.name for verdict in OP.explain("cpu", K=16, V=16) if verdict.reason is None]
FAST = [name for name in ROWS if name != "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
PROBLEMS = {problem.name: problem for problem in (*SMALL, Problem(name="wide heads", T=70, K=136, V=128, initial=True))}

in_rows = pytest.mark.parametrize("impl", FAST)


@functools.cache
def reference(name: str, dtype: torch.dtype, seed: int = 0) -> compare.Results:
    return compare.run(OP, "reference", PROBLEMS[name].build(dtype=dtype, seed=seed))


def call(impl: str, arguments: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with use(gated_delta_rule=impl):
        return gated_delta_rule(**arguments)


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]


def gradients(outputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves(arguments), compare.weights(outputs))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


OP._functions["textbook"] = textbook_chunks
OP._functions["narrow textbook"] = functools.partial(textbook_chunks, narrow=True)


@functools.cache
def plain_torch(problem: Problem, dtype: torch.dtype, impl: str = "textbook", seed: int = 0) -> compare.Results:
    """The textbook chunks at a dtype, through the contract."""
    before = OP.impls
    OP.impls = (*before, Impl(impl, ""))
    try:
        return compare.run(OP, impl, problem.build(dtype=dtype, seed=seed))
    finally:
        OP.impls = before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
@in_rows
def test_agrees_with_the_recurrence(impl: str, name: str, dtype: torch.dtype) -> None:
    """At most twice as wrong as plain torch at this dtype: the recurrence, or for rows that work in chunks the textbook's chunks."""
    rounding = reference(name, torch.float32 if dtype == torch.float64 else dtype)
    truth, actual = reference(name, torch.float64), compare.run(OP, impl, PROBLEMS[name].build(dtype=dtype))
    wrong = compare.complaints(actual, rounding, truth, dtype, scale=compare.SCALED if dtype == torch.float64 else 1.0)
    if wrong and impl == "chunked":
        wrong = compare.complaints(actual, plain_torch(PROBLEMS[name], dtype), truth, dtype)
    assert wrong == []


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = (
    ["one token", "odd sizes", "packed", "empty documents", "cleared", "repeated keys at full strength", "long keys"],
    ["chunk plus one", "repeated keys at full strength", "wide heads"],
)
"""The problems that Triton's interpreter, which is slow, runs in float32 and in bfloat16."""
TRITON = (
    [(name, dtype) for name in PROBLEMS for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    if DEVICE == "cuda"
    else [(name, dtype) for names, dtype in zip(INTERPRETED, (torch.float32, torch.bfloat16)) for name in names]
)


NEVER_CONTRACTS = "repeated keys at full strength"
"""Where a key repeats with beta = 2 memory never contracts, and one draw's rounding grows to three times another's: SEEDS draws count."""
SEEDS = 4
PARTS = {"whole": (None, None), "segments": (1, None), "slabs": (None, 1), "slabs of segments": (3, 2)}
"""Chunks of a segment, and of a slab of the backward; None for what the rule says, which is one for sizes as small as these."""

ARITHMETIC = ("repeated keys at full strength", "cleared", "long keys")
"""Problems of arithmetic, not of places: slabs move buffers only, so the interpreter is spared these in slabs. A GPU runs them all."""
CASES = [
    (parts, name, dtype) for parts in PARTS for name, dtype in TRITON if DEVICE == "cuda" or not ("slabs" in parts and name in ARITHMETIC)
]


DOUBLED = Problem(name="", T=192, HV=2, K=32, V=32, decay=0.01, top=2.0, full=True, keys="correlated", initial=True)


def test_triton_is_half_as_wrong_as_the_textbook_where_rounding_grows() -> None:
    """Little decays, keys are correlated and beta is 2: the solved pairs have many entries of about 1, and their rounding is most of all
    errors. The textbook rounds the operands of its products as well; not those of its backward, which for g, where large numbers cancel,
    no kernel of 16 bits can match. Operands of 8 bits in the solve alone, of either kind, pass the half."""
    pytest.importorskip("triton")
    actual, narrow, truth = [], [], []
    before = OP.impls
    for seed in range(SEEDS):
        actual.append(compare.run(OP, "portable", DOUBLED.build(dtype=torch.bfloat16, device=DEVICE, seed=seed)))
        OP.impls = (*before, Impl("narrow textbook", ""))
        try:
            narrow.append(compare.run(OP, "narrow textbook", DOUBLED.build(dtype=torch.bfloat16, seed=seed)))
        finally:
            OP.impls = before
        truth.append(compare.run(OP, "reference", DOUBLED.build(seed=seed)))
    ours, theirs, true = (compare.pool(each) for each in (actual, narrow, truth))
    worse = {n: (compare.error(ours[n], true[n]), compare.error(theirs[n], true[n])) for n in true.names if n != "g"}
    assert {name: errors for name, errors in worse.items() if not errors[0] <= errors[1] / 2} == {}


@pytest.mark.parametrize("segment", [None, 1])
@pytest.mark.parametrize(("values", "gradients_", "keys"), [(40, -60, 0), (-40, 20, 0), (0, 0, 9), (0, 0, -9)])
def test_triton_takes_numbers_of_any_size(
    values: int, gradients_: int, keys: int, segment: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values, what comes back, and keys times powers of two give the same bits times powers of two, though products inside take fp16."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    if segment is not None:
        monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: segment)
    portable.plan.cache_clear()
    found = []
    for v, back, k in ((0, 0, 0), (values, gradients_, keys)):
        powers = {"q": k, "k": k, "v": v, "g": 0, "beta": -2 * k, "initial_state": v - k}
        built = DOUBLED.with_(T=130, H=1, HV=1).build(dtype=torch.bfloat16, device=DEVICE, gradient=False)
        arguments = {n: (x.float() * 2.0 ** powers[n]).to(x.dtype).requires_grad_() for n, x in built.items()}
        o, state = call("portable", arguments)
        coming = [w.float() * 2.0 ** (back + power) for w, power in zip(compare.weights((o, state)), (0, k), strict=True)]
        grads = torch.autograd.grad((o, state), leaves(arguments), [w.to(x.dtype) for w, x in zip(coming, (o, state), strict=True)])
        scales = (v, v - k, *(v + back - powers[n] for n in powers))
        found.append([x.double() * 2.0**-power for x, power in zip((o, state, *grads), scales, strict=True)])
    portable.plan.cache_clear()
    names = ("o", "state", *powers)
    for name, plain, scaled in zip(names, *found, strict=True):
        assert plain.isfinite().all() and plain.norm() > 0
        if name != "beta" or keys == 0:  # in which of two ways its gradient is found depends on the sizes of beta and of Phi
            assert torch.equal(plain, scaled), name


@pytest.mark.parametrize("K", [64, 136])
def test_triton_rounds_one_factor_of_the_gradient_of_beta(K: int) -> None:
    """dbeta = R.dU, errors and the gradient of what is written: less wrong than if both were rounded to bfloat16 and nothing else."""
    pytest.importorskip("triton")
    problem = Problem(name="", T=140, HV=2, K=K, V=128, decay=2.0)
    found, rounded, true = [], [], []
    for seed in range(SEEDS):
        found.append(compare.run(OP, "portable", problem.build(dtype=torch.bfloat16, device=DEVICE, seed=seed))["beta"])
        x = problem.build(seed=seed)
        truth = compare.run(OP, "reference", x)
        k, v, g, beta = (x[name].detach()[0] for name in ("k", "v", "g", "beta"))
        memory, errors = torch.zeros(2, K, 128).double(), []
        for t in range(140):
            memory = memory * g[t].exp()[:, None, None]
            errors.append(v[t] - (k[t] @ memory).squeeze(1))
            memory = memory + k[t].unsqueeze(-1) * (beta[t, :, None] * errors[-1])[:, None]
        R, dU = torch.stack(errors), truth["v"][0] / beta.unsqueeze(-1)
        torch.testing.assert_close((R * dU).sum(-1), truth["beta"][0])
        rounded.append((R.bfloat16().double() * dU.bfloat16().double()).sum(-1)[None])
        true.append(truth["beta"])
    ours, both, exact = (torch.stack(each) for each in (found, rounded, true))
    assert compare.error(ours, exact) < compare.error(both, exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("K", [16, 136])
def test_triton_has_the_gradient_of_a_beta_that_is_nothing(K: int, dtype: torch.dtype) -> None:
    """A token that writes nothing, or next to nothing, and would change the outputs if it did."""
    pytest.importorskip("triton")
    problem, small = Problem(name="", T=70, HV=2, K=K, V=72), torch.tensor([0.0, 2.0**-9, -(2.0**-10), 0.25, -0.5, 1e-20]).repeat(12)[:70]

    def build(dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        arguments = problem.build(dtype=dtype, device=device)
        arguments["beta"].data.copy_(small[:, None])
        return arguments

    truth, rounding = (compare.run(OP, "reference", build(each)) for each in (torch.float64, dtype))
    found = compare.run(OP, "portable", build(dtype, DEVICE))
    assert compare.complaints(found, rounding, truth, dtype) == []
    for value in small.unique():
        at = small == value
        is_wrong, may_be = (compare.error(each["beta"][:, at], truth["beta"][:, at]) for each in (found, rounding))
        assert is_wrong <= compare.allowed(may_be, dtype), value
    assert not found["v"][:, small == 0].any()


def test_triton_has_the_gradient_of_beta_where_fp16_has_few_digits() -> None:
    """What comes back is so small that a gradient times beta has lost digits in fp16; beta is in float32, and so is its gradient."""
    pytest.importorskip("triton")
    found = []
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float16), ("portable", torch.float16)):
        arguments = Problem(name="", T=70, HV=2, V=24).build(dtype=dtype, device=DEVICE if impl == "portable" else "cpu")
        arguments["beta"].data.fill_(0.005)
        outputs = call(impl, arguments)
        small = [w * 2.0**-11 for w in compare.weights(outputs)]
        found.append(torch.autograd.grad(outputs, arguments["beta"], small)[0].double().cpu())
    truth, rounding, actual = found
    assert compare.error(actual, truth) <= compare.allowed(compare.error(rounding, truth), torch.float16)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("parts", "name", "dtype"), CASES, ids=str)
def test_triton_agrees_with_the_recurrence(parts: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients, in one piece, in segments and in slabs: at most twice as wrong as the textbook's chunks with
    operands of the same dtype."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    segment, slab = PARTS[parts]
    monkeypatch.setattr(portable, "gates_apart", lambda tiles: parts == "slabs of segments")
    if segment is not None:
        monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: segment)
    if slab is not None:
        monkeypatch.setattr(portable, "slab_chunks", lambda *sizes: slab)
    portable.plan.cache_clear()
    draws = range(SEEDS if name == NEVER_CONTRACTS else 1)
    actual = [compare.run(OP, "portable", PROBLEMS[name].build(dtype=dtype, device=DEVICE, seed=seed)) for seed in draws]
    portable.plan.cache_clear()
    rounding = [plain_torch(PROBLEMS[name], dtype, "narrow textbook", seed) for seed in draws]
    truth = [reference(name, torch.float64, seed) for seed in draws]
    assert compare.complaints(*(compare.pool(each) for each in (actual, rounding, truth)), dtype) == []


VARIANTS: dict[str, dict[str, Any]] = {
    "crowded": {"crowded": True},
    "chained": {"chained": True},
    "A100": {"room": hardware.AMPERE},
    "desk": {"room": hardware.SMALL},
}
WIDTHS = ((64, 64), (96, 192), (128, 128), (200, 400), (256, 512))
if DEVICE == "cuda":  # on Hopper not eight warps on 64 rows, as others get for K > 128 (notes/triton_pipelines.md)
    LAUNCHED = [(K, V, variant) for K, V in WIDTHS for variant in VARIANTS if K <= 128 or "room" not in VARIANTS[variant]]
else:
    LAUNCHED = [(72, 128, "crowded"), (72, 128, "chained"), (72, 128, "desk"), (136, 72, "A100"), (136, 72, "desk")]


@pytest.fixture
def all_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Gates apart and in segments, so that all kernels run."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: 1)
    monkeypatch.setattr(portable, "gates_apart", lambda tiles: True)
    portable.plan.cache_clear()
    yield portable
    portable.plan.cache_clear()


def agrees_as_narrow_chunks_do(problem: Problem) -> None:
    actual = compare.run(OP, "portable", problem.build(dtype=torch.bfloat16, device=DEVICE))
    rounding, truth = plain_torch(problem, torch.bfloat16, "narrow textbook"), compare.run(OP, "reference", problem.build())
    assert compare.complaints(actual, rounding, truth, torch.bfloat16) == []


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("K", "V", "variant"), LAUNCHED)
def test_triton_agrees_whatever_its_launches(K: int, V: int, variant: str, all_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what large sizes or other GPUs get."""
    ordinary = all_kernels.launches
    monkeypatch.setattr(all_kernels, "launches", lambda *sizes, **chosen: ordinary(*sizes, **{**chosen, **VARIANTS[variant]}))
    agrees_as_narrow_chunks_do(Problem(name="", T=70, H=1, HV=1, K=K, V=V, initial=True))


@gpu
@pytest.mark.usefixtures("poisoned_memory", "all_kernels", "warps")
@pytest.mark.parametrize("warps", ["half"], indirect=True)
@pytest.mark.parametrize(("K", "V"), WIDTHS[1:])
def test_triton_agrees_with_half_the_warps(K: int, V: int) -> None:
    """Two warps are no warp group, so Triton takes no products of Hopper's own. test_warps.py has heads of 64, and twice the warps."""
    agrees_as_narrow_chunks_do(Problem(name="", T=200, H=1, HV=2, K=K, V=V, initial=True, lengths=(130, 0, 70)))


def test_triton_remembers_what_a_call_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches are written down once for calls alike. A call gives the same bits first of all and after all others."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    monkeypatch.setattr(portable, "slab_chunks", lambda *sizes: 1)
    problem = Problem(name="", T=70, H=1, HV=1, K=16, V=16, initial=True)
    base = problem.build(dtype=torch.bfloat16, device=DEVICE)
    narrow = {name: base[name].detach().bfloat16().requires_grad_() for name in ("g", "beta")}
    sliced = {n: torch.cat([base[n], base[n]], -2).detach()[:, :, :1].requires_grad_() for n in ("q", "k", "v")}
    changes = [{}, {"scale": 0.3}, {"initial_state": None}, {"g": narrow["g"]}, {"beta": narrow["beta"]}, sliced]
    calls = [base | change for change in changes] + [problem.build(dtype=dtype, device=DEVICE) for dtype in (torch.float16, torch.float32)]

    def results(arguments: dict[str, Any]) -> list[tuple[Tensor, ...]]:
        with torch.no_grad():
            plain = call("portable", arguments)
        outputs = call("portable", arguments)
        found = [plain, outputs, gradients(outputs, arguments)]
        return [*found, gradients(call("portable", arguments)[:1], arguments)] if arguments is base else found

    first = []
    for arguments in calls:
        portable.plan.cache_clear()
        first.append(results(arguments))
    again = [results(arguments) for arguments in calls]
    portable.plan.cache_clear()
    for a, b in zip(first, again, strict=True):
        assert all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other, strict=True))


def test_triton_compiles_for_any_length() -> None:
    """The first length is compiled in, the second makes it a symbol, and forward keeps as many bytes as only the call will know."""
    pytest.importorskip("triton")
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_rule, backend="aot_eager", fullgraph=True)
    with use(gated_delta_rule="portable"):
        for T in (70, 130):
            arguments = Problem(name="", T=T, H=1, HV=1, K=16, V=16, lengths=(30, T - 30)).build(dtype=torch.bfloat16, device=DEVICE)
            results = [gradients(function(**arguments), arguments) for function in (compiled, gated_delta_rule)]
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_triton_keeps_small_decays_after_large_ones() -> None:
    """In float32: a running sum of -480 in one number would be off by more than the decays of all tokens after it may be."""
    pytest.importorskip("triton")

    def build(dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        arguments = Problem(name="", T=64, decay=0.01).build(dtype=dtype, device=device)
        arguments["g"].data[:, :8] = -60.25
        return arguments

    truth, rounding = (compare.run(OP, "reference", build(each)) for each in (torch.float64, torch.float32))
    assert compare.complaints(compare.run(OP, "portable", build(torch.float32, DEVICE)), rounding, truth, torch.float32) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_triton_hands_on_what_long_keys_keep_alive(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token halves the memory and doubles it again along its key: exp(-44) of a chunk's gates alone would be as good as forgotten."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: 1)
    portable.plan.cache_clear()

    def build(dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        arguments = Problem(name="", T=200, K=16, V=16, top=2.0, full=True, initial=True).build(dtype=dtype, device=device)
        arguments["k"].data.zero_()[..., 0] = 1.2265625  # its square is 1.504, and 1 - 2 x 1.504 is -2.01
        arguments["g"].data.fill_(-0.69140625)
        return arguments

    found = compare.run(OP, "portable", build(dtype, DEVICE))
    portable.plan.cache_clear()
    truth, rounding = (compare.run(OP, "reference", build(each)) for each in (torch.float64, dtype))
    assert truth["initial_state"].norm() > 1
    assert compare.complaints(found, rounding, truth, dtype) == []


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("name", ["k", "v", "g", "beta"])
@pytest.mark.parametrize("impl", ["portable", "chunked", "recurrent"])
def test_what_is_no_number_does_not_heal(impl: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every token after one that is NaN has no number either, nor the last memory; also where segments hand the state on."""
    if impl == "portable":
        portable = pytest.importorskip("gdn.ops.delta_rule.portable")
        monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: 2)
        portable.plan.cache_clear()
    arguments = Problem(name="", T=4 * CHUNK + 5, H=1, HV=1, K=16, V=16).build(dtype=torch.float32, device=DEVICE, gradient=False)
    arguments[name][0, 3] = torch.nan
    o, final = call(impl, arguments)
    assert o[0, 3:].isnan().any(-1).all() and final.isnan().any()
    if impl == "portable":
        portable.plan.cache_clear()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("lengths", "segment", "slab"), [((70, 3, 0, 0), 0, 1), ((70, 3, 0, 0), 1, 2), ((70, 0, 3, 20), 2, 1)], ids=str)
def test_triton_takes_a_chunk_table_with_rows_beyond_the_end(
    lengths: tuple[int, ...], segment: int, slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a compiled graph makes it (`Packing.stretched`): the same bits, and nothing read where nobody wrote."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: segment)
    monkeypatch.setattr(portable, "slab_chunks", lambda *sizes: slab)
    found: list[tuple[Tensor, ...]] = []
    for surplus in (0, sum(lengths) // CHUNK + len(lengths)):
        arguments = Problem(name="", T=sum(lengths), lengths=lengths, initial=True).build(dtype=torch.float32, device=DEVICE)
        packing = arguments["packing"]
        if surplus:
            arguments["packing"] = dataclasses.replace(packing, chunk_table=packing._stretch(1, surplus).chunk_table)
            assert len(arguments["packing"].chunk_table) > len(packing.chunk_table)
        portable.plan.cache_clear()
        outputs = call("portable", arguments)
        found.append((*outputs, *gradients(outputs, arguments)))
    portable.plan.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(x.isfinite().all() for x in found[1])


@pytest.mark.usefixtures("poisoned_memory")
def test_one_compiled_graph_of_triton_serves_any_number_of_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan decides from the sizes is no constant of the graph."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: 1)
    portable.plan.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths, recompile in (((20, 10, 5), True), ((3, 20, 0, 7), False)):
        found = []
        for run in (gated_delta_rule, compiled):
            arguments = Problem(name="", T=sum(lengths), lengths=lengths).build(dtype=torch.float32, device=DEVICE)
            with use(gated_delta_rule="portable"), torch._dynamo.config.patch(error_on_recompile=not recompile):
                outputs = run(**arguments)
                found.append((*outputs, *gradients(outputs, arguments)))
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    portable.plan.cache_clear()


@pytest.mark.parametrize(
    ("B", "T", "H", "HV", "most"),
    [(8, 4096, 16, 16, 1370), (1, 8192, 16, 32, 667), (1, 32768, 16, 32, 2608), (1, 32768, 2, 8, 617)],
    ids=str,
)
def test_triton_peak_memory(B: int, T: int, H: int, HV: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward with heads of 128, bf16, counted on tensors without data: at most FlashQLA's MiB."""
    portable = pytest.importorskip("gdn.ops.delta_rule.portable")
    portable_schedule = pytest.importorskip("gdn.core.portable_schedule")
    monkeypatch.setattr(portable_schedule, "launch", lambda *args, **options: None)
    monkeypatch.setattr(portable.hardware, "multiprocessors", lambda index: 132)
    with LiveBytes() as count:
        q, k, v = (torch.empty(B, T, heads, 128, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (H, H, HV))
        g, beta = (torch.empty(B, T, HV, device="meta", requires_grad=True) for _ in range(2))
        o = portable.gated_delta_rule(q, k, v, g, beta, 1.0, None, None)[0]
        torch.autograd.grad(o, (q, k, v, g, beta), torch.empty_like(o))
    assert most / 2 < count.peak / 2**20 <= most


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(("K", "V"), [(16, 24), (136, 8)])
def test_triton_hands_states_over_with_sixteen_bits(K: int, V: int, backward: bool) -> None:
    """Chains of maps in two parts in bfloat16, beside the same chain in float64: a part alone has eight bits."""
    scan = pytest.importorskip("gdn.ops.delta_rule.portable_scan")
    launch = pytest.importorskip("gdn.core.portable_launch").launch
    segments, heads, width = 5, 2, 16 if K == 16 else 256
    generator = torch.Generator().manual_seed(0)
    maps = torch.linalg.qr(torch.randn(segments, heads, K, K, generator=generator))[0]
    added = torch.randn(segments, heads, K, V, generator=generator)
    crosses = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1], [0, 0]], dtype=torch.int32)
    high = maps.bfloat16()
    carried = torch.stack([high, (maps - high.float()).bfloat16()], 2)
    out = torch.full((segments, heads, K, V), torch.nan)
    on_device = [x.to(DEVICE) for x in (added, carried, crosses, out)]
    launch(scan.handover_kernel, (heads * -(-V // 16),), *on_device, segments, heads, K, V, width, 16, 8, backward, False, 1)
    state, expected = torch.zeros(heads, K, V).double(), {}
    order = range(segments - 1, 0, -1) if backward else range(segments - 1)
    for s in order:
        step = maps[s].double().mT if backward else maps[s].double()
        state = (step @ state) * (crosses[s] if s < segments - 1 else torch.zeros(heads))[:, None, None] + added[s].double()
        expected[s - 1 if backward else s + 1] = state
    for s, state in expected.items():
        torch.testing.assert_close(on_device[3][s].cpu().double(), state, rtol=0, atol=4 * 2**-16 * float(state.norm()) / K**0.5)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that were made under it and are alive, and the most there ever were."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.storages:
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.storages.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.storages.values()))
        return result


@gpu
@pytest.mark.parametrize(("K", "V"), [(16, 32), (40, 24), (64, 64), (96, 192), (128, 128), (192, 384), (200, 400), (256, 512)])
def test_triton_head_widths(K: int, V: int) -> None:
    """Blocks of 64 channels and 4 warps among them, where other rules' gradients were wrong on Hopper (test_turned_products.py):
    https://github.com/fla-org/flash-linear-attention/issues/640 and https://github.com/fla-org/flash-linear-attention/issues/984."""
    problem = Problem(name="", T=300, H=1, HV=2, K=K, V=V, initial=True, lengths=(130, 0, 170))
    truth = compare.run(OP, "reference", problem.build())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rounding = compare.run(OP, "reference", problem.build(dtype=dtype))
        actual = compare.run(OP, "portable", problem.build(dtype=dtype, device="cuda"))
        again = compare.run(OP, "portable", problem.build(dtype=dtype, device="cuda"))
        assert all(torch.equal(a, b) for a, b in zip(actual.tensors, again.tensors)), "another run gave other bits"
        assert compare.complaints(actual, rounding, truth, dtype) == []


@gpu
def test_triton_compiles_whole_and_under_a_graph() -> None:
    arguments = Problem(name="", T=200, H=1, HV=2, K=64, V=64, lengths=(130, 70)).build(dtype=torch.bfloat16, device="cuda")
    expected = gradients(call("portable", arguments), arguments)
    compiled = torch.compile(gated_delta_rule, fullgraph=True)
    for a, b in zip(gradients(compiled(**arguments), arguments), expected):
        assert torch.equal(a, b)
    with torch.no_grad():
        plain = gated_delta_rule(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gated_delta_rule(**arguments)
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(plain, captured))


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("lengths", [None, (70, 0, 3, 200, 33, 64, 130)], ids=["rows", "packed"])
def test_many_blocks_of_sequences_agree_with_the_recurrence(
    monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, ...] | None, together: int
) -> None:
    """The chunked row with room for `together` sequences in a block and two chunks in a segment: large models have such blocks."""
    problem = Problem(name="blocks", B=5 if lengths is None else 1, T=100 if lengths is None else 500, HV=2, K=8, V=8, lengths=lengths)
    arguments = problem.with_(initial=True).build()
    monkeypatch.setattr(scan, "BLOCK_ELEMENTS", together * 2 * 8 * 8)
    monkeypatch.setattr(scan, "SEGMENT_ELEMENTS", 1)
    bounds = None if lengths is None else arguments["packing"].host
    q, k, v, g, beta = (arguments[name] for name in ("q", "k", "v", "g", "beta"))
    inputs = scan.Inputs(q, k.unsqueeze(2), v.unsqueeze(2), g, beta.unsqueeze(2))
    layout = scan.Layout.of(chunked.Chunks, inputs, bounds)
    segments = list(layout.walk(arguments["v"], bounds).segments())
    assert (layout.block, layout.stretch) == (together, 2)
    assert len(segments) > len({segment.block.start for segment in segments}) > 1
    actual, truth = (compare.run(OP, impl, arguments) for impl in ("chunked", "reference"))
    for name in truth.names:
        close(actual[name], truth[name])


@pytest.mark.parametrize("impl", ROWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_the_results(impl: str, dtype: torch.dtype) -> None:
    o, state = call(impl, Problem(name="", T=3, HV=2, V=5).build(dtype=dtype))
    assert (o.dtype, list(o.shape)) == (dtype, [1, 3, 2, 5])
    assert (state.dtype, list(state.shape)) == (torch.float64 if dtype == torch.float64 else torch.float32, [1, 2, 16, 5])


@pytest.mark.parametrize("impl", ROWS)
def test_no_tokens_hand_the_state_through(impl: str) -> None:
    arguments = Problem(name="", T=0, B=2, initial=True).build()
    o, state = call(impl, arguments)
    assert list(o.shape) == [2, 0, 1, 16]
    close(state, arguments["initial_state"])
    close(torch.autograd.grad(state.sum(), arguments["initial_state"])[0], torch.ones_like(state))


@pytest.mark.parametrize("impl", ROWS)
@pytest.mark.parametrize("lengths", [None, ()])
def test_no_sequences(impl: str, lengths: tuple[int, ...] | None) -> None:
    B, T = (0, 3) if lengths is None else (1, 0)
    o, state = call(impl, Problem(name="", B=B, T=T, lengths=lengths, initial=True).build(dtype=torch.bfloat16))
    assert (list(o.shape), o.dtype, list(state.shape), state.dtype) == ([B, T, 1, 16], torch.bfloat16, [0, 1, 16, 16], torch.float32)


@pytest.mark.parametrize("lengths", [None, (0, 0)])
@pytest.mark.parametrize("K", [16, 136])
def test_no_tokens_hand_the_state_through_triton(K: int, lengths: tuple[int, ...] | None) -> None:
    """Forward keeps for a backward what that needs: here nothing at all."""
    pytest.importorskip("triton")
    arguments = Problem(name="", T=0, B=2, HV=2, K=K, V=24, lengths=lengths, initial=True).build(dtype=torch.bfloat16, device=DEVICE)
    outputs = call("portable", arguments)
    assert torch.equal(outputs[1], arguments["initial_state"])
    *rest, d_initial = torch.autograd.grad([x.sum() for x in outputs], leaves(arguments))
    assert torch.equal(d_initial, torch.ones_like(d_initial))
    assert [x.numel() for x in rest] == [0] * 5


def test_no_tokens_compile_with_a_gradient_of_the_state() -> None:
    """A registered operator must not return an argument of its own."""
    pytest.importorskip("triton")
    arguments = Problem(name="", T=0, B=2, initial=True).build(dtype=torch.float32, device=DEVICE)
    with use(gated_delta_rule="portable"):
        _, final = torch.compile(gated_delta_rule, fullgraph=True, backend="aot_eager")(**arguments)
    (found,) = torch.autograd.grad(final.sum(), [arguments["initial_state"]])
    assert torch.equal(found, torch.ones_like(found))


def test_strong_gates_make_no_denormal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products with them take an Intel processor some hundred cycles each."""
    seen: list[Tensor] = []
    flow = scan._flow

    def watched(segment: Any, c: chunked.Chunks, error: Tensor, inverse: Tensor, *rest: Any) -> Any:
        seen.extend((c.gamma, c.tail, c.gated, inverse))
        return flow(segment, c, error, inverse, *rest)

    monkeypatch.setattr(scan, "_flow", watched)
    x = Problem(name="", T=100, HV=2).build(dtype=torch.float32)
    x["g"] = torch.linspace(-12, -1, 100).view(1, 100, 1).expand(1, 100, 2)
    with use(gated_delta_rule="chunked"):
        gated_delta_rule(**x)[0].sum().backward()
    assert seen
    for matrix in seen:
        assert not ((matrix != 0) & (matrix.abs() < 1e-36)).any()


@in_rows
@pytest.mark.parametrize("decay", [1e2, 1e4, 1e30, float("inf")])
def test_memory_that_forgets_everything_is_finite(impl: str, decay: float) -> None:
    arguments = Problem(name="", T=130, initial=True).build(dtype=torch.float32)
    arguments["g"] = torch.full_like(arguments["g"], -decay).requires_grad_()
    outputs = call(impl, arguments)
    q, k, v, beta = (arguments[name].double() for name in ("q", "k", "v", "beta"))
    alone = 0.25 * (q * k).sum(-1, keepdim=True) * beta.unsqueeze(-1) * v  # each token reads only what it wrote itself
    torch.testing.assert_close(outputs[0].double(), alone, rtol=1e-5, atol=1e-6)
    for gradient in gradients(outputs, arguments):
        assert bool(gradient.isfinite().all())
    assert float(torch.autograd.grad(call(impl, arguments)[0].sum(), arguments["g"])[0].abs().max()) < 1e-5


@in_rows
def test_zero_keys_write_nothing(impl: str) -> None:
    arguments = Problem(name="", T=70, keys="zero", decay=0.0, initial=True).build()
    o, state = call(impl, arguments)
    close(state, arguments["initial_state"])
    close(o, 0.25 * torch.einsum("bthk,bhkv->bthv", arguments["q"], state))


@in_rows
def test_gradients_agree_with_finite_differences(impl: str) -> None:
    arguments = Problem(name="", T=5, B=2, H=1, HV=2, K=2, V=3, lengths=(2, 0, 3, 5), initial=True).build()
    packing = arguments.pop("packing")
    arguments["g"] = (arguments["g"].detach() - 0.05).requires_grad_()  # differences must not cross zero

    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return call(impl, {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state, "packing": packing})

    assert torch.autograd.gradcheck(function, tuple(arguments.values()))


@in_rows
def test_gradients_across_chunks_agree_with_finite_differences(impl: str) -> None:
    arguments = Problem(name="", T=67, K=2, V=2, initial=True).build()
    arguments["g"] = (arguments["g"].detach() - 0.05).requires_grad_()

    def function(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return call(impl, {"q": q, "k": k, "v": v, "g": g, "beta": beta, "initial_state": state})

    assert torch.autograd.gradcheck(function, tuple(arguments.values()), fast_mode=True)


@pytest.mark.parametrize("use_o, use_state", [(True, False), (False, True)])
@in_rows
def test_one_result_alone_has_its_gradient(impl: str, use_o: bool, use_state: bool) -> None:
    problem = PROBLEMS["packed"]

    def result(name: str) -> tuple[Tensor, ...]:
        arguments = problem.build()
        o, state = call(name, arguments)
        loss = o.square().sum() if use_o else state.square().sum()
        return torch.autograd.grad(loss, leaves(arguments), materialize_grads=True)

    close(result(impl), result("reference"))


@pytest.mark.parametrize("heads", [(2, 2), (2, 4)])
def test_agrees_with_transformers(heads: tuple[int, int]) -> None:
    peer = bench.peer()
    assert peer is not None
    problem = Problem(name="", B=2, T=150, H=heads[0], HV=heads[1], K=32, V=24, initial=True)
    ours, theirs = problem.build(dtype=torch.float32), problem.build(dtype=torch.float32)
    a, b = call(FAST[0], ours), peer(theirs)
    for x, y in zip((*a, *gradients(a, ours)), (*b, *gradients(b, theirs))):
        assert compare.error(x.detach().double(), y.detach().double()) < 5e-6


@pytest.mark.parametrize("name", ["chunk plus one", "packed"])
@in_rows
def test_compiled_equals_eager(impl: str, name: str) -> None:
    problem = PROBLEMS[name]

    def function(arguments: dict[str, Any]) -> tuple[Tensor, ...]:
        with_scale = {**arguments, "q": 2 * arguments["q"]}
        return tuple(x + 1 for x in gated_delta_rule(**with_scale))

    torch._dynamo.reset()
    with use(gated_delta_rule=impl):
        eager, compiled = problem.build(), problem.build()
        expected = function(eager)
        actual = torch.compile(function, fullgraph=True, backend="aot_eager")(compiled)
        close(actual, expected)
        close(gradients(actual, compiled), gradients(expected, eager))


def test_compiled_by_the_default_compiler_equals_eager() -> None:
    torch._dynamo.reset()
    eager, compiled = PROBLEMS["empty documents"].build(), PROBLEMS["empty documents"].build()
    actual = torch.compile(gated_delta_rule, fullgraph=True)(**compiled)
    expected = gated_delta_rule(**eager)
    close(actual, expected)
    close(gradients(actual, compiled), gradients(expected, eager))


@functools.cache
def long_call() -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    arguments = Problem(name="", T=200, H=1, HV=2, K=4, V=3, initial=True).build(gradient=False)
    return arguments, call("reference", arguments)


@in_rows
@settings(max_examples=20, deadline=None, database=None)
@given(cuts=st.lists(st.integers(0, 200), max_size=4))
def test_a_split_anywhere_gives_the_same(impl: str, cuts: list[int]) -> None:
    arguments, (o, final) = long_call()
    state, outputs = arguments["initial_state"], []
    for begin, end in itertools.pairwise([0, *sorted(cuts), 200]):
        piece = {name: x[:, begin:end] for name, x in arguments.items() if name != "initial_state"}
        part, state = call(impl, {**piece, "initial_state": state})
        outputs.append(part)
    close(torch.cat(outputs, dim=1), o)
    close(state, final)


@in_rows
@settings(max_examples=12, deadline=None, database=None)
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 30, 63, 64, 65, 128]), min_size=1, max_size=4))
def test_packed_equals_separate(impl: str, lengths: list[int]) -> None:
    problem = Problem(name="", T=sum(lengths), HV=2, K=4, V=3, lengths=tuple(lengths), initial=True)
    packed, whole = problem.build(), problem.build()
    outputs, states, begin = [], [], 0
    for i, length in enumerate(lengths):
        piece = {name: whole[name][:, begin : begin + length] for name in ("q", "k", "v", "g", "beta")}
        o, state = call(impl, {**piece, "initial_state": whole["initial_state"][i : i + 1]})
        outputs.append(o)
        states.append(state)
        begin += length
    separate = torch.cat(outputs, dim=1), torch.cat(states)
    together = call(impl, packed)
    close(together, separate)
    close(gradients(together, packed), gradients(separate, whole))


@in_rows
def test_the_future_does_not_matter(impl: str) -> None:
    arguments = Problem(name="", T=140, B=2).build(dtype=torch.float32, gradient=False)
    changed = {name: x.clone() for name, x in arguments.items()}
    for name in ("q", "k", "v", "beta"):
        changed[name][:, 70:] = changed[name][:, 70:].flip(1)
    assert torch.equal(call(impl, arguments)[0][:, :70], call(impl, changed)[0][:, :70])


@in_rows
def test_every_run_gives_the_same_bits(impl: str) -> None:
    runs = []
    for _ in range(2):
        arguments = PROBLEMS["packed"].build(dtype=torch.float32)
        outputs = call(impl, arguments)
        runs.append((*outputs, *gradients(outputs, arguments)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@gpu
@pytest.mark.parametrize(("B", "T", "H", "HV"), [(1, 8192, 16, 32), (1, 32768, 2, 8), (8, 4096, 16, 32)])
def test_triton_gives_the_same_bits_at_full_size(B: int, T: int, H: int, HV: int) -> None:
    """Where a GPU is full, and segments and slabs are those of the sizes."""
    arguments = Problem(name="", B=B, T=T, H=H, HV=HV, K=128, V=128, initial=True).build(dtype=torch.bfloat16, device="cuda")
    runs = []
    for _ in range(3):
        outputs = call("portable", arguments)
        runs.append((*outputs, *gradients(outputs, arguments)))
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other))


@in_rows
def test_arguments_are_left_alone(impl: str) -> None:
    arguments, before = PROBLEMS["packed"].build(), PROBLEMS["packed"].build()
    gradients(call(impl, arguments), arguments)
    gradients(call(impl, arguments), arguments)
    assert all(torch.equal(x, before[name]) for name, x in arguments.items() if isinstance(x, Tensor))


@in_rows
def test_strides_do_not_matter(impl: str) -> None:
    arguments = PROBLEMS["grouped values"].build()
    strided = {name: x.detach().mT.contiguous().mT.requires_grad_() for name, x in arguments.items()}
    a, b = call(impl, arguments), call(impl, strided)
    close((*b, *gradients(b, strided)), (*a, *gradients(a, arguments)))


@pytest.mark.parametrize("name", ["batch of several chunks", "packed", "empty documents", "odd sizes", "one token"])
@in_rows
def test_uninitialised_memory_is_not_read(impl: str, name: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills the memory of torch.empty and its relatives with NaN
    try:
        assert torch.empty(3).isnan().all() and torch.ones(1).new_empty(3).isnan().all()
        actual = compare.run(OP, impl, PROBLEMS[name].build(dtype=torch.float32))
    finally:
        torch.use_deterministic_algorithms(False)
    assert compare.complaints(actual, reference(name, torch.float32), reference(name, torch.float64), torch.float32) == []


def saved_bytes(impl: str, length: int) -> tuple[int, int]:
    """Bytes of the arguments, and of all memory that autograd keeps for the backward pass."""
    arguments = Problem(name="", T=length, H=2, HV=2, K=64, V=64).build(dtype=torch.float32)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = call(impl, arguments)
    assert outputs[0].requires_grad
    return sum(x.nbytes for x in leaves(arguments)), sum(kept.values())


@in_rows
def test_memory_grows_with_the_length_and_holds_no_state_per_token(impl: str) -> None:
    inputs, once = saved_bytes(impl, 512)
    twice = saved_bytes(impl, 1024)[1]
    assert 1.8 * once < twice < 2.2 * once
    assert once < 2 * inputs  # a state for each token would be more than 20 times the inputs


@in_rows
def test_nothing_is_kept_without_gradients(impl: str) -> None:
    with torch.no_grad():
        assert not call(impl, PROBLEMS["packed"].build())[0].requires_grad


def change(**changes: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda arguments: {**arguments, **{name: make(arguments) for name, make in changes.items()}}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "too few dimensions": (change(q=lambda a: a["q"][0]), r"q: expected 4 dimensions \[B, T, H, K\], got \[6, 2, 16\]"),
    "gate with a width": (change(g=lambda a: a["v"]), r"g: expected 3 dimensions \[B, T, HV\], got \[2, 6, 4, 16\]"),
    "another length": (change(k=lambda a: a["k"][:, :5]), r"k: expected \[B=2, T=6, H=2, K=16\], got \[2, 5, 2, 16\]"),
    "another width": (change(k=lambda a: a["k"][..., :5]), r"k: expected \[B=2, T=6, H=2, K=16\], got \[2, 6, 2, 5\]"),
    "gate of other heads": (change(beta=lambda a: a["beta"][..., :3]), r"beta: expected \[B=2, T=6, HV=4\], got \[2, 6, 3\]"),
    "no multiple": (
        lambda a: {**a, **{n: a[n][:, :, :3] for n in ("v", "g", "beta")}},
        r"v: expected a multiple of 2 value heads .*, got 3",
    ),
    "dtypes differ": (change(v=lambda a: a["v"].double()), r"v: expected torch.float32 like q, got torch.float64"),
    "integers": (change(q=lambda a: a["q"].long()), r"q: expected a floating dtype, got torch.int64"),
    "integer gate": (change(g=lambda a: a["g"].long()), r"g: expected a floating dtype, got torch.int64"),
    "devices differ": (change(k=lambda a: a["k"].to("meta")), r"k: expected on cpu like q, got meta"),
    "state elsewhere": (change(initial_state=lambda a: a["initial_state"].to("meta")), r"initial_state: expected on cpu like q, got meta"),
    "positive decay": (change(g=lambda a: -a["g"] + 0.5), r"g: expected a log decay, so at most 0 everywhere, got \d"),
    "packing of another total": (change(packing=lambda a: Packing.from_lengths([6, 7])), r"packing: describes 13 tokens, .* 2 x 6"),
    "no heads": (change(q=lambda a: a["q"][:, :, :0], k=lambda a: a["k"][:, :, :0]), "q: expected at least one head, got none"),
    "no channels": (
        change(q=lambda a: a["q"][..., :0], k=lambda a: a["k"][..., :0], initial_state=lambda a: None),
        "q: expected at least one channel, got none",
    ),
    "values without channels": (
        change(v=lambda a: a["v"][..., :0], initial_state=lambda a: None),
        "v: expected at least one channel, got none",
    ),
    "no value heads": (
        change(**{name: lambda a, name=name: a[name][:, :, :0] for name in ("v", "g", "beta")}, initial_state=lambda a: None),
        "v: expected at least one head, got none",
    ),
    "scale of its own gradient": (change(scale=lambda a: torch.tensor(0.5, requires_grad=True)), "scale: expected a number, got Tensor"),
    "state in a list": (change(initial_state=lambda a: [0.0]), "initial_state: expected a tensor, got list"),
    "eight bits": (
        change(**{name: lambda a, name=name: a[name].to(torch.float8_e4m3fn) for name in "qkv"}),
        "q: expected at least 16 bits a number, got torch.float8_e4m3fn",
    ),
    "document over two rows": (change(packing=lambda a: Packing.from_lengths([5, 7])), r"packing: a document crosses the end of a row"),
    "packing elsewhere": (change(packing=lambda a: Packing.from_lengths([6, 6], device="meta")), r"packing: is on meta, .* on cpu"),
    "state of another batch": (
        change(initial_state=lambda a: a["initial_state"][:1]),
        r"initial_state: expected \[N=2, HV=4, K=16, V=16\], got \[1, 4, 16, 16\]",
    ),
    "state for fewer documents": (
        change(packing=lambda a: Packing.from_lengths([6, 3, 3])),
        r"initial_state: expected \[N=3, HV=4, K=16, V=16\], got \[2, 4, 16, 16\]",
    ),
    "state turned": (change(initial_state=lambda a: a["initial_state"][..., :3]), r"initial_state: expected .*, got \[2, 4, 16, 3\]"),
    "state in low precision": (
        change(initial_state=lambda a: a["initial_state"].bfloat16()),
        r"initial_state: expected torch.float32, got torch.bfloat16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(case: str) -> None:
    spoil, message = WRONG[case]
    arguments = Problem(name="", B=2, T=6, H=2, HV=4, initial=True).build(dtype=torch.float32, gradient=False)
    with pytest.raises(ArgumentError, match=f"^{message}"):
        gated_delta_rule(**spoil(arguments))


def test_wrong_boundaries_are_named() -> None:
    with pytest.raises(ArgumentError, match=r"cu_seqlens: expected 0 first and no decrease, got \[0, 8, 4, 12\]"):
        Packing.from_cu_seqlens([0, 8, 4, 12])
