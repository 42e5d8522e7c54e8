"""Causal attention: every row against the definition, the definition against the textbook; a window needs no square of the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from gdn.core.dispatch import use
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.ops import causal_attention
from gdn.ops.attention import CAUSAL, documents, sdpa
from gdn.ops.attention.problems import FULL, WINDOWED, Problem
from gdn.testing import compare

EXACT = {"rtol": 1e-11, "atol": 1e-12}


@pytest.mark.parametrize("problem", [*WINDOWED, *FULL], ids=lambda p: p.name)
def test_sdpa_matches_the_reference(problem: Problem) -> None:
    wrong = compare.in_three_dtypes(CAUSAL, "sdpa", lambda dtype: problem.build(dtype=dtype))
    assert not wrong, wrong


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
def test_no_queries_give_no_outputs(impl: str) -> None:
    arguments = Problem(name="", B=2, T=0, H=4, G=2, V=6, past=3, window=5).build()
    with use(causal_attention=impl):
        assert causal_attention(**arguments).shape == (2, 0, 4, 6)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("window", [None, 4])
def test_is_the_textbooks_masked_softmax(impl: str, window: int | None) -> None:
    q, k, v = (torch.randn(2, 9, heads, 6, dtype=torch.float64) for heads in (4, 2, 2))
    expected = torch.zeros(2, 9, 4, 6, dtype=torch.float64)
    for head in range(4):
        scores = q[:, :, head] @ k[:, :, head // 2].mT / 6**0.5
        past = torch.ones(9, 9, dtype=torch.bool).tril()
        if window:
            past &= torch.ones(9, 9, dtype=torch.bool).triu(1 - window)
        expected[:, :, head] = scores.masked_fill(~past, -torch.inf).softmax(-1) @ v[:, :, head // 2]
    with use(causal_attention=impl):
        torch.testing.assert_close(causal_attention(q, k, v, window=window), expected, **EXACT)


@pytest.mark.parametrize("impl", ["sdpa", "reference"])
@pytest.mark.parametrize("window", [None, 5])
def test_keys_from_before_packing_and_padding_equal_the_plain_call(impl: str, window: int | None) -> None:
    q, k, v = (torch.randn(1, 20, 2, 4, dtype=torch.float64) for _ in range(3))
    with use(causal_attention=impl):
        plain = causal_attention(q, k, v, window=window)
        torch.testing.assert_close(causal_attention(q[:, 13:], k, v, window=window), plain[:, 13:], **EXACT)
        junk = [torch.cat([torch.full_like(x[:, :6], 9.0), x], dim=1) for x in (q, k, v)]
        padded = causal_attention(*junk, window=window, start=torch.tensor([6]))
        torch.testing.assert_close(padded[:, 6:], plain, **EXACT)
        assert not padded[:, :6].any()
        packed = causal_attention(*(torch.cat([x, x], 1) for x in (q, k, v)), window=window, packing=Packing.from_lengths([20, 20]))
        torch.testing.assert_close(packed, torch.cat([plain, plain], 1), **EXACT)


def test_masks_that_are_too_large_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(name="", B=2, T=40, H=2, past=7, start=(0, 12))
    whole = compare.run(CAUSAL, "sdpa", problem.build())
    monkeypatch.setattr("gdn.ops.attention.sdpa.MASK_ELEMENTS", 300)
    cut = compare.run(CAUSAL, "sdpa", problem.build())
    assert compare.distance(cut, whole) < 1e-14


@pytest.mark.parametrize("lengths", [None, (100, 0, 28)])
def test_a_window_needs_no_square_of_the_length(lengths: tuple[int, ...] | None) -> None:
    """Nothing saved for the backward pass has as many elements as the square of the length."""
    arguments = Problem(name="", T=2048, window=16, lengths=None if lengths is None else (2000, 0, 48)).build(dtype=torch.float32)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        causal_attention(**arguments)
    assert sizes
    assert max(sizes) <= 2048 * 2 * 64


@pytest.mark.parametrize("problem", [p for p in (*WINDOWED, *FULL) if p.name in ("packed", "no window: packed rows")], ids=lambda p: p.name)
@pytest.mark.parametrize("square", [0, 1 << 26], ids=["operator", "mask"])
def test_compiles_as_one_graph(problem: Problem, square: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "LARGEST_SQUARE", square)
    torch._dynamo.reset()
    arguments = problem.build(dtype=torch.float32)
    leaves = [arguments[n] for n in ("q", "k", "v")]

    def loss(**arguments: Any) -> Tensor:
        return (causal_attention(**arguments) ** 2).sum()

    eager = torch.autograd.grad(loss(**arguments), leaves)
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(**arguments), leaves)
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"lengths": (9, 11)}], ids=str)
def test_outputs_have_the_dtype_of_values_under_autocast(changes: dict[str, Any]) -> None:
    arguments = Problem(name="", T=20, **changes).build(dtype=torch.float32)
    expected = causal_attention(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        o = causal_attention(**arguments)
    assert o.dtype == torch.float32
    torch.testing.assert_close(o, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("H", [2, 4])
def test_a_window_compiles_for_any_batch(H: int) -> None:
    """A second batch size is a symbol in the graph, and the batch is folded into the heads."""
    torch._dynamo.reset()
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    for B in (2, 3):
        arguments = Problem(name="", B=B, T=20, H=H, G=2, window=5).build(dtype=torch.float32)
        torch.testing.assert_close(compiled(**arguments), causal_attention(**arguments))


def test_a_window_is_exported_for_other_lengths() -> None:
    class Attend(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return causal_attention(q, k, v, window=5)

    long, short = (tuple(torch.randn(2, T, H, 4) for H in (4, 2, 2)) for T in (200, 90))
    exported = torch.export.export(Attend(), long, dynamic_shapes=({1: torch.export.Dim.AUTO},) * 3).module()
    torch.testing.assert_close(exported(*short), causal_attention(*short, window=5))


PACKED = [p for p in FULL if p.lengths] + [Problem(name="empty documents", T=130, H=4, G=2, V=6, lengths=(0, 66, 0, 64))]


@pytest.mark.parametrize("scores", [1 << 25, 900])
@pytest.mark.parametrize(
    "problem", [*PACKED, Problem(name="empty documents", T=130, H=4, G=2, V=6, lengths=(0, 66, 0, 64))], ids=lambda p: p.name
)
def test_documents_in_a_compiled_graph_match_the_reference(problem: Problem, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator that takes them there, called by itself; with few scores it takes a document's queries in blocks."""
    monkeypatch.setattr(documents, "SCORES", scores)
    monkeypatch.setattr(sdpa, "each_document", lambda attend, q, k, v, host: documents._OPAQUE(q, k, v, host, q.shape[3] ** -0.5)[0])
    wrong = compare.in_three_dtypes(CAUSAL, "sdpa", lambda dtype: problem.build(dtype=dtype))
    assert not wrong, wrong


@pytest.mark.parametrize("lengths", [(32,) * 64, (2048,)], ids=["many", "one"])
def test_documents_in_a_compiled_graph_need_no_square_of_the_row(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, in the graphs around the operator and inside it."""
    monkeypatch.setattr(sdpa, "LARGEST_SQUARE", 0)
    monkeypatch.setattr(documents, "SCORES", 64 * 2048)
    arguments = Problem(name="", T=2048, lengths=lengths).build(dtype=torch.float32)
    leaves, sizes = [arguments[n] for n in ("q", "k", "v")], list[int]()

    def record(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        sizes.extend(node.meta["val"].numel() for node in graph.graph.nodes if isinstance(node.meta.get("val"), Tensor))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    torch.autograd.grad(torch.compile(lambda **a: causal_attention(**a).sum(), fullgraph=True, backend=backend)(**arguments), leaves)
    assert sizes
    with Largest() as inside:
        torch.autograd.grad(documents.attention_within_documents(*leaves, 1.0, arguments["packing"]).sum(), leaves)
    assert 2048 <= max(inside.elements, *sizes) <= 64 * 2048


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made under it."""

    elements = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


X = torch.zeros(2, 5, 4, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"q": X[0]}, r"q: expected 4 dimensions \[B, T, H, K\], got \[5, 4, 3\]"),
        ({"k": torch.zeros(2, 5, 4, 2)}, r"k: expected \[B=2, S=5, G=4, K=3\], got \[2, 5, 4, 2\]"),
        ({"k": torch.zeros(2, 5, 3, 3), "v": torch.zeros(2, 5, 3, 3)}, "q: expected a multiple of 3 heads"),
        ({"k": torch.zeros(2, 4, 4, 3), "v": torch.zeros(2, 4, 4, 3)}, "k: expected at least 5 keys, one for each query, got 4"),
        ({"v": X.double()}, "v: expected torch.float32 like q, got torch.float64"),
        ({"window": 0}, "window: expected at least 1, got 0"),
        ({"start": torch.zeros(3, dtype=torch.int64)}, r"start: expected \[B=2\], got \[3\]"),
        ({"start": torch.zeros(2)}, "start: expected int32 or int64, got torch.float32"),
        ({"start": torch.zeros(2, dtype=torch.int64), "packing": Packing.from_lengths([5, 5])}, "start: cannot be given together"),
        ({"packing": Packing.from_lengths([5, 4])}, "packing: describes 9 tokens, but the input has 2 x 5"),
        (
            {"k": X.repeat(1, 2, 1, 1), "v": X.repeat(1, 2, 1, 1), "packing": Packing.from_lengths([5, 5])},
            "k: expected 5 keys with packing",
        ),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        causal_attention(**{"q": X, "k": X, "v": X, **arguments})


@pytest.mark.parametrize(("window", "lengths"), [(8, (20, 36)), (200, (230, 450))], ids=["one block", "several"])
def test_a_compiled_window_serves_other_lengths(window: int, lengths: tuple[int, int]) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(causal_attention, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in lengths:
        q, k, v = (torch.randn(2, length, 4, 8) for _ in range(3))
        with torch._dynamo.config.patch(error_on_recompile=length != lengths[0]), use(causal_attention="sdpa"):
            torch.testing.assert_close(compiled(q, k, v, window=window), causal_attention(q, k, v, window=window))
