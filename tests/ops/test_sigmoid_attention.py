"""Windowed sigmoid attention: the blocks against the definition, the definition against the printed equation, no square of the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.ops import windowed_sigmoid_attention
from gdn.ops.attention import SIGMOID
from gdn.ops.attention.problems import WINDOWED, Problem
from gdn.testing import compare

EXACT = {"rtol": 1e-11, "atol": 1e-12}
SATURATED = Problem(name="saturated", T=100, window=20, size=8.0)
BLOCKS = Problem(name="several blocks", T=270, K=4, V=4, window=70)


@pytest.mark.parametrize("problem", [*WINDOWED, SATURATED, BLOCKS], ids=lambda p: p.name)
def test_chunked_matches_the_reference(problem: Problem) -> None:
    """With four times the heads: the gradient of one slope is a sum that cancels, whose relative error alone says little."""
    problem = problem.with_(H=4 * problem.H, G=4 * problem.G)
    wrong = compare.in_three_dtypes(SIGMOID, "chunked", lambda dtype: problem.build(slopes=True, dtype=dtype))
    assert not wrong, wrong


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_is_the_printed_equation(impl: str) -> None:
    q, k, v = (torch.randn(2, 11, 3, 5, dtype=torch.float64) for _ in range(3))
    slopes, window = torch.tensor([-0.5, 0.25, 0.0], dtype=torch.float64), 4
    expected = torch.zeros_like(v)
    for b in range(2):
        for h in range(3):
            for m in range(11):
                for n in range(max(0, m - window + 1), m + 1):
                    logit = q[b, m, h] @ k[b, n, h] / 5**0.5 + slopes[h] * (m - n)
                    expected[b, m, h] += v[b, n, h] / (1 + torch.exp(-logit))
    with use(windowed_sigmoid_attention=impl):
        torch.testing.assert_close(windowed_sigmoid_attention(q, k, v, slopes, window=window), expected, **EXACT)


@pytest.mark.parametrize("impl", ["chunked", "reference"])
@pytest.mark.parametrize("bad", [slice(0, 9), slice(9, 20), slice(20, 30)])
def test_what_is_no_number_stays_in_its_document(impl: str, bad: slice) -> None:
    others = torch.ones(30, dtype=torch.bool)
    others[bad] = False
    clean, dirty = (Problem(name="", T=30, window=25, lengths=(9, 11, 10)).build(slopes=True, dtype=torch.float32) for _ in range(2))
    results = []
    for arguments in (clean, dirty):
        leaves, do = [arguments[n] for n in ("q", "k", "v")], torch.ones_like(arguments["v"])
        if arguments is dirty:
            for x in (*leaves, do):
                x.data[:, bad] = torch.nan
        with use(windowed_sigmoid_attention=impl):
            o = windowed_sigmoid_attention(**arguments)
        results.append([o, *torch.autograd.grad(o, leaves, do)])
    for expected, got in zip(*results):
        assert got[:, bad].isnan().any()
        torch.testing.assert_close(got[:, others], expected[:, others], rtol=0, atol=0)


def test_gradients_by_finite_differences() -> None:
    arguments = Problem(name="", T=7, H=4, G=2, K=2, V=3, window=3, past=2, lengths=None).build(slopes=True)
    leaves = [arguments.pop(n) for n in ("q", "k", "v", "slopes")]
    assert torch.autograd.gradcheck(lambda *t: windowed_sigmoid_attention(*t, **arguments), leaves)


class Largest(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation makes."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return made


@pytest.mark.parametrize("lengths", [None, (1500, 0, 548)])
def test_no_tensor_is_as_large_as_the_square_of_the_length(lengths: tuple[int, ...] | None) -> None:
    arguments = Problem(name="", T=2048, K=4, V=4, window=16, lengths=lengths).build(slopes=True, dtype=torch.float32)
    largest = Largest()
    with largest:
        windowed_sigmoid_attention(**arguments).sum().backward()
    assert 2048 * 4 <= largest.size <= 128 * (128 + 16)


def test_saves_nothing_but_its_arguments() -> None:
    arguments = Problem(name="", T=200, window=9).build(slopes=True, dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        windowed_sigmoid_attention(**arguments)
    given = {t.data_ptr() for t in arguments.values() if isinstance(t, Tensor)}
    assert kept
    assert all(t.data_ptr() in given for t in kept if t.numel())


@pytest.mark.parametrize("impl", ["chunked", "reference"])
def test_keys_from_before_packing_and_padding_equal_the_plain_call(impl: str) -> None:
    q, k, v = (torch.randn(1, 20, 2, 4, dtype=torch.float64) for _ in range(3))
    rest: dict[str, Any] = {"slopes": torch.tensor([-0.5, 0.5], dtype=torch.float64), "window": 5}
    with use(windowed_sigmoid_attention=impl):
        plain = windowed_sigmoid_attention(q, k, v, **rest)
        torch.testing.assert_close(windowed_sigmoid_attention(q[:, 13:], k, v, **rest), plain[:, 13:], **EXACT)
        junk = [torch.cat([torch.full_like(x[:, :6], 9.0), x], dim=1) for x in (q, k, v)]
        padded = windowed_sigmoid_attention(*junk, **rest, start=torch.tensor([6]))
        torch.testing.assert_close(padded[:, 6:], plain, **EXACT)
        assert not padded[:, :6].any()
        twice = [torch.cat([x, x], 1) for x in (q, k, v)]
        packed = windowed_sigmoid_attention(*twice, **rest, packing=Packing.from_lengths([20, 20]))
        torch.testing.assert_close(packed, torch.cat([plain, plain], 1), **EXACT)
        assert windowed_sigmoid_attention(q[:, :0], k, v, **rest).shape == (1, 0, 2, 4)


def test_compiles_as_one_graph_and_ignores_autocast() -> None:
    arguments = next(p for p in WINDOWED if p.name == "packed").build(slopes=True, dtype=torch.float32)
    leaves = [arguments[n] for n in ("q", "k", "v", "slopes")]

    def loss(**arguments: Any) -> Tensor:
        return (windowed_sigmoid_attention(**arguments) ** 2).sum()

    eager = torch.autograd.grad(loss(**arguments), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(**arguments), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    plain = windowed_sigmoid_attention(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(windowed_sigmoid_attention(**arguments), plain)


X = torch.zeros(2, 5, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"slopes": torch.zeros(3)}, r"slopes: expected \[H=4\], got \[3\]"),
        ({"slopes": torch.zeros(4, dtype=torch.int64)}, "slopes: expected a floating dtype, got torch.int64"),
        ({"slopes": torch.zeros(4, device="meta")}, "slopes: expected on cpu like q, got meta"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"k": X[:, :3], "v": X[:, :3]}, "k: expected at least 5 keys"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        windowed_sigmoid_attention(**{"q": X, "k": X, "v": X, "slopes": torch.zeros(4), "window": 2, **arguments})
