"""Windowed sigmoid attention in Triton against the definition: on a GPU where there is one, in Triton's interpreter on the CPU otherwise.

Fresh memory is poisoned with NaN and so is what surrounds each argument: a row that reads where nobody wrote, or beside a tensor, shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from on_gpu import gpu
from torch import Tensor

from gdn.core.dispatch import use
from gdn.ops import windowed_sigmoid_attention
from gdn.ops.attention import portable
from gdn.ops.attention.problems import WINDOWED, Problem

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Check = Callable[..., None]
WHOLE = (
    Problem(name="tiles seen as a whole", T=75, H=4, G=2, window=50),
    Problem(name="tiles of packed documents seen as a whole", T=75, H=4, G=4, window=45, lengths=(7, 50, 18)),
    Problem(name="tiles of padded rows seen as a whole", B=2, T=40, H=4, G=4, window=60, past=20, start=(0, 27)),
)
"""With small tiles: windows that have edges and an inside."""
PROBLEMS = (*WINDOWED, *WHOLE, Problem(name="saturated", T=100, window=20, size=8.0))
INTERPRETED = ("window of one", "grouped heads, odd sizes", "one query", "padded with keys from before", "packed rows", "empty documents")


def cases() -> list[Any]:
    """Problems, data types and whether tiles are small: all on a GPU, some in the slow interpreter."""
    types = (torch.float32, torch.bfloat16, torch.float16)
    if DEVICE == "cuda":
        return [(p, dtype, small) for p in PROBLEMS for dtype in types for small in (False, True)]
    chosen = [(p, torch.float32, False) for p in PROBLEMS if p.name in INTERPRETED] + [(p, torch.float32, True) for p in WHOLE]
    return chosen + [(p, dtype, True) for p in WHOLE[:1] for dtype in types[1:2]]


def four_heads(problem: Problem) -> Problem:
    """At least four: the gradient of one slope is a sum that cancels, whose relative error alone says little."""
    times = -(-4 // problem.H)
    return problem.with_(H=times * problem.H, G=times * problem.G)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    small = portable.Launch(queries=16, keys=16, warps=4, stages=1)
    return lambda: monkeypatch.setattr(portable, "launches", lambda *_: dict.fromkeys(("forward", "keys", "queries"), small))


@pytest.mark.parametrize(("problem", "dtype", "small"), cases(), ids=lambda x: getattr(x, "name", str(x)))
def test_agrees_with_the_definition(
    problem: Problem, dtype: torch.dtype, small: bool, small_tiles: Callable[[], None], as_good_as_the_reference: Check
) -> None:
    if small:
        small_tiles()
    arguments = four_heads(problem).build(slopes=True, dtype=dtype, device=DEVICE)
    as_good_as_the_reference(windowed_sigmoid_attention, "portable", arguments)


@pytest.mark.parametrize(("K", "V"), [(40, 24), (200, 256)])
def test_head_widths(K: int, V: int, as_good_as_the_reference: Check) -> None:
    problem = Problem(name="", T=20, H=4, G=2, K=K, V=V, window=9)
    for dtype in (torch.float32, torch.bfloat16):
        as_good_as_the_reference(windowed_sigmoid_attention, "portable", problem.build(slopes=True, dtype=dtype, device=DEVICE))


@pytest.mark.parametrize("K", [72, 136])
def test_programs_with_less_shared_memory(K: int, monkeypatch: pytest.MonkeyPatch, as_good_as_the_reference: Check) -> None:
    """With the launches for GPUs for desks."""
    monkeypatch.setattr(portable.hardware, "room", lambda index: portable.hardware.SMALL)
    problem = Problem(name="", T=70, H=4, G=2, K=K, V=40, window=50)
    as_good_as_the_reference(windowed_sigmoid_attention, "portable", problem.build(slopes=True, dtype=torch.bfloat16, device=DEVICE))


def test_reads_slices_of_wider_rows(as_good_as_the_reference: Check) -> None:
    arguments = Problem(name="", B=2, T=40, H=2, G=2, window=9).build(slopes=True, dtype=torch.float32, device=DEVICE)
    rows = torch.cat([arguments[name] for name in ("q", "k", "v")], dim=2)
    q, k, v = rows.split(2, dim=2)
    assert portable.token_rows(q) is q
    as_good_as_the_reference(windowed_sigmoid_attention, "portable", {**arguments, "q": q, "k": k, "v": v})


def test_offsets_of_long_rows(monkeypatch: pytest.MonkeyPatch, small_tiles: Callable[[], None], as_good_as_the_reference: Check) -> None:
    """With heads that share keys, and padding; test_beyond_2_31.py has rows that are long."""
    small_tiles()
    monkeypatch.setattr(portable, "LONG_ROW", 0)
    problem = Problem(name="", B=2, T=40, H=4, G=2, window=30, past=20, start=(0, 27))
    as_good_as_the_reference(windowed_sigmoid_attention, "portable", problem.build(slopes=True, dtype=torch.float32, device=DEVICE))


def test_starts_may_be_a_column_of_a_table(as_good_as_the_reference: Check) -> None:
    arguments = Problem(name="", B=2, T=40, H=4, G=2, window=30, past=20, start=(0, 27)).build(
        slopes=True, dtype=torch.float32, device=DEVICE
    )
    arguments["start"] = torch.stack([arguments["start"], arguments["start"] + 7], dim=1)[:, 0]
    as_good_as_the_reference(windowed_sigmoid_attention, "portable", arguments)


def test_slopes_that_are_not_trained_cost_nothing() -> None:
    def gradients(slopes_too: bool) -> tuple[Tensor, ...]:
        arguments = Problem(name="", T=50, H=2, G=2, window=20).build(slopes=True, dtype=torch.float32, device=DEVICE)
        arguments["slopes"].requires_grad_(slopes_too)
        with use(windowed_sigmoid_attention="portable"):
            o = windowed_sigmoid_attention(**arguments)
        return torch.autograd.grad(o.square().sum(), [arguments[name] for name in ("q", "k", "v")])

    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False)))


def test_saves_nothing_but_its_arguments() -> None:
    arguments = Problem(name="", T=50, H=2, G=2, window=9).build(slopes=True, dtype=torch.float32, device=DEVICE)
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    with hooks, use(windowed_sigmoid_attention="portable"):
        windowed_sigmoid_attention(**arguments)
    given = {t.data_ptr() for t in arguments.values() if isinstance(t, Tensor)}
    assert kept and all(t.data_ptr() in given for t in kept)


@pytest.mark.parametrize("trained", [True, False])
def test_compiles_as_one_graph(trained: bool, as_good_as_the_reference: Check) -> None:
    problem = Problem(name="", T=20, H=4, G=4, window=7, lengths=(12, 1, 7))
    compiled = torch.compile(windowed_sigmoid_attention, fullgraph=True, backend="aot_eager")
    if trained:
        arguments = problem.build(slopes=True, dtype=torch.float32, device=DEVICE)
        as_good_as_the_reference(windowed_sigmoid_attention, "portable", arguments, run=compiled)
        return
    arguments = problem.build(slopes=True, dtype=torch.float32, device=DEVICE)
    arguments["slopes"].requires_grad_(False)
    leaves = [arguments[name] for name in ("q", "k", "v")]
    with use(windowed_sigmoid_attention="portable"):
        eager = torch.autograd.grad(windowed_sigmoid_attention(**arguments).sum(), leaves)
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(compiled(**arguments).sum(), leaves), eager))


def test_no_queries_and_no_keys() -> None:
    arguments = Problem(name="", B=2, T=0, H=4, G=2, V=6, past=3, window=5).build(slopes=True, dtype=torch.float32, device=DEVICE)
    with use(windowed_sigmoid_attention="portable"):
        o = windowed_sigmoid_attention(**arguments)
    assert o.shape == (2, 0, 4, 6)
    assert not any(g.any() for g in torch.autograd.grad(o.sum(), [arguments[name] for name in ("q", "k", "v", "slopes")]))


@gpu
def test_every_run_gives_the_same_bits_and_a_graph_replays_them() -> None:
    arguments = Problem(name="", B=2, T=500, H=4, G=2, K=64, V=64, window=200).build(slopes=True, dtype=torch.bfloat16, device="cuda")
    leaves = [arguments[name] for name in ("q", "k", "v", "slopes")]
    once, again = (torch.autograd.grad(windowed_sigmoid_attention(**arguments).sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))
    with torch.no_grad():
        plain = windowed_sigmoid_attention(**arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = windowed_sigmoid_attention(**arguments)
        graph.replay()
    assert torch.equal(plain, captured)
