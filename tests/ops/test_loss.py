"""The head's loss against its reference, F.cross_entropy and finite differences, and the memory it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.ops import linear_cross_entropy
from gdn.ops.loss import chunked
from gdn.ops.loss import logits as given
from gdn.ops.loss.problems import PROBLEMS, Problem

reductions = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture(params=[1 << 23, 100], ids=["one chunk", "small chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", request.param)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@reductions
def test_matches_the_reference(
    problem: Problem, dtype: torch.dtype, reduction: str, chunks: None, as_good_as_the_reference: Callable[..., None]
) -> None:
    as_good_as_the_reference(linear_cross_entropy, "chunked", {**problem.build(dtype=dtype), "reduction": reduction})


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@reductions
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_matches_cross_entropy(impl: str, reduction: Any, ignore_index: int, chunks: None) -> None:
    arguments = PROBLEMS[1].build(dtype=torch.float64)
    x, weight, targets = arguments["x"].requires_grad_(), arguments["weight"].requires_grad_(), arguments["targets"]
    targets = targets.masked_fill(targets == -100, ignore_index)
    expected = F.cross_entropy(F.linear(x, weight), targets, ignore_index=ignore_index, reduction=reduction)
    with use(linear_cross_entropy=impl):
        loss = linear_cross_entropy(x, weight, targets, ignore_index=ignore_index, reduction=reduction)
    torch.testing.assert_close(loss, expected)
    factor = torch.rand_like(expected)
    ours, theirs = (torch.autograd.grad((y * factor).sum(), (x, weight)) for y in (loss, expected))
    torch.testing.assert_close(ours, theirs)


@reductions
def test_gradients_by_finite_differences(reduction: Any, chunks: None) -> None:
    arguments = Problem(name="", tokens=(2, 4), D=2, vocab=30, ignored=0.3).build(dtype=torch.float64)
    targets = arguments.pop("targets")
    leaves = [t.requires_grad_() for t in arguments.values()]
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets, reduction=reduction), leaves, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunk", [1, 100, 1 << 18])
def test_of_given_logits(reduction: str, dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given, "CHUNK_LOGITS", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = (30 * torch.randn(17, 23, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
    targets = torch.randint(23, (17,), generator=generator)
    targets[::3] = -1
    exact = F.cross_entropy(logits.double(), targets, ignore_index=-1, reduction=reduction)
    loss = given.cross_entropy(logits, targets, -1, reduction)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    ours, truth = (torch.autograd.grad(3 * y, logits)[0] for y in (loss, exact))
    torch.testing.assert_close(ours, truth)


def test_nothing_counts() -> None:
    arguments = PROBLEMS[2].build(dtype=torch.float32)
    leaves = [arguments["x"].requires_grad_(), arguments["weight"].requires_grad_()]
    loss = linear_cross_entropy(**arguments)
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, leaves))


def test_very_unlikely_targets_cost_what_they_should() -> None:
    """The probability e^-500 is zero in float32; its logarithm is not."""
    x, weight = torch.tensor([[500.0]], requires_grad=True), torch.tensor([[1.0], [0.0]])
    loss = linear_cross_entropy(x, weight, torch.tensor([1]))
    assert loss.item() == 500
    loss.backward()
    assert x.grad is not None
    assert x.grad.item() == 1


def test_half_precision_inputs_have_float32_logits() -> None:
    """The two logits, 256 and 256 + 1/2, are one number in bfloat16."""
    x, weight = torch.tensor([[256.0, 0.5]]).bfloat16(), torch.tensor([[1.0, 0.0], [1.0, 1.0]]).bfloat16()
    loss = linear_cross_entropy(x, weight, torch.tensor([1]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-0.5)), rel=1e-5)


def test_autocast_changes_nothing() -> None:
    arguments = PROBLEMS[0].build(dtype=torch.float32)
    expected = linear_cross_entropy(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_cross_entropy(**arguments), expected)


def test_gradients_accumulate_over_batches_and_may_be_asked_for_twice(chunks: None) -> None:
    arguments = PROBLEMS[0].build(dtype=torch.float64)
    x, weight, targets = arguments["x"], arguments["weight"].requires_grad_(), arguments["targets"]
    loss = linear_cross_entropy(x, weight, targets)
    (whole,) = torch.autograd.grad(loss, weight, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(weight.grad, 2 * whole)
    weight.grad = None
    for half in (0, 1):
        (linear_cross_entropy(x[half], weight, targets[half]) / 2).backward()
    torch.testing.assert_close(weight.grad, whole)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made inside the block."""

    numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result


@reductions
@pytest.mark.parametrize("gradients", [False, True])
def test_never_holds_all_logits(reduction: Any, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 4000)
    arguments = Problem(name="", tokens=(300,), D=4, vocab=100).build(dtype=torch.float32)
    kept: list[Tensor] = []
    arguments["x"].requires_grad_(gradients)
    with Largest() as made, torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        loss = linear_cross_entropy(**arguments, reduction=reduction)
        if gradients:
            loss.sum().backward()
    assert 1200 <= made.numel <= 4000
    assert bool(kept) == gradients
    assert all(t.numel() <= 1200 for t in kept)


@reductions
def test_compiles_as_one_graph(reduction: str, as_good_as_the_reference: Callable[..., None]) -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    arguments = {**PROBLEMS[1].build(dtype=torch.float32), "reduction": reduction}
    as_good_as_the_reference(linear_cross_entropy, "chunked", arguments, run=compiled)


X, WEIGHT, TARGETS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": X[..., :3]}, r"x: expected \[..., D=4\] to fit weight, got \[2, 3, 3\]"),
        ({"weight": WEIGHT[0]}, r"weight: expected 2 dimensions \[vocab, D\], got \[4\]"),
        ({"targets": TARGETS[0]}, r"targets: expected \[2, 3\] like x without its last dimension, got \[3\]"),
        ({"targets": TARGETS.int()}, "targets: expected torch.int64, got torch.int32"),
        ({"x": X.int()}, "x: expected a floating dtype"),
        ({"reduction": "max"}, 'reduction: expected "mean", "sum" or "none", got \'max\''),
        ({"weight": WEIGHT.to("meta")}, "weight: expected on cpu like x, got meta"),
        ({"targets": TARGETS + 5}, "targets: expected 0 to 4, or -100 for tokens that do not count, got 5"),
        ({"targets": TARGETS - 100, "ignore_index": -1}, "targets: expected 0 to 4, or -1 .*, got -100"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        linear_cross_entropy(**{"x": X, "weight": WEIGHT, "targets": TARGETS, **arguments})
