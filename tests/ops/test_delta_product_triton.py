"""Several writes a token in Triton against the float64 recurrence: on a GPU, or in Triton's interpreter."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tensor_cores import sums_are_cut
from textbook import textbook_chunks
from torch import Tensor

from gdn.core.dispatch import Impl, use
from gdn.core.foresight import written
from gdn.core.packing import CHUNK
from gdn.ops import gated_delta_product
from gdn.ops.delta_product import OP
from gdn.ops.delta_product.problems import SMALL, Problem
from gdn.ops.delta_product.stretched import through
from gdn.ops.delta_rule import problems as rule
from gdn.testing import compare

portable = pytest.importorskip("gdn.ops.delta_rule.portable")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Arguments = dict[str, Any]


def problem(name: str, n: int, **sizes: Any) -> Problem:
    return Problem(tokens=rule.Problem(**{"name": name, "initial": True, **sizes}), n=n)


PACKED = (
    (problem("packed", 2, T=95, HV=2, lengths=(1, 0, 33, 60, 1)), torch.float32),
    (problem("packed, grouped, odd", 3, T=96, H=1, HV=2, K=5, V=11, lengths=(0, 22, 1, 43, 0, 30)), torch.float32),
    (problem("packed", 3, T=66, H=1, HV=2, lengths=(22, 44)), torch.bfloat16),
    (problem("packed, no initial state", 5, B=2, T=45, lengths=(45, 1, 0, 31, 13), initial=False), torch.bfloat16),
)
TINY = (
    *PACKED,
    (problem("rows", 2, B=2, T=37, H=1, HV=2), torch.bfloat16),
    (problem("rows", 3, B=2, T=45), torch.float32),
    (problem("cleared", 4, T=37, clear_every=5), torch.float32),
    (problem("forgets strongly", 4, T=35, decay=20.0, initial=False), torch.float32),
    (problem("full strength", 3, T=45, decay=0.02, top=2.0, full=True), torch.float32),
    (problem("wide heads", 3, T=25, K=136, V=128), torch.bfloat16),
    (problem("ragged", 4, T=37, HV=2), torch.bfloat16),
    (problem("ragged", 5, T=29), torch.float32),
    (problem("a token is more than a chunk", 70, T=3), torch.float32),
)
"""What Triton's interpreter, which is slow, runs: numbers of writes that divide a chunk and others."""

CLEARS = "forgets strongly, 4 writes"
"""With an initial state, whose gradient in float32 has the error of a decay, the exponential of one number of about -20."""

PARTS = {"whole": (None, None), "segments": (1, None), "slabs": (None, 1), "slabs of segments": (3, 2)}
"""Chunks of a segment, and of a slab of the backward; None for what the rule says, which is one for sizes as small as these."""


def cases() -> list[tuple[str, Problem, torch.dtype]]:
    if DEVICE == "cuda":
        every = [*(p for p in SMALL if p.name != CLEARS), *(p for p, _ in TINY)]
        return [(parts, p, dtype) for parts in PARTS for p in every for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    return [(parts, p, dtype) for parts in PARTS for p, dtype in (TINY if parts == "whole" else PACKED)]


def stretched_textbook(*arguments: Any) -> tuple[Tensor, Tensor]:
    return through(functools.partial(textbook_chunks, narrow=True), *arguments)


OP._functions["textbook"] = stretched_textbook


@functools.cache
def textbook(case: Problem, dtype: torch.dtype, seed: int = 0) -> compare.Results:
    """The rule's chunks over a sequence n times as long, with operands of the same dtype."""
    before = OP.impls
    OP.impls = (*before, Impl("textbook", ""))
    try:
        return compare.run(OP, "textbook", case.build(dtype=dtype, seed=seed))
    finally:
        OP.impls = before


@functools.cache
def reference(case: Problem, dtype: torch.dtype) -> compare.Results:
    return compare.run(OP, "reference", case.build(dtype=dtype))


def surrounded(arguments: Arguments) -> Arguments:
    """Each tensor in the middle of memory that is NaN: whoever reads before or after it is found out."""

    def copy(x: Tensor) -> Tensor:
        around = x.new_full((x.numel() + 8192,), torch.nan)
        return around[4096:-4096].view(x.shape).copy_(x.detach()).requires_grad_(x.requires_grad)

    return {name: copy(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def gradients(outputs: tuple[Tensor, ...], arguments: Arguments) -> tuple[Tensor, ...]:
    leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
    return torch.autograd.grad(outputs, leaves, compare.weights(outputs))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("parts", "case", "dtype"), cases(), ids=lambda x: getattr(x, "name", str(x)))
def test_agrees_with_the_recurrence(parts: str, case: Problem, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and gradients, in one piece, in segments and in slabs: at most twice as wrong as plain torch at this dtype, the recurrence
    or the textbook's chunks."""
    segment, slab = PARTS[parts]
    if segment is not None:
        monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: segment)
    if slab is not None:
        monkeypatch.setattr(portable, "slab_chunks", lambda *sizes: slab)
    portable.plan.cache_clear()
    actual = compare.run(OP, "portable", surrounded(case.build(dtype=dtype, device=DEVICE)))
    portable.plan.cache_clear()
    truth = reference(case, torch.float64)
    wrong = compare.complaints(actual, reference(case, dtype), truth, dtype)
    if wrong:
        wrong = compare.complaints(actual, textbook(case, dtype), truth, dtype)
    assert wrong == []


@pytest.mark.parametrize("parts", ["whole", "segments"])
@pytest.mark.parametrize("seed", [1, 2])
def test_float32_stands_sums_that_tensor_cores_cut(seed: int, parts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their errors all have the sign of the sum, and where keys resemble each other, little is left of X - Phi^T beta X."""
    case = next(p for p in SMALL if p.name == "correlated keys, 3 writes")
    monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: PARTS[parts][0] or 0)
    portable.plan.cache_clear()
    with sums_are_cut():
        actual = compare.run(OP, "portable", case.build(dtype=torch.float32, device=DEVICE, seed=seed))
    portable.plan.cache_clear()
    truth = compare.run(OP, "reference", case.build(seed=seed))
    assert compare.complaints(actual, textbook(case, torch.float32, seed), truth, torch.float32) == []


@pytest.mark.parametrize("n", [4, 8])
def test_decays_see_no_difference_between_the_writes_of_a_token(n: int) -> None:
    """Pairs within a token do not decay. Where all else is forgotten they would leave their rounding to the gradient of g."""
    case = problem("forgets strongly", n, T=70, decay=20.0, HV=2)
    truth, rounding = (compare.run(OP, "reference", case.build(dtype=d))["g"] for d in (torch.float64, torch.float32))
    actual = compare.run(OP, "portable", case.build(dtype=torch.float32, device=DEVICE))["g"]
    assert compare.error(actual, truth) <= compare.allowed(compare.error(rounding, truth), torch.float32)


@pytest.mark.parametrize("used", [0, 1])
def test_one_result_alone_has_its_gradient(used: int) -> None:
    case, found = problem("", 3, T=30, HV=2), []
    for impl, dtype in (("reference", torch.float64), ("reference", torch.float32), ("portable", torch.float32)):
        arguments = case.build(dtype=dtype, device=DEVICE if impl == "portable" else "cpu")
        leaves = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        with use(gated_delta_product=impl):
            result = gated_delta_product(**arguments)[used]
        grads = torch.autograd.grad(result, list(leaves.values()), compare.weights([result]), allow_unused=True, materialize_grads=True)
        found.append(compare.Results(tuple(leaves), tuple(x.double().cpu() for x in grads)))
    truth, rounding, actual = found
    assert compare.complaints(actual, rounding, truth, torch.float32) == []


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("n", [*range(1, 9), 16, 21, 22, 63, 64, 65, 200])
def test_all_tokens_of_a_chunk_have_a_row(n: int, wide: bool) -> None:
    """The tile of a chunk's reads begins with the token of its first write, and has room for the last that is read or begins there."""
    rows = portable.chunk_reads(n, wide)
    assert rows >= 16 and rows & (rows - 1) == 0
    for first in range(0, 20 * CHUNK, CHUNK):
        writes = range(first, first + CHUNK)
        tokens = [r // n for r in writes if r % n == 0 or r % n == n - 1]
        assert all(0 <= t - first // n < rows for t in tokens)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_queries_decays_and_what_is_read_are_not_stretched(n: int) -> None:
    """In memory there is one row of them a token, and at most 64 / n, rounded up to a power of two and to 16, a chunk of scores."""
    dtype = torch.bfloat16
    B, T, H, HV, K, V = 2, 60, 1, 2, 16, 24
    q, k, v = (torch.empty(B, *size, dtype=dtype) for size in ((T, H, K), (T * n, H, K), (T * n, HV, V)))
    g, beta = torch.empty(B, T, HV), torch.empty(B, T * n, HV)
    arguments = (q, k, v, g, beta, None, None, None, None, 1.0, n)
    results, launches = written(portable._forward, *arguments, True)
    assert results[0].shape == (B, T, HV, V)
    launches += written(portable._backward, arguments, results[2:], [results[0], None])[1]
    sizes = {"q": T * H * K, "dq": T * H * K, "o": T * HV * V, "do": T * HV * V, "g": T * HV, "dg": 2 * T * HV, "dv": T * n * HV * V}
    rows = {1: 64, 2: 32, 3: 32, 4: 16, 5: 16}[n]
    chunks = -(-T * n // CHUNK)
    sizes |= {"scores": chunks * HV * rows * CHUNK, "d_scores": chunks * HV * rows * CHUNK, "pairs": chunks * HV * CHUNK * CHUNK}
    seen = set()
    for what in launches:
        for parameter, value in zip(what.kernel.arg_names, what.args, strict=True):
            if parameter in sizes:
                seen.add(parameter)
                assert value.numel() == B * sizes[parameter], (what.kernel, parameter)
    assert seen == set(sizes)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("n", "segment"), [(2, 0), (3, 1), (5, 2)])
def test_the_same_bits_in_a_compiled_graph(n: int, segment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed: there the chunk table has rows beyond the end."""
    monkeypatch.setattr(portable, "segment_chunks", lambda *sizes: segment)
    portable.plan.cache_clear()
    torch._dynamo.reset()
    found = []
    for run in (gated_delta_product, torch.compile(gated_delta_product, fullgraph=True, backend="aot_eager")):
        arguments = problem("", n, T=40, HV=2, lengths=(15, 25, 0)).build(dtype=torch.float32, device=DEVICE)
        with use(gated_delta_product="portable"):
            outputs = run(**arguments)
            found.append((*outputs, *gradients(outputs, arguments)))
    portable.plan.cache_clear()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_one_write_gives_the_bits_of_the_gated_delta_rule() -> None:
    found = []
    for squeezed in (False, True):
        arguments = problem("", 1, T=70, HV=2).build(dtype=torch.bfloat16, device=DEVICE)
        if squeezed:
            arguments |= {name: arguments[name].squeeze(2).detach().requires_grad_() for name in ("k", "v", "beta")}
            rest = (0.5, arguments["initial_state"], None)
            outputs = portable.gated_delta_rule(*[arguments[name] for name in ("q", "k", "v", "g", "beta")], *rest)
        else:
            with use(gated_delta_product="portable"):
                outputs = gated_delta_product(**arguments, scale=0.5)
        found.append([x.flatten() for x in (*outputs, *gradients(outputs, arguments))])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
