"""What a host would launch is found without launching it: on tensors without data, outside of modes, and while torch.compile traces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gdn.core import foresight, opaque, replay_known
from gdn.core.foresight import THREAD, foreseeing, taken, without_data, written
from gdn.core.opaque import Arguments, Opaque


def launch(name: str, x: Tensor) -> None:
    if THREAD.launches is not None:
        assert x.data_ptr() == 0  # fake tensors refuse
        THREAD.launches.append((name, x.device.type, tuple(x.shape), x.stride()))


def _forward(x: Tensor, by: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    assert not torch.is_autocast_enabled("cpu")
    launch("forward", x)
    return x * by, x.new_zeros(2), torch.empty_like(x)


def _backward(args: Arguments, saved: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
    dy, d_rest = grads
    assert dy is not None and saved[0].shape == args[0].shape
    launch("backward" if d_rest is None else "backward of both", dy)
    return [dy * args[1]]


def _fake(x: Tensor, by: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(2), torch.empty_like(x)


SCALED = Opaque("gdn::toy_foreseen", _forward, _backward, fake=_fake, results=2, differentiable=("x",), replay=True, expected=1)


class Seeing(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_nothing_and_come_back() -> None:
    x = torch.zeros(4, 6)
    with Seeing() as outer, Seeing() as inner:
        result, launches = written(lambda x: [launch("a", x), x + 1], x)
        launch("b", x)
        x.neg()
    assert result[1].is_meta and [each[0] for each in launches] == ["a"]
    assert outer.seen == inner.seen == ["aten.neg.default"]


def test_modes_of_functions_see_nothing() -> None:
    seen: list[Any] = []

    class Looking(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.zeros(4, 6)
    with Looking():
        written(lambda x: x + 1, x)
        assert not seen
        x.neg()
    assert seen == [Tensor.neg]


def test_tensors_without_data_have_the_same_geometry() -> None:
    x = torch.zeros(4, 6, dtype=torch.float16)[:, 1:3]
    (same,), none, five = without_data(([x], None, 5))
    assert (
        (same.shape, same.stride(), same.dtype, same.device.type) == (x.shape, x.stride(), x.dtype, "meta") and none is None and five == 5
    )


def test_more_is_asked_once_and_forgotten_at_the_end() -> None:
    with foreseeing(lambda: [["outer"]]):
        with foreseeing(lambda: [["inner"]]):
            assert list(taken()) == [["inner"]] and list(taken()) == []
        assert list(taken()) == [["outer"]]
        with foreseeing(lambda: [["inner"]]):
            pass
    assert list(taken()) == []


@pytest.mark.parametrize("grad", [True, False])
def test_a_forward_knows_its_backward(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    x = torch.randn(6, 4, requires_grad=grad).t()
    host = SCALED._hosts[0]

    def looking(*args: Any) -> Any:
        if not asked:
            asked.extend(taken())
        return host(*args)

    monkeypatch.setattr(SCALED, "forward", opaque._foreseeing(looking, SCALED._launches))
    y, _ = SCALED(x, 2.0)
    forward, backward = ("forward", "meta", (4, 6), (1, 4)), ("backward", "meta", (4, 6), (1, 4))
    assert asked == ([[forward], [backward]] if grad else [[forward]])
    assert torch.equal(y, 2 * x)


def test_compilation_begins_while_torch_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forward and backward, once for each signature, and not for sizes that are symbols."""
    begun: list[list[Any]] = []
    monkeypatch.setattr(replay_known, "FIRST_DEVICE", -1)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(opaque, "begin", lambda launches, device: begun.append([name for some in launches for name, *_ in some]))
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: SCALED(SCALED(x, 2.0)[0], 2.0)[0].cos(), fullgraph=True, backend="aot_eager", dynamic=False)
    for size in (3, 3, 5):
        with torch.autocast("cpu"):
            compiled(torch.randn(size, 2, requires_grad=True)).sum().backward()
    assert begun == [["forward", "backward"]] * 2
    compiled = torch.compile(lambda x: SCALED(x, 3.0)[0].cos(), fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(7, 2, requires_grad=True))
    assert len(begun) == 2


def test_nothing_is_begun_for_no_launches() -> None:
    foresight.begin([[], []], 0)
