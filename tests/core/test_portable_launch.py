"""What the hosts of Triton kernels rely on: keys of compiled code, and tensors as rows."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.backends.nvidia.driver import CudaLauncher

from gdn.core import portable_launch
from gdn.core.foresight import foreseeing, without_data, written
from gdn.core.portable_launch import Launch, _kinds, compile_ahead, integer_kind, launch, starter
from gdn.core.portable_rows import token_rows


class Kernel:
    """Stands for a kernel whose parameters are constants of the code or not."""

    def __init__(self, *constant: bool) -> None:
        self.params = [SimpleNamespace(is_constexpr=each, do_not_specialize=False) for each in constant]
        self.fn = lambda: None


def kinds(argument: Any, constant: bool = False) -> Any:
    return tuple(_kinds(Kernel(constant), (argument,))[0])


def test_kinds_of_integers_have_different_keys() -> None:
    """One is compiled in as a constant, so its code must serve no multiple of 16; as a key, `True` would be 1."""
    for large in (2**31, -(2**31) - 16):
        assert len({integer_kind(n) for n in (1, 16, 17, large + 1, large)}) == 5
        assert len({kinds(n) for n in (1, 16, 17, large + 1, large)}) == 5
    assert integer_kind(16) == integer_kind(0) == integer_kind(64) == integer_kind(-32)
    assert integer_kind(-100) == integer_kind(-1) == integer_kind(17)
    assert integer_kind(-(2**31)) == 16 and kinds(-(2**31)) == kinds(16) != kinds(2**31)
    assert kinds(17, constant=True) != kinds(18, constant=True)


def test_an_integer_that_triton_does_not_specialise_on_has_one_kind() -> None:
    kernel = Kernel(False)
    kernel.params[0].do_not_specialize = True
    assert len({tuple(_kinds(kernel, (n,))[0]) for n in (1, 16, 17)}) == 1
    assert len({tuple(_kinds(kernel, (n,))[0]) for n in (1, 2**32)}) == 2


def test_kinds_of_tensors_are_their_dtype_and_whether_they_are_aligned() -> None:
    x = torch.zeros(64)
    assert kinds(x) == kinds(x[4:]) == kinds(torch.ones(3, 5))
    assert len({kinds(each) for each in (x, x[1:], x.half(), x.half()[1:], None)}) == 5
    assert kinds(0.5) == kinds(2.0) != kinds(2)


def test_compiled_kernels_get_addresses() -> None:
    x = torch.zeros(64)
    args = (x, None, 3, x[1:], 0.5, 7)
    assert _kinds(Kernel(False, False, False, False, False, True), args)[1] == [x.data_ptr(), None, 3, x.data_ptr() + 4, 0.5, 7]


def test_a_wrong_number_of_arguments_is_named() -> None:
    with pytest.raises(TypeError, match="expected 2 arguments, got 3"):
        _kinds(Kernel(False, False), (1, 2, 3))


def test_rows_of_one_token_have_the_stride_of_a_token() -> None:
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 1, 8).transpose(1, 2)
    assert x.is_contiguous() and x.stride(1) == 8
    rows = token_rows(x)
    assert torch.equal(rows, x) and rows.stride() == (24, 24, 8, 1)


class Compiled(portable_launch.JITFunction):
    """Stands for a kernel of two parameters that is to be compiled, together with others, and notes what is compiled and launched."""

    def __init__(self, meet: threading.Barrier, seen: list[Any], error: Exception | None = None) -> None:
        self.fn = lambda: None
        self.params = [SimpleNamespace(is_constexpr=False, do_not_specialize=each) for each in (False, True)]
        self.meet, self.seen, self.error = meet, seen, error

    def warmup(self, *args: Any, grid: Any, **options: Any) -> Any:
        self.meet.wait(timeout=10)
        if self.error is not None:
            raise self.error
        self.seen.append(("compiled", self.fn, options))
        return SimpleNamespace(function=123, packed_metadata=(4, 1, 0), run=self.run, src=self.fn, metadata="metadata")

    def run(self, *handed: Any) -> None:
        self.seen.append(("launched", self.fn, handed))


@pytest.fixture
def launchers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No GPU is needed. Kernels whose launchers have been made."""
    made: list[Any] = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 99, raising=False)
    monkeypatch.setattr(portable_launch.hardware, "capability", lambda index: 0)  # the CPU, device -1, has none
    active = SimpleNamespace(get_current_device=lambda: 0, launcher_cls=lambda src, metadata: made.append(src))
    monkeypatch.setattr(portable_launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(portable_launch, "_COMPILED", {})
    monkeypatch.setattr(portable_launch, "_COMPILING", {})
    monkeypatch.setattr(portable_launch, "_CORES", threading.Semaphore(3))
    return made


def test_what_is_foreseen_compiles_at_the_same_time_and_once(launchers: list[Any]) -> None:
    """Three kernels meet while they compile. The first is launched without waiting for the others to be launched."""
    seen: list[Any] = []
    meet = threading.Barrier(3)
    a, b, c = (Compiled(meet, seen) for _ in range(3))
    x, options = torch.zeros(4), {"warps": 4, "stages": 2, "registers": 168}

    def more() -> Any:
        yield written(lambda: [launch(kernel, (1,), without_data(x), 3, **options) for kernel in (a, b, c, c)])[1]

    with foreseeing(more):
        launch(a, (7,), x, 3, **options)
    assert ("launched", a.fn, (7, 1, 1, 99, 123, (4, 1, 0), None, None, None, x.data_ptr(), 3)) in seen
    for kernel in (b, c):
        launch(kernel, (1,), x, 5, **options)
    compiled = [each for each in seen if each[0] == "compiled"]
    assert {fn for _, fn, _ in compiled} == {a.fn, b.fn, c.fn} and len(compiled) == 3 and len(seen) == 6
    assert set(launchers) == {a.fn, b.fn, c.fn} and len(launchers) == 3
    assert all(each[2] == {"num_warps": 4, "num_stages": 2, "maxnreg": 168} for each in compiled)


def test_no_more_compile_at_the_same_time_than_there_are_cores(launchers: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable_launch, "_CORES", threading.Semaphore(2))
    at_once: list[int] = []
    busy = [0]

    class Busy(Compiled):
        def warmup(self, *args: Any, grid: Any, **options: Any) -> Any:
            busy[0] += 1
            at_once.append(busy[0])
            time.sleep(0.02)
            busy[0] -= 1
            return super().warmup(*args, grid=grid, **options)

    kernels = [Busy(threading.Barrier(1), []) for _ in range(6)]
    begun = compile_ahead([Launch(kernel, (torch.zeros(4), 3), 4, 1, None, None) for kernel in kernels], -1)
    for each in begun.values():
        each.result(timeout=10)
    assert launchers and len(at_once) == 6 and max(at_once) == 2


@pytest.mark.usefixtures("launchers")
def test_a_kernel_that_does_not_compile_is_tried_again() -> None:
    seen: list[Any] = []
    kernel = Compiled(threading.Barrier(1), seen, ValueError("no registers left"))
    x = torch.zeros(4)
    compile_ahead([Launch(kernel, (x, 3), 4, 1, None, None)], -1)
    for _ in range(2):
        with pytest.raises(ValueError, match="no registers left"):
            launch(kernel, (1,), x, 3)
    kernel.error = None
    launch(kernel, (1,), x, 3)
    assert [each[0] for each in seen] == ["compiled", "launched"]


@pytest.mark.usefixtures("launchers")
def test_a_launch_does_not_fail_because_of_what_cannot_be_foreseen(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Any] = []
    kernel, x = Compiled(threading.Barrier(1), seen), torch.zeros(4)

    def more() -> Any:
        yield written(lambda x: x.tolist(), x)[1]

    with foreseeing(more):
        launch(kernel, (1,), x, 3)
    assert [each[0] for each in seen] == ["compiled", "launched"]
    assert "cannot be foreseen" in caplog.text and "meta" in caplog.text


@pytest.mark.usefixtures("launchers")
def test_a_kernel_compiles_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a thread that goes on when the main one has ended."""
    seen: list[Any] = []
    a, b = (Compiled(threading.Barrier(1), seen) for _ in range(2))
    x = torch.zeros(4)

    def refused(*arguments: Any) -> Any:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(portable_launch.ThreadPoolExecutor, "submit", refused)
    with foreseeing(lambda: [written(lambda: launch(b, (1,), without_data(x), 3))[1]]):
        launch(a, (1,), x, 3)
    assert [each[:2] for each in seen] == [("compiled", a.fn), ("launched", a.fn)]
    launch(a, (1,), x, 3)
    launch(b, (1,), x, 3)
    assert [each[:2] for each in seen[2:]] == [("launched", a.fn), ("compiled", b.fn), ("launched", b.fn)]


def test_written_launches_do_not_run() -> None:
    def host() -> int:
        launch(Kernel(False), (2,), "x", warps=8)
        launch(Kernel(False), (2, 0), "x")
        return 5

    result, launches = written(host)
    assert result == 5 and [(each.args, each.warps) for each in launches] == [(("x",), 8)]


def launcher(handed: list[Any], scratch: int = 0) -> Any:
    """Triton's own, around what stands for its function in C."""
    made = object.__new__(CudaLauncher)
    names = ("global_scratch_align", "num_ctas", "profile_scratch_align", "profile_scratch_size", "arg_annotations", "kernel_signature")
    vars(made).update(dict.fromkeys(names, 0), global_scratch_size=scratch, launch_cooperative_grid=True, launch_pdl=False)
    made.launch = lambda *args: handed.append(args)
    return made


def test_a_kernel_is_started_with_what_the_launcher_would_hand_on() -> None:
    handed: list[Any] = []
    compiled = SimpleNamespace(function=123, packed_metadata=(4, 1, 0), run=launcher(handed))
    start, between, packed = starter(compiled)
    assert not handed and start is compiled.run.launch
    arguments = (8, None, 0.5)
    start(1, 2, 3, 99, *between, *([arguments] if packed else arguments))
    compiled.run(1, 2, 3, 99, 123, (4, 1, 0), None, None, None, *arguments)
    assert handed[0] == handed[1] and len(handed) == 2


def test_a_kernel_with_scratch_memory_or_another_launcher_is_started_by_it() -> None:
    for run in (launcher([], scratch=16), lambda *args: None):
        compiled = SimpleNamespace(function=123, packed_metadata=(4, 1, 0), run=run)
        assert starter(compiled) == (run, (123, (4, 1, 0), None, None, None), False)


@pytest.mark.parametrize(("capability", "expected"), [(80, None), (90, None), (100, "1"), (103, "1"), (120, None)])
def test_tensor_memory_is_not_for_our_kernels(capability: int, expected: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads the variable while it compiles: it is there as long as any thread does, and gone afterwards."""
    monkeypatch.delenv("DISABLE_MMA_V5", raising=False)
    monkeypatch.setattr(portable_launch.hardware, "capability", lambda index: capability)
    with portable_launch.through_registers(0):
        first = portable_launch.through_registers(0)
        first.__enter__()
        assert os.environ.get("DISABLE_MMA_V5") == expected
    assert os.environ.get("DISABLE_MMA_V5") == expected, "one compiles still"
    first.__exit__(None, None, None)
    assert "DISABLE_MMA_V5" not in os.environ


def test_tensor_memory_where_one_compilation_begins_while_another_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other said is not the user's word, though the other takes it back just then."""
    ended = False

    class Environment(dict[str, str]):
        def __contains__(self, name: object) -> bool:
            nonlocal ended
            found = super().__contains__(name)
            if found:
                ended = not other.__exit__(None, None, None)
            return found

    monkeypatch.setattr(portable_launch.hardware, "capability", lambda index: 100)
    monkeypatch.setattr(portable_launch.os, "environ", environment := Environment())
    other = portable_launch.through_registers(0)
    other.__enter__()
    with portable_launch.through_registers(0):
        assert environment.get("DISABLE_MMA_V5") == "1"
    assert ended or not other.__exit__(None, None, None)
    assert not environment


@pytest.mark.parametrize("said", ["0", "1"])
def test_what_the_user_says_about_tensor_memory_holds(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISABLE_MMA_V5", said)
    monkeypatch.setattr(portable_launch.hardware, "capability", lambda index: 100)
    with portable_launch.through_registers(0):
        assert os.environ["DISABLE_MMA_V5"] == said
    assert os.environ["DISABLE_MMA_V5"] == said
