"""Every Triton row with half and with twice the warps of its launches, against the float64 reference; test_delta_rule.py has more widths.

No interpreter asks for the warps. On a GPU sums over warps, tiles too small for so many and mistakes of compilers show.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch
from on_gpu import gpu

pytest.importorskip("triton")

from every_row import CASES, Case, cut_up, linear_row, rule_row, several_writes, written
from printed import printed
from warps import FACTORS, HELD, MOST, name_of, warps_times

from gdn import ops
from gdn.core import checks, portable_launch
from gdn.core.dispatch import ops as tables
from gdn.core.portable_launch import launch
from gdn.core.replay_known import Table
from gdn.testing import compare

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Check = Callable[..., None]
each = pytest.mark.parametrize("name", CASES)


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cut_up(monkeypatch.setattr)
    yield
    for row in (rule_row, linear_row):
        row.plan.cache_clear()


def agrees(name: str, check: Check, case: Case | None = None) -> None:
    """The row is as right as the tests of its operator want it: `compare` measures problems that say what is trained."""
    case, row = case or CASES[name], getattr(ops, name)
    arguments = case.build(device=DEVICE)
    if any(x.requires_grad for x in compare.named_tensors(arguments).values()):
        truth, rounding = (compare.run(tables()[name], "reference", case.build(dtype)) for dtype in (torch.float64, case.dtype))
        assert compare.complaints(compare.run(tables()[name], "portable", arguments), rounding, truth, case.dtype) == []
    else:
        core = name == "delta_core" and DEVICE == "cuda"  # as in test_portable.py
        check(row, "portable", arguments, beside={name: "composed", "gated_delta_rule": "portable"} if core else None)


@gpu
@pytest.mark.usefixtures("poisoned_memory", "cut", "warps")
@each
def test_results_do_not_depend_on_the_warps(name: str, as_good_as_the_reference: Check) -> None:
    agrees(name, as_good_as_the_reference)


@gpu
@pytest.mark.usefixtures("poisoned_memory", "cut", "warps")
@pytest.mark.parametrize("n", [3, 4])
def test_results_of_more_writes_do_not_depend_on_the_warps(n: int, as_good_as_the_reference: Check) -> None:
    agrees("gated_delta_product", as_good_as_the_reference, several_writes(n))


def test_every_triton_row_is_here() -> None:
    assert set(CASES) == {name for name, op in tables().items() if "portable" in [row.name for row in op.impls]}


@pytest.mark.usefixtures("cut")
def test_held_kernels_are_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)
    assert {name_of(each.kernel) for name in CASES for each in written(name, DEVICE)} > HELD


@pytest.mark.usefixtures("cut")
@each
def test_every_launch_gets_other_warps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every operator, forward and backward. None is so small that half its warps are as many."""
    monkeypatch.setattr(checks, "not_positive", lambda *arguments: None)
    plain = written(name, DEVICE)
    assert plain and all(1 < each.warps < MOST for each in plain)
    for factor in FACTORS.values():
        with warps_times(factor):
            found = written(name, DEVICE)
        held = [factor > 1 and name_of(each.kernel) in HELD for each in plain]
        assert [b.warps for b in found] == [a.warps if same else a.warps * factor for a, same in zip(plain, held, strict=True)]
        assert all(b.registers == (a.registers if same else None) for a, b, same in zip(plain, found, held, strict=True))
        assert [(a.kernel, a.stages) for a in found] == [(b.kernel, b.stages) for b in plain]


@pytest.mark.parametrize(
    ("factor", "asked", "registers", "found"),
    [("half", 4, 168, (2, None)), ("half", 1, 168, (1, 168)), ("twice", 4, 168, (8, None)), ("twice", 16, None, (16, None))],
)
def test_the_compiler_is_asked_for_other_warps(
    factor: str, asked: int, registers: int | None, found: tuple[int, int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as there may be, and registers that are limited for a number of warps only with that number."""
    asking: list[tuple[int, int | None]] = []
    kernel, x = SimpleNamespace(fn=launch), torch.zeros(4)
    monkeypatch.setattr(portable_launch, "JITFunction", object)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(portable_launch, "_launch", lambda what, grid, device: asking.append((what.warps, what.registers)))
    with warps_times(FACTORS[factor]):
        launch(kernel, (1,), x, warps=asked, registers=registers)
    launch(kernel, (1,), x, warps=asked, registers=registers)
    assert asking == [found, (asked, registers)]


def test_replays_with_other_warps_are_forgotten() -> None:
    """They hold compiled code."""
    table = Table()
    table.keep(("before",), 1)
    with pytest.raises(ZeroDivisionError), warps_times(Fraction(2)):
        assert not table
        table.keep(("within",), 1, table.emptied)
        assert table
        raise ZeroDivisionError
    assert not table


PRODUCTS = (
    ["gated_delta_rule", "linear_attention"],
    ["channel_delta_rule", "gated_linear_attention"],
    ["value_gated_linear_attention", "windowed_sigmoid_attention"],
)
"""Operators whose kernels have matrix products, all of them; the other two that do have the gated delta rule's."""


@pytest.mark.slow
@pytest.mark.parametrize("names", PRODUCTS, ids=" ".join)
def test_no_warps_read_beyond_shared_memory_on_hopper(names: list[str]) -> None:
    """In the code that Triton makes for sm_90. With as many warps as they ask for no kernels do; with twice as many those that are held."""
    found = printed("compile_warps.py", *names)
    assert {warps for _, warps, _ in found} == {"as asked", "twice"}
    twice = {(name, products > 0) for name, warps, products in found if warps == "twice"}
    assert [x for x in found if x[1] == "as asked" and x[2]] == []
    assert twice == {(name, name in HELD) for name, _ in twice}


SUMMING = {
    "delta_rule.portable_prepare.gates_kernel",
    "delta_rule.portable_prepare.pair_kernel",
    "delta_rule.portable_scan.summary_kernel",
    "delta_rule.portable_scan.backward_summary_kernel",
    "delta_rule.portable_grad.gradient_kernel",
    "linear_recurrence.portable_heads.gates_kernel",
    "linear_recurrence.portable_heads.gradient_kernel",
}
"""Kernels with running sums."""


@pytest.mark.slow
def test_lanes_of_a_running_sum_are_neighbours_on_hopper() -> None:
    """Where a number of a sum is in several lanes beside each other, Triton 3.6 may let a lane add its own number again."""
    found = printed("compile_scans.py", *CASES)
    assert {name for name, _, _ in found} == SUMMING
    assert [x for x in found if x[1]] == []
    assert all(sums for _, _, sums in found)
