"""Launches handed to the driver in one call, on a driver that writes down what it is asked for. The real one is asked by
tests/ops/test_replayed_operators.py."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gdn.core import portable_plan
from gdn.core.portable_plan import Kernel, of_compiled, plan

FIRST = Kernel("first", 0x8848, 128, 512, ("*", "i", None))
SECOND = Kernel("second", 0x88488, 64, 0, ("*", "*", "f"))
HALF = struct.unpack("I", struct.pack("f", 0.5))[0]
LAUNCHES: Any = [(FIRST, (2, 3, 4), [(1, 16), [7], [None]]), (SECOND, (5, 1, 1), [(0, 0), (1, 0), [0.5]])]


def made(addresses: int = 2) -> Callable[..., None]:
    start = plan(LAUNCHES, addresses)
    assert start is not None
    return start


def one_by_one(stream: int, a: int, b: int) -> list[str]:
    return [f"{stream}: {each}" for each in kernels(a, b)]


def graph(stream: int, a: int, b: int) -> list[str]:
    return [f"{stream}: graph {' '.join(kernels(a, b))}"]


def kernels(a: int, b: int) -> list[str]:
    return [f"8848(2,3,4,128,512: {b + 16} 7 0 0)", f"88488(5,1,1,64,0: {a} {b} {HALF} 0 0)"]


def test_kernels_are_a_graph_from_the_third_call_on(driver: Any) -> None:
    start = made()
    for n in range(2):
        start(5, 1000 + n, 2000)
        assert driver.log() == one_by_one(5, 1000 + n, 2000)
    start(5, 3000, 4000)
    assert driver.log() == ["mode 2", "mode 0", *graph(5, 3000, 4000)]
    start(5, 2**63, 2000)
    assert driver.log() == graph(5, 2**63, 2000)
    assert driver.living() == 2
    driver.log()
    del start
    assert driver.living() == 0
    assert driver.log() == ["mode 2", "exec destroyed", "graph destroyed", "mode 0"]


@pytest.mark.parametrize("what", ["a plan", "a product"])
def test_a_thread_that_has_no_context_gets_the_last_one(what: str, driver: Any) -> None:
    """Before cuBLAS's handle is asked for, which torch warns of otherwise."""
    driver.context(7)
    asked, seen = list[int](), list[int]()

    def handle() -> int:
        asked.append(driver.current())
        return 3

    start = made() if what == "a plan" else portable_plan.module().product(driver.library, handle, 0, 0, 14, 14, 1, 0, 5, 6, 7, 8, 9, 10)
    if what == "a product":
        start(1, 2, 3)

    def first() -> None:
        for context in (0, 3, 0):
            driver.context(context)
            start(5, 1, 2)
            seen.append(driver.current())

    thread = threading.Thread(target=first)
    thread.start()
    thread.join()
    assert seen == [7, 3, 3] and driver.current() == 7
    assert asked == ([] if what == "a plan" else [7, *seen])


def test_nodes_are_told_what_has_changed(driver: Any) -> None:
    """Also by a call that was launched one by one in between."""
    start = made()
    driver.told()
    told = []
    for stream, a, b in [(5, 1, 2)] * 3 + [
        (5, 1, 2),
        (5, 3, 2),
        (5, 3, 4),
        (5, 3, 4),
        (6, 7, 8),
        (5, 7, 8),
        (5, 3, 4),
        (6, 1, 1),
        (5, 3, 4),
    ]:
        driver.log()
        start(stream, a, b)
        assert [line for line in driver.log() if "mode" not in line][-1] in (graph(stream, a, b)[0], one_by_one(stream, a, b)[-1])
        told.append(driver.told())
    assert told == [0, 0, 0, 0, 1, 2, 0, 0, 2, 2, 0, 2]
    start(5, 3, 4 + 2**32)
    assert driver.told() == 2 and driver.log()[-1:] == graph(5, 3, 4 + 2**32)


def test_a_graph_without_memory_is_given_up(driver: Any) -> None:
    start = made()
    driver.fail("cuGraphLaunch", 2)
    for _ in range(3):
        driver.log()
        start(5, 1, 2)
    assert driver.log() == ["mode 2", "mode 0", *graph(5, 1, 2), *one_by_one(5, 1, 2)]
    driver.fail("")
    start(5, 1, 2)
    assert driver.log() == one_by_one(5, 1, 2)


def test_a_graph_follows_its_stream(driver: Any) -> None:
    """To another one after three calls in a row; until then, and where two streams take turns, kernels are launched one by one there."""
    start = made()
    for _ in range(3):
        start(5, 1, 2)
    for _ in range(4):
        driver.log()
        start(0, 1, 2)
        assert driver.log() == one_by_one(0, 1, 2)
        start(5, 1, 2)
        assert driver.log() == graph(5, 1, 2)
    for _ in range(2):
        start(6, 1, 2)
        assert driver.log() == one_by_one(6, 1, 2)
    for _ in range(2):
        start(6, 1, 2)
        assert driver.log() == graph(6, 1, 2)
    start(5, 1, 2)
    assert driver.log() == one_by_one(5, 1, 2)


def test_capture_sees_launches(driver: Any) -> None:
    start = made()
    driver.capture(True)
    for _ in range(4):
        start(5, 1, 2)
        assert driver.log() == one_by_one(5, 1, 2)
    driver.capture(False)
    for _ in range(3):
        start(5, 1, 2)
    assert driver.log()[-1:] == graph(5, 1, 2)
    driver.capture(True)
    start(5, 3, 4)
    assert driver.log() == one_by_one(5, 3, 4)


@pytest.mark.parametrize(
    "name", ["cuStreamIsCapturing", "cuGraphCreate", "cuGraphAddKernelNode", "cuGraphInstantiate", "cuGraphExecKernelNodeSetParams"]
)
def test_without_a_graph_kernels_are_launched_one_by_one(name: str, driver: Any) -> None:
    start = made()
    driver.fail(name)
    for n in range(5):
        driver.log()
        start(5, n, 2)
        assert [line for line in driver.log() if "mode" not in line] == (
            graph(5, n, 2) if (n, name) == (2, "cuGraphExecKernelNodeSetParams") else one_by_one(5, n, 2)
        )
    del start
    assert driver.living() == 0


@pytest.mark.parametrize("name", ["cuLaunchKernelEx", "cuGraphLaunch"])
def test_errors_are_raised(name: str, driver: Any) -> None:
    start = made()
    driver.fail(name)
    with pytest.raises(RuntimeError, match=r"CUDA could not launch 2 kernels: an illegal address \(700\)"):
        for _ in range(3):
            start(5, 1, 2)
    assert len([line for line in driver.log() if "mode" not in line]) == (1 if name == "cuLaunchKernelEx" else 5)
    driver.fail("")
    start(5, 1, 2)


def test_only_so_many_graphs_are_made_at_a_time(driver: Any) -> None:
    starts = [made() for _ in range(300)]
    for _ in range(3):
        driver.log()
        for start in starts:
            start(5, 1, 2)
    assert sum("graph" in line for line in driver.log()) == 256
    late = starts[-1]
    del start, starts
    for _ in range(3):
        assert driver.living() == 0
        driver.log()
        late(5, 1, 2)
    assert driver.log() == ["mode 2", "mode 0", *graph(5, 1, 2)]


def test_wrong_calls_are_errors(driver: Any) -> None:
    start = made()
    with pytest.raises(TypeError, match="expected a stream and 2 addresses, got 2 arguments"):
        start(5, 1)
    with pytest.raises(TypeError):
        start(5, 1, "address")
    with pytest.raises(OverflowError):
        start(5, 1, -1)
    assert driver.log() == []


OTHERS = {"fewer": {"function": 0x848}, "more": {"function": 0x88848}, "wider": {"kinds": ("*", "q", None)}}


@pytest.mark.parametrize("kernel", [FIRST._replace(**other) for other in OTHERS.values()], ids=OTHERS)
def test_kernels_with_other_parameters_are_left_to_triton(kernel: Kernel, driver: Any) -> None:
    assert plan([(kernel, (1, 1, 1), [(0, 0), [1], [None]])], 1) is None
    assert plan([(FIRST, (1, 1, 1), [(0, 0), [1], [None]])], 257) is None
    assert plan([(FIRST, (1, 1, 1), [(0, 0), [1], [None]])], -1) is None
    assert plan([(FIRST, (1, 1, 1), [(0, 0), [2**40], [None]])], 1) is None
    assert plan([(FIRST, (1, 1, 1), [(1, 0), [1], [None]])], 1) is None
    assert plan([(FIRST, (1, 1, 1), [(0, 0), [1], [None]])], 1) is not None


def test_no_module_no_plan(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **named: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")

    with monkeypatch.context() as patch:
        patch.setattr("triton.runtime.build.compile_module_from_src", fails)
        assert plan(LAUNCHES, 2) is None and portable_plan.module() is None
        assert portable_plan.why_not() == "launches.c cannot be compiled or loaded: Failed to find C compiler."
    monkeypatch.setattr(portable_plan, "_found", [])
    monkeypatch.setattr(torch.version, "cuda", None)
    assert plan(LAUNCHES, 2) is None and portable_plan.why_not() == "this torch is not for CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(portable_plan, "_found", [])
    assert portable_plan.why_not() == "" and portable_plan.module() is not None


@triton.jit
def many_kinds_kernel(x, y, one, n, large, factor, flag, nothing, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i * one + large, tl.load(x + i, mask=i < n) * factor + flag, mask=i < n)


def test_kernels_are_described_as_triton_compiles_them() -> None:
    code = many_kinds_kernel if isinstance(many_kinds_kernel, triton.JITFunction) else triton.JITFunction(many_kinds_kernel.fn)
    constant = dict.fromkeys(("one", "nothing", "BLOCK"), "constexpr")
    types = {
        "x": "*bf16",
        "y": "*fp32",
        "one": "",
        "n": "i32",
        "large": "i64",
        "factor": "fp32",
        "flag": "i1",
        "nothing": "",
        "BLOCK": "",
    } | constant
    source = ASTSource(code, types, {"one": 1, "nothing": None, "BLOCK": 64})
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 2})
    handle = SimpleNamespace(metadata=compiled.metadata, src=compiled.src, function=9)
    found = of_compiled(handle)
    assert found is not None and found == Kernel(
        "many_kinds_kernel", 9, 64, compiled.metadata.shared, ("*", "*", None, "i", "q", "f", "b", None, None)
    )
    kernel_parameters = [line for line in compiled.asm["ptx"].splitlines() if line.startswith("\t.param")]
    assert len(kernel_parameters) == sum(kind is not None for kind in found.kinds) + portable_plan._SCRATCH
    for name, other in (("num_ctas", 2), ("launch_pdl", True), ("global_scratch_size", 8)):
        assert of_compiled(SimpleNamespace(metadata=compiled.metadata._replace(**{name: other}), src=compiled.src, function=9)) is None
    types |= {"x": "tensordesc<bf16[64]>"}
    assert of_compiled(SimpleNamespace(metadata=compiled.metadata, src=SimpleNamespace(signature=types, fn=code), function=9)) is None
