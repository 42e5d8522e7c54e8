"""Calls written down once and replayed: what makes a call another one, what is never replayed, and that replays take what they get."""

from __future__ import annotations

import copy
import ctypes
import math
import pickle
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from gdn.core import dispatch, opaque, portable_launch, portable_plan, portable_product, replay, replay_known, replay_source  # noqa: E402
from gdn.core.dispatch import Impl, Op, use  # noqa: E402
from gdn.core.errors import ArgumentError  # noqa: E402
from gdn.core.opaque import Arguments, InPlace, Opaque  # noqa: E402
from gdn.core.packing import Packing  # noqa: E402
from gdn.core.portable_launch import launch  # noqa: E402
from gdn.core.replay import replayed  # noqa: E402
from gdn.ops import l2norm, write_gate  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("quick_interpreter"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="toys on the CPU; with a GPU tests/ops/test_replayed_operators.py is the test"),
]

HOSTS: list[str] = []
"""What ran as written."""


@triton.jit
def scale_kernel(x, bias, y, factor, count, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i * STRIDE, mask=i < count, other=0.0) * factor
    if bias is not None:
        value += tl.load(bias + i, mask=i < count, other=0.0)
    tl.store(y + i, value, mask=i < count)


def _forward(x: Tensor, bias: Tensor | None, factor: float, keep: bool) -> tuple[Tensor, Tensor]:
    """y, and for backward x in the second half of a buffer, beside what nobody needs."""
    HOSTS.append("forward")
    count = x.numel()
    y, space, _ = torch.empty(count, dtype=x.dtype), torch.empty(2 * count, dtype=x.dtype), x.new_empty(count)
    launch(scale_kernel, (1,), x, bias, y, factor, count, x.stride(0), 16)
    launch(scale_kernel, (1,), x, None, space[count:], 1, count, x.stride(0), 16)
    return y, space


def _backward(args: Arguments, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """With torch operators, on views and in place."""
    HOSTS.append("backward")
    x, bias, factor = args
    (dy,) = grads
    assert dy is not None
    assert torch._C._is_any_autocast_enabled() is False
    dx = torch.empty_like(saved[0][: x.numel()])
    dy = dy.contiguous()
    launch(scale_kernel, (1,), dy, None, dx, factor, x.numel(), 1, 16)
    if bias is None:
        return [dx, None]
    parts = torch.stack([dy, saved[0][x.numel() :]]) if factor == 5.0 else torch.zeros(2, x.numel(), dtype=dy.dtype)
    parts[0].copy_(dy)
    return [dx, parts.sum(0).to(bias.dtype)]


def _fake(x: Tensor, bias: Tensor | None, factor: float, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(2 * x.shape[0])


def _count(state: Tensor, by: float) -> Tensor:
    HOSTS.append("count")
    before = torch.empty_like(state)
    launch(scale_kernel, (1,), state, None, before, 1, state.numel(), 1, 16)
    launch(scale_kernel, (1,), before, before, state, by, state.numel(), 1, 16)
    return before


SCALE = Opaque("gdn::toy_replayed", _forward, _backward, fake=_fake, results=1, differentiable=("x", "bias"), replay=True)
COUNT = InPlace("gdn::toy_replayed_count", _count, mutates=("state",), fake=lambda state, by: torch.empty_like(state), replay=True)


def kernel(x: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    return SCALE(x, bias, factor)[0]


def plain(x: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    HOSTS.append("plain")
    return x * factor if bias is None else x * factor + bias


def shifted(x: Tensor, bias: Tensor | None, factor: float) -> Tensor:
    """Not what the operator says, so that a test sees who served."""
    return plain(x, bias, factor) + 100


@replayed
def scaled(x: Tensor, *, bias: Tensor | None = None, factor: float = 2.0) -> Tensor:
    """An operator of a table."""
    HOSTS.append("contract")
    if factor < 0:
        raise ArgumentError(f"factor: expected no negative one, got {factor}")
    if bias is not None and bias.shape != x.shape:
        raise ArgumentError(f"bias: expected {list(x.shape)}, got {list(bias.shape)}")
    return dispatch._OPS["scaled"].pick(x)(x, bias, factor)


@pytest.fixture(autouse=True)
def op(replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Op]:
    dispatch.ops()
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    HOSTS.clear()
    yield Op("scaled", (Impl("kernel", f"{__name__}:kernel"), Impl("plain", f"{__name__}:plain"), Impl("shifted", f"{__name__}:shifted")))


@pytest.fixture(autouse=True, params=["planned", "by Triton"])
def way(request: pytest.FixtureRequest, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """How kernels are launched."""
    if request.param == "by Triton":
        monkeypatch.setattr(portable_plan, "of_compiled", lambda compiled: None)
    return request.param


def hosts() -> list[str]:
    """What ran as written since the last time."""
    ran = HOSTS.copy()
    HOSTS.clear()
    return ran


def numbers(seed: int = 0, n: int = 5, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_replayed(call: Callable[[], Tensor], expected: Tensor, ran: list[str] | None = None) -> None:
    torch.testing.assert_close(call(), expected)
    assert hosts() == (ran or [])


def test_a_second_call_runs_kernels_only(replayed_here: list[str]) -> None:
    x, bias = numbers(0), numbers(1)
    assert_replayed(lambda: scaled(x, bias=bias), 2 * x + bias, ["contract", "forward"])
    for seed in range(2, 5):
        x, bias = numbers(seed), numbers(seed + 10)
        replayed_here.clear()
        assert_replayed(lambda x=x, bias=bias: scaled(x, bias=bias), 2 * x + bias)
        assert replayed_here == ["scale_kernel"] * 2


def test_a_launcher_may_take_the_arguments_as_one_tuple(monkeypatch: pytest.MonkeyPatch) -> None:
    def packed(compiled: Any) -> tuple[Any, ...]:
        between = ("function", "metadata", None, None, None)
        return lambda *start: compiled.run(*start[:-1], *start[-1]), between, True

    monkeypatch.setattr(portable_launch, "starter", packed)
    for seed in range(2):
        x, bias = numbers(seed), numbers(seed + 5)
        assert torch.equal(scaled(x, bias=bias), 2 * x + bias)
    assert hosts() == ["contract", "forward"]


def test_memory_is_fresh_in_every_call_and_none_is_kept() -> None:
    x = numbers()
    results = [scaled(x) for _ in range(3)]
    assert len({y.data_ptr() for y in results}) == 3
    ends = [weakref.ref(t) for t in (x, *results)]
    del x, results
    assert [end() for end in ends] == [None] * 4


def test_gradients_are_replayed(replayed_here: list[str]) -> None:
    for seed in range(4):
        x, bias = (numbers(seed + i).requires_grad_() for i in (0, 10))
        dy = numbers(seed + 20)
        replayed_here.clear()
        dx, dbias = torch.autograd.grad(scaled(x, bias=bias), (x, bias), dy)
        assert (torch.equal(dx, 2 * dy), torch.equal(dbias, dy)) == (True, True)
        assert hosts() == ([] if seed else ["contract", "forward", "backward"])
        assert len(replayed_here) == (3 if seed else 0)


def test_gradients_of_other_strides_are_other_calls() -> None:
    x = numbers().requires_grad_()
    for dy in (numbers(1), torch.tensor(3.0).expand(5), numbers(2, 10)[::2]) * 2:
        (dx,) = torch.autograd.grad(scaled(x), x, dy)
        assert torch.equal(dx, 2 * dy)
    assert hosts() == ["contract", "forward", *["backward"] * 3]
    wide = numbers(3, 10)
    assert torch.equal(torch.autograd.grad(scaled(x), x, wide[::2])[0], 2 * wide[::2])
    assert hosts() == []


def test_what_a_backward_gets_may_differ_from_what_forward_saw() -> None:
    """Hooks on saved tensors hand back others: here at an odd address, then with a stride."""
    x, dy = numbers().requires_grad_(), numbers(1)
    for change in (lambda t: torch.cat([t[:1], t])[1:], lambda t: t.repeat_interleave(2)[::2], lambda t: t) * 2:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t, change=change: change(t)):
            y = scaled(x)
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], 2 * dy)
    assert hosts() == ["contract", "forward", *["backward"] * 3]


@pytest.mark.parametrize(
    "other",
    [
        lambda x: {"x": numbers(1, 7)},
        lambda x: {"x": numbers(1, 10)[::2]},
        lambda x: {"x": numbers(1, 6)[1:]},
        lambda x: {"x": x.double()},
        lambda x: {"x": x, "factor": 3.0},
        lambda x: {"x": x, "factor": 2},
        lambda x: {"x": x, "bias": numbers(3)},
        lambda x: {"x": x.clone().requires_grad_()},
    ],
    ids=["shape", "stride", "alignment", "dtype", "value", "type of a value", "presence", "requires_grad"],
)
def test_a_call_that_differs_is_another_call(other: Callable[[Tensor], dict[str, Any]]) -> None:
    x = numbers()
    arguments: dict[str, Any] = {"factor": 2.0} | other(x)
    expected = plain(arguments["x"].detach(), arguments.get("bias"), arguments["factor"])
    scaled(x, factor=2.0)
    hosts()
    assert_replayed(lambda: scaled(**arguments), expected, ["contract", "forward"])
    assert_replayed(lambda: scaled(**arguments), expected)
    assert_replayed(lambda: scaled(x, factor=2.0), 2 * x)


def test_the_grad_mode_belongs_to_a_call() -> None:
    x = numbers().requires_grad_()
    for _ in range(2):
        assert scaled(x).requires_grad
        with torch.no_grad():
            assert not scaled(x).requires_grad
        with torch.inference_mode():
            y = scaled(x)
            assert y.is_inference() and torch.equal(y, 2 * x)
    assert not scaled(x).is_inference()
    assert hosts() == ["contract", "forward"] * 2


def test_a_wrong_call_raises_every_time() -> None:
    x, short = numbers(), numbers(n=4)
    no_tensor: Any = [1.0]
    for _ in range(3):
        scaled(x)
        with pytest.raises(ArgumentError, match="factor: expected no negative one, got -1"):
            scaled(x, factor=-1.0)
        with pytest.raises(ArgumentError, match=r"bias: expected \[5\], got \[4\]"):
            scaled(x, bias=short)
        with pytest.raises(AttributeError, match="'list' object has no attribute"):
            scaled(no_tensor)
    assert hosts().count("contract") == 1 + 3 * 3


def test_another_row_is_another_call(op: Op) -> None:
    x = numbers()
    for _ in range(2):
        assert torch.equal(scaled(x), 2 * x)
        with use(scaled="shifted"):
            for _ in range(2):
                assert torch.equal(scaled(x), 2 * x + 100)
            with use(scaled="kernel"):
                assert torch.equal(scaled(x), 2 * x)
            assert torch.equal(scaled(x), 2 * x + 100)
    scaled(x)
    op.register(Impl("first", f"{__name__}:shifted"))
    assert torch.equal(scaled(x), 2 * x + 100)


def test_one_tensor_given_twice_is_two_arguments() -> None:
    x, bias = numbers(), numbers(1)
    for _ in range(2):
        assert torch.equal(scaled(x, bias=x), 3 * x)
    for _ in range(2):
        assert torch.equal(scaled(x, bias=bias), 2 * x + bias)
    hosts()
    assert_replayed(lambda: scaled(x, bias=x), 3 * x)


def test_no_looks_are_written_that_recognise_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """At calls with one tensor twice, which torch's comparison refuses: they would take the places of others."""
    written: list[bool] = []
    look = replay_known.quick_look
    monkeypatch.setattr(replay_known, "quick_look", lambda *arguments: (written.append(True), look(*arguments))[1])
    x, bias = numbers().requires_grad_(), numbers(1).requires_grad_()
    for _ in range(3):
        for other in (bias, x):
            y = scaled(x, bias=other)
            torch.testing.assert_close(y, 2 * x + other)
            y.sum().backward()
    assert len(written) == 2


def test_slices_of_one_tensor_are_told_apart() -> None:
    for seed in range(2):
        both = numbers(seed, 16)
        x, bias = both[:8], both[8:]
        assert torch.equal(scaled(x, bias=bias), 2 * x + bias)
    assert hosts() == ["contract", "forward"]


def test_a_part_of_an_argument_is_a_part_of_the_argument_in_its_place() -> None:
    """Kernels get the ends of two arguments. In one memory it is not clear whose an end is; then nothing is written down."""

    def forward(x: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor]:
        HOSTS.append("forward")
        y = torch.empty(4)
        launch(scale_kernel, (1,), x[4:], bias[4:], y, 1, 4, 1, 16)
        return (y,)

    ends = Opaque("gdn::toy_ends", forward, lambda a, s, g: [None], fake=forward, results=1, differentiable=("x",), replay=True)
    both = numbers(0, 16)
    for x, bias in ((both[:8], both[8:]), (both[8:], both[:8]), (numbers(1, 8), numbers(2, 8))):
        assert torch.equal(ends(x, bias)[0], x[4:] + bias[4:])
    assert hosts() == ["forward"] * 3
    replay_known.forget()
    for seed in range(3):
        x, bias = numbers(seed, 8), numbers(seed + 5, 8)
        assert torch.equal(ends(x, bias)[0], x[4:] + bias[4:])
    assert torch.equal(ends(both[:8], both[8:])[0], both[4:8] + both[12:])
    assert hosts() == ["forward"]


def test_values_belong_to_their_names() -> None:
    @replayed
    def apart(x: Tensor, *, up: float, down: float) -> Tensor:
        return SCALE(x, None, up / down)[0]

    x = numbers()
    assert torch.equal(apart(x, up=4.0, down=2.0), 2 * x)
    assert torch.equal(apart(x, down=4.0, up=2.0), x / 2)


def test_an_operator_in_place_is_replayed() -> None:
    count = replayed(lambda state, by: COUNT(state, by))
    state = torch.ones(3)
    for expected in (1.0, 4.0, 16.0):
        assert torch.equal(count(state, 3.0), torch.full((3,), expected))
    assert state.tolist() == [64.0] * 3
    assert hosts() == ["count"]


def test_calls_hand_on_their_results() -> None:
    @replayed
    def twice(x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        HOSTS.append("twice")
        y = scaled(bias, bias=x)
        return SCALE(y, x, 3.0)[0], y

    for seed in range(3):
        x, bias = numbers(seed).requires_grad_(), numbers(seed + 5).requires_grad_()
        z, y = twice(x, bias)
        assert torch.equal(y, 2 * bias + x)
        torch.testing.assert_close(z, 3 * y + x)
        torch.testing.assert_close(torch.autograd.grad(z.sum(), (x, bias)), (torch.full((5,), 4.0), torch.full((5,), 6.0)))
    assert hosts() == ["twice", "contract", "forward", "forward", "backward", "backward"]


def test_calls_of_an_operator_are_one_with_one_allocation_for_what_is_between(
    way: str, replayed_here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies between is never seen: one that is seen, or large, has memory of its own."""
    allocated: list[int] = []
    allocate = replay_source._allocator

    def noting(device: torch.device) -> Callable[..., Tensor]:
        return lambda shape, strides, dtype: (allocated.append(math.prod(shape)), allocate(device)(shape, strides, dtype))[1]

    monkeypatch.setattr(replay_source, "_allocator", noting)

    @replayed
    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        one = SCALE(x, None, 2.0)[0]
        other = SCALE(one, x, 3.0)[0]
        return SCALE(other, one, 0.5)[0], one

    for seed in range(4):
        x = numbers(seed)
        allocated.clear()
        y, one = both(x)
        assert torch.equal(one, 2 * x)
        torch.testing.assert_close(y, 5.5 * x)
        assert len(replayed_here) == 6 * seed
        if seed:  # each part of the buffer is one of 256 bytes: three of twice the numbers, and what comes second
            assert sorted(allocated) == [5, 5, (2 if way == "planned" else 4) * 256]  # of the four, two at a time are needed
    x = numbers(9).requires_grad_()
    for _ in range(3):
        assert torch.equal(torch.autograd.grad(both(x)[0].sum(), x)[0], torch.full((5,), 5.5))


def test_large_tensors_have_memory_of_their_own_unless_all_live_at_once(way: str) -> None:
    def host(x: Tensor) -> list[Tensor]:
        small, large, end, other = x.new_empty(5), x.new_empty(2**18 + 1), x.new_empty(5), x.new_empty(70)
        launch(scale_kernel, (1,), x, None, small, 2.0, 5, 1, 16)
        launch(scale_kernel, (1,), small, None, other[65:], 2.0, 5, 1, 16)
        launch(scale_kernel, (1,), other[65:], small, large, 1.0, 5, 1, 16)
        launch(scale_kernel, (1,), large, x, end, 1.0, 5, 1, 16)
        return [end]

    x, y = numbers(0), numbers(1)
    results, recording = replay.record(lambda: host(x), [x])
    assert recording is not None
    torch.testing.assert_close([results[0], recording.known().run([y])[0]], [7 * x, 7 * y])
    shapes = {value for value in recording.body().values.values() if isinstance(value, tuple)}
    whole, apart = {(5,), (256 + 512 + 2**20 + 256,)}, {(5,), (256 + 512,), (2**18 + 1,)}
    assert shapes & {*whole, *apart, (70,)} == (whole if way == "planned" else apart)


@given(st.data())
def test_parts_are_apart_while_they_are_needed(data: st.DataObject) -> None:
    """No two tensors are at the same place at the same time, and none is in a result that has been written."""
    count = data.draw(st.integers(1, 9))
    sizes = data.draw(st.lists(st.sampled_from([0, 4, 256, 1000, 4096]), min_size=count, max_size=count))
    fresh = {1 + i: replay._Fresh((size,), (1,), torch.uint8, size) for i, size in enumerate(sizes)}
    uses = data.draw(st.lists(st.lists(st.sampled_from([0, *fresh]), min_size=1), min_size=1, max_size=6))
    results = data.draw(st.lists(st.sampled_from([*fresh]), unique=True))
    steps = [replay._Launch(None, print, (1, 1, 1), (), False, [(i, 0) for i in each]) for each in uses]
    recording = replay.Recording(torch.device("cpu"), 1, 1 + count, fresh, steps, results)
    parts, size = recording._interleaved()
    at = {i: [n for n, each in enumerate(uses) if i in each] for i in fresh}
    assert set(parts) == {i for i in fresh if at[i] and i not in results}
    assert (size or 0) <= sum(-(-fresh[i].bytes // 256) * 256 for i in parts)
    for i, (whole, begin) in parts.items():
        assert begin % 256 == 0
        assert begin + fresh[i].bytes <= ((size or 0) if whole == 1 + count else fresh[whole].bytes)
        assert whole == 1 + count or (whole in results and max(at[i]) < min(at[whole]))
        for n, (other, there) in parts.items():
            together = i != n and whole == other and min(at[i]) <= max(at[n]) and min(at[n]) <= max(at[i])
            assert not (together and begin < there + fresh[n].bytes and there < begin + fresh[i].bytes)


def test_a_result_is_there_as_soon_as_anything_lies_in_it(way: str) -> None:
    """Though it is written only after an operator of torch."""

    def host(x: Tensor) -> list[Tensor]:
        between, seen, end = x.new_empty(5), x.new_empty(5), x.new_empty(600)
        launch(scale_kernel, (1,), x, None, between, 2.0, 5, 1, 16)
        launch(scale_kernel, (1,), between, None, seen, 2.0, 5, 1, 16)
        other = seen + 1
        launch(scale_kernel, (1,), other, None, end, 2.0, 5, 1, 16)
        return [end]

    x, y = numbers(0), numbers(1)
    _, recording = replay.record(lambda: host(x), [x])
    assert recording is not None
    torch.testing.assert_close(recording.known().run([y])[0][:5], 8 * y + 2)
    assert bool(recording._layout().parts) == (way == "planned")


@pytest.mark.parametrize(("uses", "together"), [([[1], [2], [2]], True), ([[3], [3, 2], [2, 1]], False)])
def test_results_need_memory_to_the_end(uses: list[list[int]], together: bool) -> None:
    """So what comes after costs as much in one call as in several; but what is over before a result does not, unless it fits into that."""
    sizes = {1: 2**26, 2: 2**26, 3: 2**27}
    fresh = {i: replay._Fresh((size,), (1,), torch.uint8, size) for i, size in sizes.items()}
    kernel = portable_plan.Kernel("kernel", 0, 32, 0, ())
    steps = [replay._Launch(kernel, print, (1, 1, 1), (), False, [(i, 0) for i in each]) for each in uses]
    layout = replay.Recording(torch.device("cpu"), 1, 4, fresh, steps, [1])._layout()
    assert (len(layout.groups) == 1) == together


@pytest.mark.parametrize("size", [2**18 + 1, 2**23 + 1])
def test_memory_lives_from_its_first_use_to_its_last(size: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the host did, but that it costs little if all live at once. Before each allocation: which of those before are alive."""
    alive: list[list[int]] = []
    made: list[weakref.ref[Tensor]] = []
    allocate = replay_source._allocator

    def noting(device: torch.device) -> Callable[..., Tensor]:
        def new(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            alive.append([i for i, x in enumerate(made) if x() is not None])
            made.append(weakref.ref(out := allocate(device)(shape, strides, dtype)))
            return out

        return new

    def host(x: Tensor) -> list[Tensor]:
        one, two, three, four = [x.new_empty(size) for _ in range(4)]
        launch(scale_kernel, (1,), x, None, one, 2.0, 5, 1, 16)
        launch(scale_kernel, (1,), one, None, two, 2.0, 5, 1, 16)
        launch(scale_kernel, (1,), two, one, three, 1.0, 5, 1, 16)
        launch(scale_kernel, (1,), three, None, four, 2.0, 5, 1, 16)
        return [three[:5] * four[:5], two]

    monkeypatch.setattr(replay_source, "_allocator", noting)
    _, recording = replay.record(lambda: host(numbers(0)), [x := numbers(0)])
    assert recording is None, "one that it was not given"
    _, recording = replay.record(lambda: host(x), [x])
    assert recording is not None
    product, two = recording.known().run([y := numbers(1)])
    torch.testing.assert_close([product, two[:5]], [72 * y * y, 4 * y])
    together = way == "planned" and size < 2**23
    assert alive == [[], [0], [0, 1], [0, 1, 2] if together else [1, 2]]
    assert [x() is not None for x in made] == [False, True, False, False]


def test_parts_of_an_argument_go_into_an_operator() -> None:
    """A matrix turned, and of another tensor some columns: of each call's own, wherever they begin."""

    def host(x: Tensor, w: Tensor) -> list[Tensor]:
        return [torch.mm(x, w.T), torch.mm(x[:, 2:4], x[:2, 1:]).view(-1)]

    def made(seed: int) -> list[Tensor]:
        return [numbers(seed, 24).view(4, 6), numbers(seed, 34)[4 * seed : 4 * seed + 18].view(3, 6)]

    first = made(0)
    results, recording = replay.record(lambda: host(*first), first)
    assert recording is not None
    assert all(torch.equal(a, b) for a, b in zip(results, host(*first), strict=True))
    for seed in (1, 2, 3):
        given = made(seed)
        for actual, right in zip(recording.known().run(given), host(*given), strict=True):
            assert actual.stride() == right.stride() and torch.equal(actual, right)


LAYOUTS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "rows": lambda x, rows, columns: x[:rows, :columns].clone(),
    "columns": lambda x, rows, columns: x[:columns, :rows].clone().T,
    "rows of more": lambda x, rows, columns: x[1 : 1 + rows, 1 : 1 + columns],
    "columns of more": lambda x, rows, columns: x[1 : 1 + columns, 1 : 1 + rows].T,
}
GAPS: dict[str, Callable[[Tensor, int, int], Tensor]] = {
    "an expanded row": lambda x, rows, columns: x[0, :columns].expand(rows, columns),
    "an expanded column": lambda x, rows, columns: x[:rows, :1].expand(rows, columns),
    "every second": lambda x, rows, columns: x[:rows, : 2 * columns : 2],
}


def factors(left: Any, right: Any, n: int, k: int, m: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    return left(numbers(0, 140).view(10, 14).to(dtype), n, k), right(numbers(1, 140).view(10, 14).to(dtype), k, m)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("left", LAYOUTS)
def test_cublas_is_asked_for_a_product_as_its_factors_lie_in_memory(
    left: str, right: str, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    a, b = factors(LAYOUTS[left], LAYOUTS[right], *sizes, dtype)
    made = portable_product.multiplied(a, b)
    assert made is not None and made[0].dtype == dtype and made[0].is_contiguous()
    torch.testing.assert_close(made[0], (a.double() @ b.double()).to(dtype))


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cublas_is_asked_for_products_in_float32(dtype: torch.dtype, added: bool) -> None:
    """Into memory that there is, also into some columns of it."""
    a, b = factors(LAYOUTS["rows of more"], LAYOUTS["columns"], 3, 4, 5, dtype)
    for out in (numbers(2, 15).view(3, 5), numbers(2, 40).view(5, 8)[1:4, 2:7], numbers(2, 30).view(2, 3, 5)[1]):
        right = a.double() @ b.double() + (out.double() if added else 0)
        made = portable_product.multiplied(a, b, out, added=added)
        assert made is not None and made[0] is out
        torch.testing.assert_close(out, right.float())
    for wrong in (
        numbers(2, 15).view(5, 3).T,
        numbers(2, 30).view(3, 10)[:, ::2],
        numbers(2, 15).view(3, 5).to(dtype),
        numbers(2, 12).view(3, 4),
        numbers(2, 15),
        numbers(2, 15).view(3, 5).to("meta"),
    ):
        assert portable_product.multiplied(a, b, wrong, added=added) is None
    assert portable_product.multiplied(a[:1], b, numbers(2, 5).view(1, 5), added=added) is None
    assert portable_product.multiplied(a, b[:, :1], numbers(2, 3).view(3, 1), added=added) is None


@pytest.mark.parametrize("gaps", GAPS)
def test_other_products_are_left_to_torch(gaps: str) -> None:
    rows = LAYOUTS["rows"]
    assert portable_product.multiplied(*factors(GAPS[gaps], rows, 3, 4, 5)) is None
    assert portable_product.multiplied(*factors(rows, GAPS[gaps], 3, 4, 5)) is None
    for none in ((0, 4, 5), (3, 0, 5), (3, 4, 0)):
        assert portable_product.multiplied(*factors(rows, rows, *none)) is None
    a, b = factors(rows, rows, 3, 4, 5)
    for one, other in ((a, b[:2]), (a, b[:, 0]), (a[None], b)):
        assert portable_product.multiplied(one, other) is None
        with pytest.raises(RuntimeError):
            replay.record(lambda one=one, other=other: [torch.mm(one, other)], [a])
    assert portable_product.multiplied(a, b.to("meta")) is None
    for dtype, other in ((torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.int16, torch.int16)):
        assert portable_product.multiplied(a.to(dtype), b.to(other)) is None


def test_products_of_sizes_beyond_32_bits_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(portable_plan, "module", lambda: SimpleNamespace(product=lambda *given: asked.append(given) or "multiply"))
    numbers = (0, 0, 14, 14, True, False, 5, 6, 7, 8, 9, 10)
    assert portable_product._multiply(*numbers) == "multiply"
    assert asked == [("libcublas.so.13", portable_product._handle, *numbers)]
    assert portable_product._multiply(*numbers[:-1], 2**31 - 1) == "multiply"
    assert portable_product._multiply(*numbers[:-1], 2**31) is None
    monkeypatch.setattr(portable_plan, "module", lambda: None)
    assert portable_product._multiply(*numbers) is None


ENDS = ["as matmul does", "an operator before", "an operator after", "in two dimensions", "of an operator", "of a part"]


@pytest.mark.parametrize("end", ENDS)
def test_products_are_replayed_without_torch(end: str) -> None:
    """Between kernels and in other shapes, which only torch must be told of."""

    def host(x: Tensor, w: Tensor) -> list[Tensor]:
        y = torch.empty_like(x)
        launch(scale_kernel, (1,), x, None, y, 2.0, 12, 1, 16)
        if end == "as matmul does":
            h = torch.matmul(y.view(2, 3, 2), w.T)
            z = torch.empty_like(h)
            launch(scale_kernel, (1,), h, None, z, 0.5, 12, 1, 16)
            return [z, h]
        flat = torch.mm((x + 1 if end == "of an operator" else y).view(6, 2), w.T)
        if end in ("in two dimensions", "of an operator"):
            return [flat.T @ flat]
        if end == "of a part":
            return [flat[2:] @ w, x.view(6, 2)[1:4] @ w[:, 1:]]
        before = flat + 1 if end == "an operator before" else None
        h = torch.ops.aten._unsafe_view(flat, [2, 3, 2])
        return [h, flat * 2 if before is None else before]

    def given(seed: int) -> list[Tensor]:
        return [numbers(seed, 12, torch.float16), numbers(seed + 9, 4, torch.float16).view(2, 2)]

    first = given(0)
    results, recording = replay.record(lambda: host(*first), first)
    assert recording is not None and recording.conditions == {(portable_product.ordinary, True)}
    assert recording.launches_only == (end in ("as matmul does", "in two dimensions", "of a part"))
    assert [x.shape for x in results] == [x.shape for x in host(*first)]
    for seed in (1, 2):
        for actual, right in zip(recording.known().run(given(seed)), host(*given(seed)), strict=True):
            assert actual.stride() == right.stride() and torch.equal(actual, right) and not actual._is_view()


def test_products_into_memory_are_replayed_without_torch() -> None:
    """A tensor's, a part's, and of an argument."""

    def host(x: Tensor, w: Tensor, y: Tensor) -> list[Tensor]:
        first, space = (x.new_empty(shape, dtype=torch.float32) for shape in ((6, 2), (8, 4)))
        torch.mm(x, w, out_dtype=torch.float32, out=first)
        torch.addmm(first, x, w.T, out_dtype=torch.float32, out=first)
        torch.mm(x[1:4], w, out_dtype=torch.float32, out=space[2:5, 1:3])
        part = y[1:]
        torch.addmm(part, x[3:], w, out_dtype=torch.float32, out=part)
        again = x.new_empty((3, 2))
        launch(scale_kernel, (1,), space[2:5, 1:], None, again, 1.0, 2, 1, 16)
        return [first, again]

    def right(x: Tensor, w: Tensor, y: Tensor) -> list[Tensor]:
        x, w = x.float(), w.float()
        return [x @ w + x @ w.T, y + torch.cat([torch.zeros(1, 2), x[3:] @ w]), (x[1] @ w)]

    def given(seed: int) -> list[Tensor]:
        return [numbers(seed, 12, torch.float16).view(6, 2), numbers(seed + 9, 4, torch.float16).view(2, 2), numbers(seed, 8).view(4, 2)]

    arguments = given(0)
    expected = right(*arguments)
    (whole, rows), recording = replay.record(lambda: host(*arguments), arguments)
    assert recording is not None and recording.conditions and recording.launches_only
    for seed in (0, 1, 2):
        if seed:
            arguments = given(seed)
            expected = right(*arguments)
            whole, rows = recording.known().run(arguments)
        torch.testing.assert_close([whole, arguments[2], rows.flatten()[:2].float()], expected, check_dtype=False, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, out, other: torch.addmm(other, a, a, out_dtype=torch.float32, out=out),
        lambda a, out, other: torch.addmm(out, a, a, out_dtype=torch.float32, out=out, beta=2),
        lambda a, out, other: torch.addmm(out, a, a, out_dtype=torch.float32, out=out, alpha=2),
        lambda a, out, other: torch.mm(a, a, out_dtype=torch.float16, out=out),
        lambda a, out, other: torch.mm(a, a, out_dtype=torch.float32, out=out.half()),
    ],
)
def test_other_products_into_memory_are_left_to_torch(call: Callable[..., Tensor], asked: list[str]) -> None:
    """Which has none of them on a CPU."""
    a, out, other = numbers(0, 4, torch.float16).view(2, 2), torch.zeros(2, 2), torch.zeros(2, 2)
    with pytest.raises(NotImplementedError, match=r"Could not run 'aten::(mm|addmm)\.dtype_out'"):
        replay.record(lambda: [call(a, out, other)], [a, out, other])
    assert not asked


def test_parts_of_an_argument_that_is_a_part_itself_are_where_they_are() -> None:
    """So many bytes after where it begins, not after where its memory does."""

    def host(x: Tensor) -> list[Tensor]:
        y = x.new_empty(4)
        launch(scale_kernel, (1,), x[4:], None, y, 2.0, 4, 1, 16)
        return [y]

    first = numbers(0, 16)[8:]
    _, recording = replay.record(lambda: host(first), [first])
    assert recording is not None
    for x in (numbers(1, 16)[8:], numbers(2, 8)):
        assert torch.equal(recording.known().run([x])[0], 2 * x[4:])


def test_operators_may_be_told_by_name_where_to_write() -> None:
    """A whole tensor, or a part of one."""

    def host(x: Tensor) -> list[Tensor]:
        y, z = torch.empty_like(x), x.new_empty(12)
        torch.mul(x, 3, out=y)
        torch.add(x, y, alpha=2, out=z[4:9])
        z[4:9].addcmul_(x, y, value=0.5)
        torch.sub(y.view(5), x, out=y[:])
        z[:4].zero_()
        z[9:].fill_(1)
        return [y, z]

    first = numbers(0, 5)
    results, recording = replay.record(lambda: host(first), [first])
    assert recording is not None
    written, results = weakref.ref(results[0]), [x.clone() for x in results]
    assert written() is None, "a recording keeps no tensor"
    for seed in (0, 1, 2):
        if seed:
            results = recording.known().run([numbers(seed, 5)])
        for actual, right in zip(results, host(numbers(seed, 5)), strict=True):
            assert torch.equal(actual, right)


def of_products(name: str) -> Callable[[bool], None]:
    return lambda way: setattr(torch.backends.cuda.matmul, name, way)


SETTINGS: dict[str, tuple[Callable[[bool], None], bool]] = {
    "sums of bfloat16 in less": (of_products("allow_bf16_reduced_precision_reduction"), False),
    "sums of float16 in less": (of_products("allow_fp16_reduced_precision_reduction"), False),
    "sums in float16": (of_products("allow_fp16_accumulation"), True),
    "deterministic": (torch.use_deterministic_algorithms, True),
}
"""How each is set, and to what it is not by default."""


@contextmanager
def other(setting: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A setting of torch in here as it is not by default."""
    with monkeypatch.context() as patch, ExitStack() as after:
        if setting in SETTINGS:
            change, value = SETTINGS[setting]
            after.callback(change, not value)
            change(value)
        elif setting == "tuned":
            patch.setattr(portable_product, "_tuned", lambda: True)  # only a torch for CUDA can be told
        elif setting == "another library":
            patch.setattr(portable_product, "_backend", lambda: torch._C._BlasBackend.Cublaslt)
        else:
            kernels = torch.library.Library("aten", "IMPL")
            after.callback(kernels._destroy)
            kernels.impl("mm", lambda a, b: a, "CUDA")
        yield


@pytest.fixture
def asked(op: Op, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A word for each product that cuBLAS was asked for."""
    found: list[str] = []
    multiplying = portable_product._multiply

    def noted(*sizes: int) -> Any:
        multiply = multiplying(*sizes)
        return lambda *given: (found.append("cuBLAS"), multiply(*given))

    monkeypatch.setattr(portable_product, "_multiply", noted)
    return found


def square(seed: int) -> Tensor:
    return numbers(seed, 16, torch.bfloat16).view(4, 4)


def toy(name: str, forward: Callable[..., tuple[Tensor]], backward: Callable[..., list[Tensor | None]]) -> Opaque:
    return Opaque(f"gdn::toy_{name}", forward, backward, fake=lambda x, *rest: (x.clone(),), results=1, differentiable=("x",), replay=True)


@pytest.mark.parametrize("setting", [*SETTINGS, "another library", "tuned", "an operator of the user's"])
@pytest.mark.parametrize("whole", [False, True])
def test_settings_of_torch_that_concern_products_are_followed(
    setting: str, whole: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By an operator and by itself, from the next call on."""

    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        HOSTS.append("forward")
        return (x @ x,)

    def backward(args: Arguments, saved: Any, grads: Any) -> list[Tensor | None]:
        HOSTS.append("backward")
        return [grads[0] @ args[0]]

    host = toy(f"setting_{''.join(filter(str.isalnum, setting))}_{whole}".lower(), forward, backward)
    operate = replayed(lambda x: host(x)[0]) if whole else lambda x: host(x)[0]

    def call(seed: int) -> tuple[list[str], list[str]]:
        asked.clear()
        x, dy = square(seed), square(seed + 7)
        with torch.no_grad():
            torch.testing.assert_close(operate(x), x @ x)
        y = operate(leaf := x.clone().requires_grad_())
        torch.testing.assert_close(torch.autograd.grad(y, leaf, dy)[0], dy @ x)
        return hosts(), asked.copy()

    ran = ["forward", "forward", "backward"]
    assert call(0) == (ran, ["cuBLAS"] * 3)
    for seed in (1, 2):
        assert call(seed) == ([], ["cuBLAS"] * 3)
    with other(setting, monkeypatch):
        assert call(3) == (ran, [])
        assert call(4) == ([], [])
    assert portable_product.ordinary()
    assert call(5)[1] == ["cuBLAS"] * 3
    assert call(6) == ([], ["cuBLAS"] * 3)


def squaring(name: str) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        HOSTS.append("forward")
        return (x @ x,)

    host = toy(name, forward, lambda args, saved, grads: [grads[0] @ args[0]])
    return replayed(lambda x: host(x)[0])


def test_without_a_plan_products_are_cublas_s(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of what would have a workspace in a plan."""
    monkeypatch.setattr(replay, "plan", lambda launches, addresses: None)
    monkeypatch.setattr(replay, "nodes", lambda multiply, *matrices: portable_plan.Nodes(multiply, 300))
    operate = squaring("planless")
    for seed in range(3):
        torch.testing.assert_close(operate(square(seed)), square(seed) @ square(seed))
    assert hosts() == ["forward"] and asked == ["cuBLAS"] * 3


@pytest.mark.parametrize("workspace", [0, 300])
def test_a_plan_follows_the_workspace_that_torch_gives(workspace: int, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    given = [1]
    monkeypatch.setattr(portable_product, "_given", lambda: given[0])
    monkeypatch.setattr(replay, "nodes", lambda multiply, *matrices: portable_plan.Nodes(multiply, workspace))
    operate, ran = squaring(f"workspace_{workspace}"), list[int]()
    for seed, given[0] in enumerate([1, 1, 2, 2, 1, 1]):
        torch.testing.assert_close(operate(square(seed)), square(seed) @ square(seed))
        ran.append(len(hosts()))
    assert ran == [1, 0, 1, 0, 0, 0] and len(asked) == 6


def test_a_workspace_is_not_allocated_to_write_a_product_down(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "nodes", lambda multiply, *matrices: portable_plan.Nodes(multiply, 1 << 60))
    with replay.Recorder([square(0)]) as seen:
        y = seen._held[0] @ seen._held[0]
    recording = seen.finish([y])
    assert recording is not None
    workspace = replay._Fresh((1 << 60,), (1,), torch.uint8, 1 << 60)
    assert [x for x in recording.fresh.values() if x.dtype == torch.uint8] == [workspace]


@pytest.mark.parametrize("name", ["mm", "mm.dtype_out", "addmm.dtype_out"])
def test_each_operator_that_is_asked_for_products_may_be_the_user_s(name: str) -> None:
    kernels = torch.library.Library("aten", "IMPL")
    try:
        kernels.impl(name, lambda *given, **named: given[0], "CUDA")
        assert not portable_product.ordinary()
    finally:
        kernels._destroy()
    assert portable_product.ordinary()


@pytest.mark.parametrize("alone", [False, True])
def test_settings_are_followed_where_only_the_backward_multiplies(alone: bool, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def backward(args: Arguments, saved: Any, grads: Any) -> list[Tensor | None]:
        HOSTS.append("backward")
        return [(grads[0] if alone else grads[0] + 1) @ args[0]]

    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        return (x + 1,)

    host = toy(f"backward_{alone}".lower(), forward, backward)

    def call(seed: int) -> tuple[list[str], list[str]]:
        asked.clear()
        x, dy = square(seed).requires_grad_(), square(seed + 7)
        torch.testing.assert_close(torch.autograd.grad(host(x)[0], x, dy)[0], (dy if alone else dy + 1) @ x)
        return hosts(), asked.copy()

    assert call(0) == (["backward"], ["cuBLAS"])
    for seed in (1, 2):
        assert call(seed) == ([], ["cuBLAS"])
    with other("deterministic", monkeypatch):
        assert call(3) == (["backward"], [])
        assert call(4) == ([], [])


def test_settings_are_followed_by_operators_of_several_calls(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which torch does one; or of a call that is written down after the operator, for it had one tensor twice."""

    def product(x: Tensor, w: Tensor, keep: bool) -> tuple[Tensor]:
        return (x @ w,)

    def sum_of_both(x: Tensor, w: Tensor, keep: bool) -> tuple[Tensor]:
        return (x + w,)

    def none(args: Arguments, saved: Any, grads: Any) -> list[Tensor | None]:
        return [None]

    multiply, add = toy("multiply", product, none), toy("add", sum_of_both, none)
    several = replayed(lambda x, w: add(multiply(x, w)[0], w)[0])
    twice = replayed(lambda x: multiply(x, x)[0])
    x, w = square(0), square(1)
    for _ in range(3):
        torch.testing.assert_close(twice(x), x @ x)
    assert asked == []
    for _ in range(3):
        torch.testing.assert_close(several(x, w), x @ w + w)
        torch.testing.assert_close(twice(x), x @ x)
    assert asked
    asked.clear()
    with other("deterministic", monkeypatch):
        for _ in range(3):
            torch.testing.assert_close(twice(x), x @ x)
            torch.testing.assert_close(several(x, w), x @ w + w)
    assert asked == []


@pytest.mark.parametrize("inside", [False, True])
def test_a_part_of_an_argument_is_no_result(inside: bool) -> None:
    def host(x: Tensor) -> list[Tensor]:
        part = x[1:]
        return [part + 1 if inside else x + 1, part]

    _, recording = replay.record(lambda: host(x), [x := numbers(0)])
    assert recording is None


@pytest.mark.parametrize("end", ["result", "in another shape"])
def test_between_calls_a_tensor_may_change_its_shape(end: str, replayed_here: list[str]) -> None:
    @replayed
    def flat(x: Tensor, bias: Tensor) -> Tensor:
        HOSTS.append("flat")
        y = SCALE(x.flatten(), bias.view(-1), 2.0)[0]
        return y if end == "result" else y.view(x.shape)

    for seed in range(3):
        x, bias = numbers(seed, 6).view(2, 3), numbers(seed + 5, 6).view(3, 2)
        y = flat(x, bias)
        assert y.shape == ((6,) if end == "result" else (2, 3))
        torch.testing.assert_close(y.flatten(), 2 * x.flatten() + bias.flatten())
    assert hosts() == ["flat", "forward"] and len(replayed_here) == 2 * 2  # the seeds after the first, two kernels each
    for seed in range(3):
        x, bias = numbers(seed, 6).view(2, 3).requires_grad_(), numbers(seed + 5, 6).view(3, 2).requires_grad_()
        found = torch.autograd.grad(flat(x, bias).sum(), (x, bias))
        torch.testing.assert_close(found, (torch.full((2, 3), 2.0), torch.ones(3, 2)))
    assert hosts() == ["flat", "forward", "backward"]


@pytest.mark.parametrize("cut", ["detached", "without gradients", "a result"])
def test_between_calls_what_is_cut_off_from_gradients_stays_so(cut: str) -> None:
    @replayed
    def other(x: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        if cut == "a result":
            y = SCALE(x, bias, 2.0)[0]
            return y, y.detach()
        with torch.set_grad_enabled(cut == "detached"):
            inside = x.detach() if cut == "detached" else x.view(-1)
        return SCALE(inside, bias, 2.0)

    for seed in range(3):
        x, bias = numbers(seed).requires_grad_(), numbers(seed + 5).requires_grad_()
        y, *rest = other(x, bias)
        assert not any(z.requires_grad for z in rest)
        dx, dbias = torch.autograd.grad(y.sum(), (x, bias), allow_unused=True)
        assert torch.equal(dbias, torch.ones(5)) and (dx is None) == (cut != "a result")


@pytest.mark.parametrize("last", ["matmul", "contiguous"])
def test_what_torch_calls_a_view_or_none_is_what_it_is(last: str) -> None:
    """The last thing that `matmul` does is a view that may be written to; `contiguous` in inference mode may be a copy."""

    def host(x: Tensor) -> list[Tensor]:
        return [torch.matmul(x, x[0].T).view(-1, 2).view(3, 2, 2) if last == "matmul" else x.transpose(0, 1).contiguous()]

    def given(seed: int) -> Tensor:
        return numbers(seed, 24).view(3, 2, 4)

    with torch.inference_mode(last == "contiguous"):
        (first,), recording = replay.record(lambda: host(x), [x := given(0)])
        assert recording is not None and torch.equal(first, host(x)[0])
        for seed in (1, 2):
            assert torch.equal(recording.known().run([y := given(seed)])[0], host(y)[0])
    _, recording = replay.record(lambda: [torch.matmul(x, x[0].T)], [x := given(0)])
    assert recording is not None and not recording.known().run([x])[0]._is_view()


@pytest.mark.parametrize("part", [slice(1, None), slice(None, None, 2), slice(None)], ids=["a part", "apart", "memory of two"])
def test_between_calls_nothing_else_is_replayed_whole(part: slice) -> None:
    @replayed
    def other(x: Tensor, y: Tensor) -> Tensor:
        HOSTS.append("other")
        return SCALE(x[part], None, 2.0)[0]

    for seed in range(3):
        both = numbers(seed, 16)
        assert torch.equal(other(both[:8], both[8:] if part == slice(None) else both[8:].clone()), 2 * both[:8][part])
    assert hosts().count("other") == 3


@pytest.mark.parametrize("harm", ["value", "random", "between", "device", "shape"])
def test_what_may_turn_out_otherwise_is_never_replayed(harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(opaque, "record", lambda *arguments: (tried.append(arguments), replay.record(*arguments))[1])

    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        HOSTS.append("forward")
        y = torch.empty_like(x)
        factor = float(x[0]) if harm == "value" else 1.0
        noise = torch.rand(5) if harm == "random" else None
        if harm == "device":
            x.to("meta")
        launch(scale_kernel, (1,), x, noise, y, factor, 5, 1, 16)
        return (y.unsqueeze_(0) if harm == "shape" else y,)

    name = f"gdn::toy_{harm}"
    host = Opaque(name, forward, lambda a, s, g: [None], fake=lambda x, keep: (x,), results=1, differentiable=("x",), replay=True)

    @replayed
    def operate(x: Tensor) -> Tensor:
        HOSTS.append("operate")
        (y,) = host(x)
        return y.add_(x) if harm == "between" else y

    for seed in range(3):
        x = numbers(seed)
        y = operate(x)
        if harm == "value":
            torch.testing.assert_close(y, x * x[0])
        elif harm != "random":
            torch.testing.assert_close(y, 2 * x if harm == "between" else x[None] if harm == "shape" else x)
    assert hosts() == (["operate", "forward", "operate", "operate"] if harm == "between" else ["operate", *["forward"] * 3])
    assert len(tried) == 1, "what cannot be written down is not tried again"


@pytest.mark.parametrize("what", ["a part of what an operator made", "bits of another type"])
def test_an_operator_s_result_has_parts_but_no_bits_of_another_type(what: str) -> None:
    """A part that a kernel gets is so many bytes after the beginning; the other has no place in a recording."""

    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        HOSTS.append("forward")
        y = torch.empty(4)
        if what == "bits of another type":
            launch(scale_kernel, (1,), x, None, y, 2, 4, 1, 16)
            return (y + (y.view(torch.int32) * 0),)
        launch(scale_kernel, (1,), (x + 0)[4:], None, y, 2, 4, 1, 16)
        return (y,)

    fake = lambda x, keep: (torch.empty(4),)  # noqa: E731
    host = Opaque(f"gdn::toy_{what[0]}", forward, lambda a, s, g: [None], fake=fake, results=1, differentiable=("x",), replay=True)
    for seed in range(3):
        x = numbers(seed, 8)
        torch.testing.assert_close(host(x)[0], 2 * (x[4:] if what.startswith("a part") else x[:4]))
    assert hosts() == ["forward"] * (1 if what.startswith("a part") else 3)


def test_an_operator_with_results_or_kernels_from_elsewhere_is_never_replayed() -> None:
    elsewhere = torch.zeros(5)

    @replayed
    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        HOSTS.append("two")
        return SCALE(x, None, 2.0)[0], elsewhere

    @replayed
    def unseen(x: Tensor) -> Tensor:
        HOSTS.append("unseen")
        ctypes.memset(x.data_ptr(), 0, 8)
        return x

    for _ in range(2):
        assert two(numbers())[1] is elsewhere
        assert torch.equal(unseen(torch.ones(2)), torch.zeros(2))
    assert hosts() == ["two", "forward", "unseen", "two", "unseen"]


def test_nothing_is_replayed_under_modes_or_transforms_or_for_subclasses() -> None:
    class Quiet(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    class Own(Tensor):
        pass

    x = numbers()
    scaled(x)
    hosts()
    with use(scaled="plain"):
        torch.testing.assert_close(torch.func.vmap(scaled)(torch.stack([x, x])), torch.stack([2 * x, 2 * x]))
    scaled(x)
    hosts()
    assert_replayed(lambda: scaled(x.as_subclass(Own)), 2 * x, ["contract", "forward"])
    with Quiet():
        assert_replayed(lambda: scaled(x), 2 * x, ["contract", "forward"])
    assert_replayed(lambda: scaled(x), 2 * x)


def test_nothing_is_written_down_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_known, "FIRST_DEVICE", 0)
    for _ in range(2):
        assert_replayed(lambda: scaled(numbers()), 2 * numbers(), ["contract", "forward"])
    assert not any(replay_known._TABLES)


def test_autocast_does_not_reach_inside_a_replay() -> None:
    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        HOSTS.append("forward")
        y = torch.empty_like(x)
        launch(scale_kernel, (1,), x, None, y, 1, x.numel(), 1, 16)
        return (y @ x,)

    host = Opaque(
        "gdn::toy_autocast", forward, lambda a, s, g: [None], fake=lambda x, keep: (x,), results=1, differentiable=("x",), replay=True
    )
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert host(torch.eye(3))[0].dtype == torch.float32
    assert hosts() == ["forward"]


def test_a_compiled_graph_is_whole() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, bias: scaled(x, bias=bias).cos(), fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x, bias = numbers(seed), numbers(seed + 5)
        for _ in range(2):
            torch.testing.assert_close(scaled(x, bias=bias), 2 * x + bias)
        torch.testing.assert_close(compiled(x, bias), (2 * x + bias).cos())


def test_packed_rows_are_looked_at_once_a_packing() -> None:
    @replayed
    def packed(x: Tensor, packing: Packing) -> Tensor:
        packing.check(2, 2, x.device)
        HOSTS.append("packed")
        return SCALE(x, None, 2.0)[0]

    x, good, bad = numbers(n=4), Packing.from_lengths([2, 2]), Packing.from_lengths([3, 1])
    for _ in range(3):
        assert torch.equal(packed(x, good), 2 * x)
        assert torch.equal(packed(x, Packing.from_lengths([2, 2])), 2 * x)
        with pytest.raises(ArgumentError, match="a document crosses the end of a row"):
            packed(x, bad)
    assert packed(x, good) is not None
    assert len(hosts()) < 7


def test_a_table_is_emptied_when_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay_known, "MOST", 3)
    for n in range(1, 10):
        scaled(numbers(n=n))
    assert max(len(table) for table in replay_known._TABLES) == 3
    hosts()
    assert_replayed(lambda: scaled(numbers(n=9)), 2 * numbers(n=9))
    assert_replayed(lambda: scaled(numbers(n=1)), 2 * numbers(n=1), ["contract", "forward"])


def test_what_was_found_out_before_all_was_forgotten_is_not_kept(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that writes an operator's call down while another leaves `use`."""
    x, finish = numbers(), replay.Witness.finish

    def forget_first(self: replay.Witness, results: Any) -> Any:
        replay_known.forget()
        return finish(self, results)

    with monkeypatch.context() as patch:
        patch.setattr(replay.Witness, "finish", forget_first)
        scaled(x)
        assert not any(replay_known._TABLES)


def test_copies_of_an_operator_are_the_operator() -> None:
    assert copy.deepcopy(l2norm) is l2norm and pickle.loads(pickle.dumps(l2norm)) is l2norm


def test_operators_are_compiled_each_by_itself() -> None:
    """torch.compile counts what it has compiled by code objects, and gives up at a limit."""
    torch._dynamo.reset()
    x = torch.randn(3, 8)
    with torch._dynamo.config.patch(recompile_limit=1):
        for operator in (l2norm, write_gate):
            torch.compile(operator, fullgraph=True, backend="eager")(x[None])


def test_modes_do_not_import_the_compiler() -> None:
    """Which torch would do to keep its compiler out of a mode's dispatch, in the first call of all."""
    for mode in (replay.Recorder, replay.Witness):
        assert not hasattr(mode.__torch_dispatch__, "__wrapped__")


def test_an_operator_keeps_its_name_and_its_specification() -> None:
    assert scaled.__name__ == "scaled" and scaled.__doc__ == "An operator of a table." and scaled.__module__ == __name__


def test_without_the_promise_nothing_is_replayed() -> None:
    host = opaque.Opaque("gdn::toy_unpromised", _forward, _backward, fake=_fake, results=1, differentiable=("x", "bias"))
    for _ in range(2):
        host(numbers(), None, 2.0)
    assert hosts() == ["forward"] * 2
