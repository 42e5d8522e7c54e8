"""A hand-written backward behaves the same in eager mode and under the compiler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.gradcheck import GradcheckError

from gdn.core import replay_known
from gdn.core.opaque import Arguments, InPlace, Opaque, Tensors, decided

KEPT: list[bool] = []


def _forward(x: Tensor, bias: Tensor | None, scale: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    KEPT.append(keep)
    square = scale * x * x
    return square if bias is None else square + bias, x.sum().reshape(1), (2 * scale * x if keep else x.new_empty(0))


def _backward(args: Arguments, saved: Tensors, grads: Any) -> list[Tensor | None]:
    x, bias, _ = args
    d_y, d_sum = grads
    d_x = torch.zeros_like(x)
    if d_y is not None:
        d_x += d_y * saved[0]
    if d_sum is not None:
        d_x += d_sum
    if bias is None:
        return [d_x, None]
    return [d_x, torch.zeros_like(bias) if d_y is None else d_y.clone()]


def _fake(x: Tensor, bias: Tensor | None, scale: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(1), x.new_empty(x.shape if keep else (0,))


TOY = Opaque("gdn::toy", _forward, _backward, fake=_fake, results=2, differentiable=("x", "bias"))


def _add(x: Tensor, other: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    total = x + other
    return scale * total * total, total, total.new_full((2,), scale)


def _add_backward(args: Arguments, saved: Tensors, grads: Any) -> list[Tensor | None]:
    assert args == (None, None, 0.5)
    (total, scale), (d_y, d_total) = saved, grads
    assert scale.tolist() == [0.5, 0.5]
    of_y = torch.zeros_like(total) if d_y is None else 2 * scale[0] * total * d_y
    return [of_y if d_total is None else of_y + d_total]


ADD = Opaque(
    "gdn::toy_add",
    _add,
    _add_backward,
    fake=lambda x, other, scale, keep: (x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(2)),
    results=2,
    differentiable=("x",),
    follows={"other": "x"},
    without={"x": 0, "other": 0},
    saved_results=1,
)
"""Keeps a result instead of its arguments, which have one gradient."""


def inputs(with_bias: bool) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    return x, torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True) if with_bias else None


def loss(results: Tensors, used: str) -> Tensor:
    y, total = results
    return {"both": (y * y).sum() + 3 * total.sum(), "first": (y * y).sum(), "second": 3 * total.sum()}[used]


def plain(x: Tensor, bias: Tensor | None, scale: float) -> Tensors:
    y = scale * x * x
    return y if bias is None else y + bias, x.sum().reshape(1)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("used", ["both", "first", "second"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients(with_bias: bool, used: str, compiled: bool) -> None:
    def step(x: Tensor, bias: Tensor | None) -> Tensor:
        return loss(TOY(x, bias, 0.5), used)

    torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    x, bias = inputs(with_bias)
    leaves = [t for t in (x, bias) if t is not None]
    expected = loss(plain(x, bias, 0.5), used)
    actual = function(x, bias)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, leaves, materialize_grads=True), torch.autograd.grad(expected, leaves, materialize_grads=True)
    )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_nothing_is_kept_where_no_gradient_will_be_asked_for(compiled: bool) -> None:
    def step(x: Tensor) -> Tensor:
        return TOY(x, None, 0.5)[0]

    torch._dynamo.reset()
    function = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    x, _ = inputs(False)
    for argument, wanted in ((x, True), (x.detach(), False)):
        KEPT.clear()
        assert function(argument).requires_grad is wanted
        assert KEPT and KEPT[-1] is wanted
    with torch.no_grad():
        KEPT.clear()
        assert not function(x).requires_grad
        assert KEPT[-1] is False


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("used", ["both", "first", "second"])
@pytest.mark.parametrize("needing", [(True, True), (True, False), (False, True)], ids=str)
def test_arguments_that_are_not_kept_and_have_one_gradient(needing: tuple[bool, bool], used: str, compiled: bool) -> None:
    torch._dynamo.reset()
    function = torch.compile(ADD, fullgraph=True, backend="aot_eager") if compiled else ADD
    x, other = (torch.randn(3, 4, dtype=torch.float64, requires_grad=need) for need in needing)
    leaves = [t for t in (x, other) if t.requires_grad]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        results = function(x, other, 0.5)
    assert sorted(t.numel() for t in kept) == [2, 12]
    assert any(t.data_ptr() == results[1].data_ptr() for t in kept)
    expected = 0.5 * (x + other) ** 2, x + other
    gradients = torch.autograd.grad(loss(results, used), leaves)
    torch.testing.assert_close(gradients, torch.autograd.grad(loss(expected, used), leaves))


def test_gradients_agree_with_finite_differences() -> None:
    x, bias = inputs(True)
    assert bias is not None
    assert torch.autograd.gradcheck(lambda x, bias: TOY(x, bias, 0.5), (x, bias))


def test_the_registered_operators_keep_their_promises() -> None:
    x, bias = inputs(True)
    torch.library.opcheck(torch.ops.gdn.toy.default, (x, bias, 0.5, True))
    torch.library.opcheck(torch.ops.gdn.toy_add.default, (x, bias, 0.5, True))


def test_autocast_does_not_reach_inside() -> None:
    seen = []

    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return (x @ x,)

    def backward(args: Arguments, saved: Tensors, grads: Any) -> list[Tensor | None]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return [grads[0] @ args[0].mT + args[0].mT @ grads[0]]

    square = Opaque("gdn::toy_square", forward, backward, fake=lambda x, keep: (x @ x,), results=1, differentiable=("x",))
    x = torch.eye(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (y,) = square(x)
        y.sum().backward()
    assert y.dtype == torch.float32
    assert seen == [False, False]


def test_a_second_derivative_is_refused() -> None:
    x, _ = inputs(False)
    (gradient,) = torch.autograd.grad(TOY(x, None, 0.5)[0].square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("asked", ["backward", "grad"])
def test_no_part_of_a_second_derivative_is_left_out_in_silence(asked: str) -> None:
    """A penalty on a gradient whose slope is a number: only the argument needs a gradient."""
    x, _ = inputs(False)
    y, _ = TOY(x, None, 0.5)
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(TOY(x, None, 0.5)[0].sum(), x)[0])
    loss = y.sum() + gradient.square().sum()
    with pytest.raises(RuntimeError, match="gdn::toy is once_differentiable"):
        loss.backward() if asked == "backward" else torch.autograd.grad(loss, x)


def test_forward_must_end_with_keep() -> None:
    def forward(x: Tensor, scale: float) -> tuple[Tensor]:
        return (x * scale,)

    with pytest.raises(TypeError, match="the last parameter of forward must be keep, got scale"):
        Opaque("gdn::toy_bad", forward, _backward, fake=forward, results=1, differentiable=("x",))


def test_too_few_gradients_are_found() -> None:
    def forward(x: Tensor, bias: Tensor, keep: bool) -> tuple[Tensor]:
        return (x + bias,)

    one_short = Opaque("gdn::toy_short", forward, lambda a, s, g: [g[0]], fake=forward, results=1, differentiable=("x", "bias"))
    x, bias = inputs(True)
    with pytest.raises(ValueError, match="zip"):
        one_short(x, bias)[0].sum().backward()


def test_a_wrong_backward_is_found_by_finite_differences() -> None:
    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        return (x * x,)

    wrong = Opaque("gdn::toy_wrong", forward, lambda a, s, g: [g[0] * a[0]], fake=forward, results=1, differentiable=("x",))
    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(lambda x: wrong(x)[0], (inputs(False)[0],))


def _count(state: Tensor, step: float) -> Tensor:
    before = state.clone()
    state.add_(step)
    return before


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_operator_in_place_writes_into_its_argument(compiled: bool) -> None:
    function = torch.compile(COUNT, fullgraph=True, backend="aot_eager") if compiled else COUNT
    state = torch.zeros(2)
    assert function(state, 1.5).tolist() == [0.0, 0.0]
    assert function(state, 1.5).tolist() == [1.5, 1.5]
    assert state.tolist() == [3.0, 3.0]


COUNT = InPlace("gdn::toy_count", _count, mutates=("state",), fake=lambda state, step: torch.empty_like(state))


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning"
)  # torch's own decompositions, loaded with the first tangent
def test_a_tangent_is_refused(needs_gradient: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward-mode derivatives have no formula; without a look at the argument the tangent would be lost where no gradient is needed."""
    monkeypatch.setattr(replay_known, "FIRST_DEVICE", -1)
    assert replay_known.signature((torch.ones(3),)) is not None
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.ones(3, requires_grad=needs_gradient), torch.ones(3))
        with pytest.raises(RuntimeError, match="gdn::toy has no forward-mode derivative"):
            TOY(x, None, 1.0)
        assert TOY(torch.ones(3), None, 1.0)[0].tolist() == [1.0, 1.0, 1.0]
        assert replay_known.signature((torch.ones(3),)) is None


def test_a_lone_result_that_is_saved() -> None:
    """In eager mode and as an operator of a graph."""

    def forward(x: Tensor, keep: bool) -> tuple[Tensor]:
        return (x.exp(),)

    exp = Opaque(
        "gdn::toy_exp",
        forward,
        lambda args, saved, grads: [saved[0] * grads[0]],
        fake=lambda x, keep: (torch.empty_like(x),),
        results=1,
        differentiable=("x",),
        saved_results=1,
    )
    for function in (exp, torch.compile(exp, fullgraph=True, backend="aot_eager")):
        x = torch.randn(3, requires_grad=True)
        (y,) = function(x)
        torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], x.exp())


def test_a_size_is_decided_where_all_are_numbers() -> None:
    assert decided(lambda: 7, torch.empty(2, 3), None, 5) == 7
