"""Products by cuBLAS, asked for without torch and as parts of plans, on a driver and a cuBLAS that write down what they are asked for.

The real ones are asked by tests/ops/test_replayed_operators.py."""

from __future__ import annotations

import contextlib
import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from gdn.core import portable_plan, portable_product
from gdn.core.portable_plan import Kernel, Nodes, plan


@pytest.mark.parametrize("fails", [False, True])
def test_a_product_found_out_in_a_thread_that_has_no_context_gets_the_primary_one(fails: bool, driver: Any) -> None:
    driver.context(0)
    if fails:
        driver.fail("cuDevicePrimaryCtxRetain", 2)
    multiply = portable_plan.module().product(driver.library, lambda: driver.current(), 5, 0, 14, 14, 0, 1, 5, 6, 7, 8, 9, 10)
    multiply(1, 2, 3)
    assert driver.current() == (0 if fails else 105) and driver.log()[0] == f"{driver.current()}: math 0"
    driver.context(1)
    multiply(1, 2, 3)
    assert driver.current() == 1


def test_a_product_is_handed_to_cublas_in_one_call(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose first factor is our second: it goes by columns."""
    numbers = (14, 0, 1, 0, 5, 6, 7, 8, 9, 10)  # dtypes, turned or not, sizes, from column to column
    product, handles = portable_plan.module().product, [2**63, 4]  # the fake driver has what of cuBLAS is asked for
    for beta, (a, b, c) in enumerate([(1000, 2000, 2**63), (10, 20, 30)]):
        product(driver.library, lambda beta=beta: handles[beta], 0, beta, *numbers)(a, b, c)
        made = f"{handles[beta]}: 5x6x7 1*{b}(1,14,8)*{a}(0,14,9)+{beta}*{c}(0,10) by 68 with 99"
        assert driver.log() == [f"{handles[beta]}: math 0", made]
    multiply = product(driver.library, handles.pop, 0, 0, *numbers)
    driver.fail("cublasGemmEx", 13)
    with pytest.raises(RuntimeError, match=r"cuBLAS could not multiply \[6, 7\] by \[7, 5\]: status 13"):
        multiply(1, 2, 3)
    assert len(driver.log()) == 2
    driver.fail("cublasSetMathMode", 1)
    with pytest.raises(RuntimeError, match=r"status 1$"):
        multiply(1, 2, 3)
    assert driver.log() == [f"{2**63}: math 0"]
    with pytest.raises(IndexError, match="pop from empty list"):
        multiply(1, 2, 3)
    with pytest.raises(TypeError, match="expected 3 addresses, got 2 arguments"):
        multiply(1, 2)
    for wrong, problem in (("address", TypeError), (-(2**64), OverflowError)):
        with pytest.raises(problem):
            multiply(1, 2, wrong)
    with pytest.raises(TypeError):
        product(driver.library, lambda: "handle", 0, 0, *numbers)(1, 2, 3)
    assert driver.log() == []
    with pytest.raises(ImportError, match=r"libcublas\.so\.0 is not loaded"):
        product("libcublas.so.0", int, 0, 0, *numbers)
    with pytest.raises(ImportError, match=r"libc\.so\.6 has no cublasGemmEx or no cublasSetMathMode"):
        product("libc.so.6", int, 0, 0, *numbers)
    monkeypatch.setattr(torch.version, "cuda", "0.5")
    assert portable_product._multiply(0, 0, *numbers) is None


def test_a_product_keeps_no_handle(driver: Any) -> None:
    handle = 2**62
    before = sys.getrefcount(handle)
    multiply = portable_plan.module().product(driver.library, lambda: handle, 0, 0, 14, 14, 0, 1, 5, 6, 7, 8, 9, 10)
    for _ in range(5):
        multiply(1, 2, 3)
    assert sys.getrefcount(handle) == before and f"{handle}: math 0" in driver.log()


def test_what_a_product_calls_lives_as_long_as_it(driver: Any) -> None:
    class Handle:
        def __call__(self) -> int:
            return 3

    seen = weakref.ref(handle := Handle())
    multiply = portable_plan.module().product(driver.library, handle, 0, 0, 14, 0, 1, 0, 5, 6, 7, 8, 9, 10)
    del handle
    multiply(1, 2, 3)
    assert driver.log()[0] == "3: math 0" and seen() is not None
    del multiply
    assert seen() is None


NUMBERS = (14, 0, 1, 0, 5, 6, 7, 8, 9, 10)
MOST = 32 << 20


def made(driver: Any, does: str, workspace: int = 0, over: tuple[int, int, int] = (0, 0, 0), most: int = MOST) -> tuple[Any, int] | None:
    """What the fake cuBLAS has the GPU do in a product."""
    driver.cublas(does, workspace)
    handles: list[int] = []
    multiply = portable_plan.module().product(driver.library, lambda: handles.append(3) or 3, 0, 0, *NUMBERS)
    driver.log()
    found = portable_plan.module().nodes(multiply, most, *over)
    lines = driver.log()
    assert [lines[0], lines[-1]] == ["mode 2", "mode 0"]
    assert len(handles) == 2 and (
        len(lines) == 2 or lines[-2] == "3: stream 0"
    )  # the second time it gets torch's stream and workspace again
    assert driver.living() == 0
    return found


def words(a: int, b: int, c: int, workspace: int) -> str:
    """What the fake cuBLAS hands to its kernel."""
    return " ".join(f"{word:x}" for word in (a, 0x1234567890, b, c + 64, workspace + 16, a, 7))


KERNEL = Kernel("first", 0x8848, 128, 512, ("*", "i", None))


def test_what_cublas_does_is_part_of_a_plan(driver: Any) -> None:
    """With other addresses each time, in a graph and outside of it."""
    found = made(driver, "fills its workspace", 256)
    assert found is not None and found[1] == 256
    arguments: Any = [(2, 0), (0, 32), (1, 8), (3, 512)]
    start = plan(
        [(KERNEL, (1, 1, 1), [(1, 0), [5], [None]]), (Nodes(*found), (), arguments), (KERNEL, (4, 1, 1), [(1, 8), [6], [None]])], 4
    )
    del found
    assert start is not None
    driver.log()
    for n in range(5):
        b, c, a, w = addresses = [1000 * n + 16 * i for i in range(4)]
        start(5, *addresses)
        steps = [
            f"8848(1,1,1,128,512: {c} 5 0 0)",
            f"488(1,1,1,128,0: {w + 512 + 256} 4 0)",
            f"100(5,2,3,128,640: {words(a, b + 32, c + 8, w + 512)}) 4=2",
            f"8848(4,1,1,128,512: {c + 8} 6 0 0)",
        ]
        lines = [line for line in driver.log() if "mode" not in line]
        assert lines == ([f"5: {step}" for step in steps] if n < 2 else [f"5: graph {' '.join(steps)}"])


def test_kernels_of_cublas_with_known_parameters_are_parts_of_plans_too(driver: Any) -> None:
    found = made(driver, "without workspace", over=(2, 4, 6))
    assert found is not None and found[1] == 0
    start = plan([(Nodes(*found), (), [(0, 0), (1, 0), (2, 0)])], 3)
    assert start is not None
    driver.log()
    start(5, 100, 200, 300)
    assert driver.log() == ["5: 84888(9,2,3,128,640: 100 200 300 41 308)"]


def test_cublas_sees_where_matrices_lie(driver: Any) -> None:
    """The last bits of their addresses, by which it chooses kernels."""
    found = made(driver, "its grid by the last bits", over=(2, 4, 6))
    assert found is not None
    start = plan([(Nodes(*found), (), [(0, 0), (1, 0), (2, 0), (3, 0)])], 4)
    assert start is not None
    driver.log()
    start(5, 100, 200, 300, 1024)
    assert driver.log()[0].startswith(f"5: 100({1 + 2 + 16 * 4 + 256 * 6},2,3,128,640:")


def test_all_that_a_launch_has_is_handed_on(driver: Any) -> None:
    found = made(driver, "prefers clusters")
    assert found is not None
    start = plan([(Nodes(*found), (), [(0, 0), (1, 0), (2, 0), (3, 0)])], 4)
    assert start is not None
    for _ in range(3):
        driver.log()
        start(5, 100, 200, 300, 1024)
        assert driver.log()[-1].endswith(") 4=2 11=8")


def test_no_more_workspace_is_tried_than_torch_gives(driver: Any) -> None:
    found = made(driver, "fills its workspace", 257, most=300)
    assert found is not None and found[1] == 300


def test_each_byte_is_filled_by_a_thread(driver: Any) -> None:
    found = made(driver, "fills a lot")
    assert found is not None
    start = plan([(Nodes(*found), (), [(0, 0), (1, 0), (2, 0), (3, 0)])], 4)
    assert start is not None
    driver.log()
    start(5, 100, 200, 300, 1024)
    assert driver.log()[0] == "5: 488(8,1,1,128,0: 1280 1000 3)"


@pytest.mark.parametrize(("least", "given"), [(0, 256), (256, 256), (257, 1 << 16), (1 << 20, 1 << 20), ((1 << 22) + 1, MOST)])
@pytest.mark.parametrize("does", ["fills its workspace", "more than its workspace"])
def test_cublas_gets_the_workspace_that_it_needs_to_do_the_same(does: str, least: int, given: int, driver: Any) -> None:
    found = made(driver, does, least)
    assert found is not None and found[1] == given


@pytest.mark.parametrize(
    "does",
    [
        "nothing",
        "kernels by alignment",
        "its grid",
        "its second dimension",
        "its threads",
        "its shared memory",
        "its cluster",
        "more the third time",
        "not all matrices",
        "no parameters",
        "unknown parameters",
        "joins",
        "rows of zeros",
        "no zeros",
        "fills far too much",
        "something else each time",
        "another address of the device",
        "an address between two words",
        "an address at the end",
        "something unknown",
        "something that is no kernel",
        "no function",
        "branches",
        "too much",
        "numbers",
    ],
)
def test_what_is_not_known_for_sure_is_left_to_cublas(does: str, driver: Any) -> None:
    assert made(driver, does) is None
    assert made(driver, "fills its workspace") is not None


@pytest.mark.parametrize(
    "name",
    [
        "cuStreamCreate",
        "cuStreamBeginCapture",
        "cuStreamEndCapture",
        "cuGraphGetNodes",
        "cuGraphNodeGetDependencies",
        "cuGraphNodeGetType",
        "cuGraphKernelNodeGetParams",
        "cuGraphMemsetNodeGetParams",
        "cublasSetStream",
        "cublasSetWorkspace",
        "cublasSetMathMode",
        "cublasGemmEx",
        "cuModuleLoadData",
        "cuModuleGetFunction",
    ],
)
def test_without_a_capture_products_are_left_to_cublas(name: str, driver: Any) -> None:
    driver.context(int.from_bytes(name.encode()[-7:], "little"))  # one that has not been used before
    driver.fail(name)
    assert made(driver, "fills its workspace") is None
    driver.fail("")
    assert made(driver, "fills its workspace") is not None


@pytest.mark.parametrize("name", ["cuGraphKernelNodeSetAttribute", "cuGraphExecKernelNodeSetParams"])
def test_without_a_graph_it_is_launched_one_by_one(name: str, driver: Any) -> None:
    found = made(driver, "fills its workspace")
    assert found is not None
    start = plan([(Nodes(*found), (), [(0, 0), (1, 0), (2, 0), (3, 0)])], 4)
    assert start is not None
    driver.fail(name)
    for n in range(5):
        driver.log()
        start(5, 100 + n, 200, 300, 1024)
        expected = ["488(1,1,1,128,0: 1280 4 0)", f"100(5,2,3,128,640: {words(100 + n, 200, 300, 1024)}) 4=2"]
        in_graph = (n, name) == (2, "cuGraphExecKernelNodeSetParams")
        lines = [line for line in driver.log() if "mode" not in line]
        assert lines == ([f"5: graph {' '.join(expected)}"] if in_graph else [f"5: {each}" for each in expected])
    del start
    assert driver.living() == 0


def test_nodes_get_all_the_addresses_that_they_need(driver: Any) -> None:
    found = made(driver, "fills its workspace")
    assert found is not None
    for wrong in ([(0, 0), (1, 0), (2, 0)], [(0, 0), (1, 0), (2, 0), (4, 0)], [(0, 0), (-1, 0), (2, 0), (3, 0)]):
        assert plan([(Nodes(*found), (), wrong)], 4) is None
    library = portable_plan.module()
    with pytest.raises(TypeError):
        library.nodes(len, MOST, 0, 0)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer called with"):
        library.nodes(plan([], 0), MOST, 0, 0, 0)
    with pytest.raises(ValueError, match="PyCapsule_GetPointer called with"):
        library.plan(((library.product, ()),), 0)
    with pytest.raises(IndexError, match="pop from empty list"):
        library.nodes(library.product(driver.library, [].pop, 0, 0, *NUMBERS), MOST, 0, 0, 0)
    handles = [3]
    with pytest.raises(IndexError, match="pop from empty list"):
        library.nodes(library.product(driver.library, handles.pop, 0, 0, *NUMBERS), MOST, 0, 0, 0)
    assert driver.living() == 0


def test_users_who_give_cublas_a_workspace_keep_it(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    devices: list[Any] = []
    a, b, c = torch.zeros(20, dtype=torch.bfloat16)[1:], torch.zeros(20), torch.zeros(20, dtype=torch.bfloat16)[3:]
    library = SimpleNamespace(nodes=lambda *given: asked.append(given) or ("chain", 7))
    monkeypatch.setattr(portable_plan, "module", lambda: library)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: devices.append(x) or contextlib.nullcontext())
    for generation, most in ((8, 8320 << 10), (9, MOST), (10, None), (12, None)):
        monkeypatch.setattr(portable_product, "capability", lambda device, generation=generation: 10 * generation if device == -1 else 0)
        assert portable_product.nodes(len, a, b, c) == (None if most is None else Nodes("chain", 7))
        assert devices.pop() is a
        assert most is None or asked.pop() == (len, most, a.data_ptr() & 15, b.data_ptr() & 15, c.data_ptr() & 15)
        assert portable_product.workspace_as_now() == {}
        with monkeypatch.context() as patch:
            patch.setattr(portable_product, "_given", lambda: 12345)
            assert portable_product.nodes(len, a, b, c) == Nodes("chain", 7) and asked.pop()[1] == 12345
            ((ask, answer),) = portable_product.workspace_as_now().items()
            assert answer is ask() is True and portable_product.workspace_as_now() == {ask: True}
            patch.setattr(portable_product, "_given", lambda: 123)
            assert ask() is False and ask not in portable_product.workspace_as_now()
    monkeypatch.setattr(portable_product, "capability", lambda device: 90)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert portable_product.nodes(len, a, b, c) is None
    with monkeypatch.context() as patch:
        patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        assert portable_product.nodes(len, a, b, c) is None
    assert not asked
    library.nodes = lambda *given: None
    assert portable_product.nodes(len, a, b, c) is None
    monkeypatch.setattr(portable_plan, "module", lambda: None)
    assert portable_product.nodes(len, a, b, c) is None
