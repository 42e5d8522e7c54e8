"""The delta rule with channel decays in Triton against the float64 recurrence: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from on_gpu import gpu
from tensor_cores import sums_are_cut
from torch import Tensor

from gdn.core import device as hardware
from gdn.core.dispatch import Impl, use
from gdn.core.packing import Packing
from gdn.ops import channel_delta_rule
from gdn.ops.delta_channel import OP, TRITON
from gdn.ops.delta_channel.problems import SMALL, Problem
from gdn.ops.delta_rule import problems as rule
from gdn.testing import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Arguments = dict[str, Any]


def problem(name: str = "", **sizes: Any) -> Problem:
    return Problem(rule=rule.Problem(**{"name": name, "K": 8, "V": 8, **sizes}))


TINY = (
    (problem("grouped, packed, odd", T=66, H=1, HV=2, K=5, V=11, lengths=(0, 2, 64), initial=True), torch.float32),
    (problem("forgets strongly", T=65, decay=20.0, clear_every=9, initial=True), torch.float32),
    (problem("several tiles", T=3, K=40, V=40, top=2.0, initial=True), torch.float32),
    (problem("full strength", T=64, decay=0.02, top=2.0, full=True), torch.float32),
    (problem("correlated keys", T=64, decay=0.02, top=2.0, keys="correlated", initial=True), torch.bfloat16),
)
"""What Triton's interpreter, which is slow, runs."""

CANCELS = (problem("repeated keys", T=130, K=16, V=16, keys="repeated", initial=True), TINY[-1][0])


def call(arguments: Arguments, impl: str = "portable") -> tuple[Tensor, Tensor]:
    with use(channel_delta_rule=impl):
        return channel_delta_rule(**arguments)


def leaves(arguments: Arguments) -> list[Tensor]:
    return [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]


def gradients(outputs: tuple[Tensor, ...], arguments: Arguments) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, leaves(arguments), compare.weights(outputs))


def textbook_chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, initial_state: Tensor | None, packing: Packing | None
) -> tuple[Tensor, Tensor]:
    """Chunks of 64 written down in plain torch, products in the dtype of the inputs, gradients by autograd: how wrong a form by chunks is,
    whoever writes it. Decays are exponentials of sums in float64, pair by pair and channel by channel."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.to(v.dtype).to(wide) @ b.to(v.dtype).to(wide)

    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    bounds = packing.host.tolist() if packing else [i * v.shape[1] for i in range(v.shape[0] + 1)]
    q, k = (x.repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    flat = [x.flatten(0, 1).transpose(0, 1) for x in (q.to(wide), k.to(wide), v.to(wide), g.clamp(min=-64).double(), beta.unsqueeze(-1))]
    outputs, states = [], []
    for n, (begin, end) in enumerate(itertools.pairwise(bounds)):
        state = v.new_zeros(v.shape[2], k.shape[3], v.shape[3], dtype=wide) if initial_state is None else initial_state[n]
        for at in range(begin, end, 64):
            queries, keys, values, log, strength = (x[:, at : min(at + 64, end)] for x in flat)
            total = log.cumsum(1)
            seen = torch.ones(total.shape[1], total.shape[1], dtype=torch.bool).tril()[:, :, None]
            decay = (total[:, :, None] - total[:, None]).masked_fill(~seen, -torch.inf).exp().to(wide)
            rows = list((-(strength * (keys[:, :, None] * keys[:, None] * decay).sum(-1))).tril(-1).unbind(1))
            for i in range(1, len(rows)):  # forward substitution, a row at a time
                rows[i] = rows[i] + (rows[i][:, None, :i] @ torch.stack(rows[:i], 1)).squeeze(1)
            solve = torch.stack(rows, 1) + torch.eye(total.shape[1], dtype=wide)
            gamma, tail = total.exp().to(wide), (total[:, -1:] - total).exp().to(wide)
            u = product(solve, strength * values) - product(product(solve, strength * gamma * keys), state)
            reads = (queries[:, :, None] * keys[:, None] * decay).sum(-1)
            outputs.append(scale * (product(gamma * queries, state) + product(reads, u)))
            state = gamma[:, -1].unsqueeze(-1) * state + product((tail * keys).mT, u)
        states.append(state)
    return torch.cat(outputs, 1).transpose(0, 1).reshape(v.shape).to(v.dtype), torch.stack(states)


OP._functions["textbook"] = textbook_chunks


def textbook(case: Problem, dtype: torch.dtype) -> compare.Results:
    before = OP.impls
    OP.impls = (*before, Impl("textbook", ""))
    try:
        return compare.run(OP, "textbook", case.build(dtype=dtype))
    finally:
        OP.impls = before


def cases() -> list[tuple[Problem, torch.dtype]]:
    every = [(p, dtype) for p in (*SMALL, *(p for p, _ in TINY)) for dtype in TRITON.dtypes]
    return every if DEVICE == "cuda" else list(TINY)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("case", "dtype"), cases(), ids=lambda x: getattr(x, "name", str(x)))
def test_agrees_with_the_recurrence(case: Problem, dtype: torch.dtype) -> None:
    """Forward and gradients, at most twice as wrong as plain torch at this dtype: the recurrence, or the textbook's chunks."""
    truth, rounding = (compare.run(OP, "reference", case.build(dtype=d)) for d in (torch.float64, dtype))
    actual = compare.run(OP, "portable", case.build(dtype=dtype, device=DEVICE))
    wrong = compare.complaints(actual, rounding, truth, dtype)
    if wrong:
        wrong = compare.complaints(actual, textbook(case, dtype), truth, dtype)
    assert wrong == []


def test_agrees_where_programs_have_less_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the launches for other GPUs than Hopper's."""
    portable = pytest.importorskip("gdn.ops.delta_channel.portable")
    monkeypatch.setattr(portable.hardware, "room", lambda index: hardware.SMALL)
    case = problem(T=70, H=1, HV=1, K=136, V=72, initial=True)
    actual = compare.run(OP, "portable", case.build(dtype=torch.bfloat16, device=DEVICE))
    truth = compare.run(OP, "reference", case.build())
    assert compare.complaints(actual, textbook(case, torch.bfloat16), truth, torch.bfloat16) == []


@pytest.mark.parametrize("case", CANCELS, ids=lambda x: x.name)
def test_float32_stands_sums_that_tensor_cores_cut(case: Problem) -> None:
    """The errors of cut sums all have the sign of the sum, and where keys repeat the sums cancel and the errors do not."""
    with sums_are_cut():
        actual = compare.run(OP, "portable", case.build(dtype=torch.float32, device=DEVICE))
    truth = compare.run(OP, "reference", case.build())
    assert compare.complaints(actual, textbook(case, torch.float32), truth, torch.float32) == []


def test_the_textbook_is_right() -> None:
    case = problem(T=70, H=1, HV=2, K=3, V=4, lengths=(66, 4), decay=3.0, initial=True)
    truth, found = compare.run(OP, "reference", case.build()), textbook(case, torch.float64)
    assert compare.distance(found, truth) < 1e-12


@pytest.mark.usefixtures("poisoned_memory")
def test_views_one_result_and_no_tokens() -> None:
    arguments = problem(B=2, T=1, initial=True).build(dtype=torch.float32, device=DEVICE)
    expected = torch.autograd.grad(call(arguments)[1].square().sum(), leaves(arguments), materialize_grads=True)
    views = {name: torch.cat([x, x], 2)[:, :, : x.shape[2]] if name in "qkvg" else x for name, x in arguments.items()}
    assert not views["v"].is_contiguous()
    found = torch.autograd.grad(call(views)[1].square().sum(), leaves(arguments), materialize_grads=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not found[0].any() and bool(found[1].any())  # the final memory does not depend on queries
    o, state = call({name: x[:, :0] if name != "initial_state" else x for name, x in arguments.items()})
    assert list(o.shape) == [2, 0, 1, 8] and torch.equal(state, arguments["initial_state"])
    assert torch.equal(torch.autograd.grad(state.sum(), arguments["initial_state"])[0], torch.ones_like(state))


def test_log_decays_below_the_smallest_get_no_gradient() -> None:
    arguments = problem(T=1, initial=True).build(dtype=torch.float32, device=DEVICE)
    g = torch.full_like(arguments["g"], -60)
    g[..., 4:] = -100
    arguments["g"] = g.requires_grad_()
    found = torch.autograd.grad(call(arguments)[0].sum(), g)[0]
    assert bool((found[..., :4] != 0).all()) and not found[..., 4:].any()


def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(channel_delta_rule, fullgraph=True, backend="aot_eager")
    for T in (2, 3):  # the second length is a symbol of the graph
        arguments = problem(T=T, initial=True).build(dtype=torch.float32, device=DEVICE)
        expected = gradients(call(arguments), arguments)
        with use(channel_delta_rule="portable"):
            found = gradients(compiled(**arguments), arguments)
        assert all(torch.equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (64, 64), (128, 256), (256, 512), (256, 40)])
def test_launches_keep_what_compilers_get_right(K: int, V: int, wide: bool) -> None:
    """Eight warps on 64 rows, and rows below 128 bytes, were wrong on Hopper (notes/triton_pipelines.md). No interpreter sees that."""
    row = pytest.importorskip("gdn.ops.delta_channel.portable")
    plan = row._whole(1, 64, 1, 1, 1, K, V, False, wide)
    for name, launch in row.launches(plan.BK, V, wide, hardware.HOPPER).items():
        assert launch.warps * 16 <= (max(64, launch.block) if name in ("scan", "backward") else 64)
        assert wide or name == "solve" or min(launch.block, plan.BK) >= 64


@pytest.mark.parametrize(
    ("device", "dtype", "row"),
    [*(("cuda", dtype, "portable") for dtype in TRITON.dtypes), ("cuda", torch.float16, "chunked"), ("cpu", torch.float32, "chunked")],
    ids=str,
)
def test_is_the_first_choice_of_a_gpu(device: str, dtype: torch.dtype, row: str) -> None:
    verdicts = OP.explain(device, dtype, K=64, V=64)
    assert next(verdict.name for verdict in verdicts if verdict.reason is None) == row


@gpu
@pytest.mark.parametrize(
    ("H", "HV", "K", "V"), [(1, 2, 40, 24), (2, 2, 64, 64), (2, 4, 128, 128), (1, 1, 200, 400), (1, 1, 256, 512), (1, 1, 256, 40)]
)
def test_head_widths(H: int, HV: int, K: int, V: int) -> None:
    """Blocks of 64 channels and 4 warps among them, where other rules' gradients were wrong on Hopper (test_turned_products.py):
    https://github.com/fla-org/flash-linear-attention/issues/640 and https://github.com/fla-org/flash-linear-attention/issues/984."""
    case = problem(T=300, H=H, HV=HV, K=K, V=V, initial=True, lengths=(130, 0, 170))
    truth = compare.run(OP, "reference", case.build())
    for dtype in TRITON.dtypes:
        rounding = compare.run(OP, "reference", case.build(dtype=dtype))
        actual, again = (compare.run(OP, "portable", case.build(dtype=dtype, device="cuda")) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(actual.tensors, again.tensors)), "another run gave other bits"
        assert compare.complaints(actual, rounding, truth, dtype) == []


@gpu
def test_works_under_a_graph_and_the_default_compiler() -> None:
    arguments = problem(T=200, H=1, HV=2, K=64, V=64, lengths=(130, 70)).build(dtype=torch.bfloat16, device="cuda")
    with use(channel_delta_rule="portable"):
        expected = gradients(channel_delta_rule(**arguments), arguments)
        found = gradients(torch.compile(channel_delta_rule, fullgraph=True)(**arguments), arguments)
        with torch.no_grad():
            plain, graph = channel_delta_rule(**arguments), torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = channel_delta_rule(**arguments)
            graph.replay()
    assert all(torch.equal(a, b) for a, b in zip((*found, *captured), (*expected, *plain)))


@gpu
def test_memory_grows_with_the_length_and_holds_no_state_per_token() -> None:
    def peak(length: int) -> int:
        arguments = problem(T=length, H=2, HV=2, K=128, V=128).build(dtype=torch.bfloat16, device="cuda")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients(call(arguments), arguments)
        return torch.cuda.max_memory_allocated() - before

    once = peak(2048)
    assert peak(4096) < 2.2 * once
    assert once < 2048 * 2 * 128 * 128  # bytes; a state for each token would be twice that in 16 bits
