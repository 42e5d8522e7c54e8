"""Attention through FlexAttention: which blocks it visits, its numbers against the definition, and when it is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from on_gpu import gpu
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gdn.core.dispatch import use
from gdn.ops import causal_attention
from gdn.ops.attention import CAUSAL, flex, reference
from gdn.ops.attention.problems import FULL, WINDOWED, Problem
from gdn.ops.attention.visible import first_keys, visible
from gdn.testing import compare

LONG = (
    Problem(name="window of two blocks and more, long", T=700, window=300),
    Problem(name="packed, long", B=2, T=450, H=4, G=2, K=16, V=32, lengths=(449, 1, 127, 128, 195)),
    Problem(name="packed and a window, long", T=900, H=2, G=1, K=16, V=16, window=200, lengths=(256, 384, 260)),
    Problem(name="padded, long", B=2, T=400, window=130, start=(0, 290)),
    Problem(name="keys from before, long", T=300, window=150, past=210),
)
PROBLEMS = pytest.mark.parametrize("problem", [*WINDOWED, *FULL, *LONG], ids=lambda p: p.name)


def is_served(problem: Problem) -> bool:
    """Whether the row is for it: as many keys as queries, with a mask; and whether a relative error says something: through a window of one
    the gradients of queries and keys are zero, or rounding."""
    masked = problem.lengths is not None or (problem.window is not None and problem.window < problem.T)
    return masked and not problem.past and problem.window != 1


def positional(problem: Problem, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments of a row."""
    given = [arguments[name] for name in ("q", "k", "v", "window")]
    return (*given, problem.K**-0.5, arguments.get("start"), arguments.get("packing"))


@PROBLEMS
def test_each_block_is_what_its_queries_see(problem: Problem) -> None:
    arguments = problem.build(gradient=False)
    q, k = arguments["q"], arguments["k"]
    first = first_keys(q, k, arguments.get("start"), arguments.get("packing"))
    places = torch.arange(k.shape[1])
    seen = visible(places[problem.past :], places, first, problem.window).expand(problem.B, -1, -1)
    blocks = flex._blocks(q, k.shape[1], problem.window, first)
    reached, whole = (
        dense(n, at, problem.B)
        for n, at in ((blocks.kv_num_blocks, blocks.kv_indices), (blocks.full_kv_num_blocks, blocks.full_kv_indices))
    )
    assert not (reached & whole).any()
    for row in range(problem.B):
        for m, rows in enumerate(seen[row].split(flex.BLOCK)):
            for n, block in enumerate(rows.split(flex.BLOCK, dim=1)):
                assert bool(whole[row, m, n]) == bool(block.all())
                assert bool(reached[row, m, n]) == bool(block.any() and not block.all())


@PROBLEMS
def test_lists_of_blocks_are_one_operator_for_the_compiler(problem: Problem) -> None:
    """With the strides that its stand-in promises: those of dimensions of one are what kernels of FlexAttention step by."""
    arguments = problem.build(gradient=False)
    q, k = arguments["q"], arguments["k"]
    first = first_keys(q, k, arguments.get("start"), arguments.get("packing"))
    given = torch.zeros(1, problem.T, dtype=torch.int64) if first is None else first, k.shape[1], problem.window
    torch.library.opcheck(flex._lists, given)
    for found in flex._lists(*given):
        assert found.stride()[:2] == (found[0].numel(), found[0].numel())


@PROBLEMS
def test_lists_of_queries_say_what_those_of_keys_say(problem: Problem) -> None:
    arguments = problem.build(gradient=False)
    q, k = arguments["q"], arguments["k"]
    mask = flex._blocks(q, k.shape[1], problem.window, first_keys(q, k, arguments.get("start"), arguments.get("packing")))
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    usual = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=flex.BLOCK, seq_lengths=mask.seq_lengths)
    for name in ("q", "full_q"):
        both = [dense(getattr(m, f"{name}_num_blocks"), getattr(m, f"{name}_indices"), problem.B) for m in (mask, usual)]
        assert torch.equal(*both)


def dense(counts: Tensor | None, indices: Tensor | None, batch: int) -> Tensor:
    """Bool `[batch, M, N]` of the listed blocks."""
    assert counts is not None
    assert indices is not None
    counts, indices = (x[:, 0].expand(batch, *x.shape[2:]) for x in (counts, indices))
    listed = torch.arange(indices.shape[-1]) < counts.unsqueeze(-1)
    return torch.zeros_like(indices, dtype=torch.bool).scatter_(2, indices.long(), listed)


@PROBLEMS
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_matches_the_reference(problem: Problem) -> None:
    arguments = positional(problem, problem.build(gradient=False))
    torch.testing.assert_close(flex.causal_attention(*arguments), reference.causal_attention(*arguments), rtol=1e-11, atol=1e-12)


@gpu
@pytest.mark.parametrize("problem", [p for p in (*WINDOWED, *FULL, *LONG) if is_served(p)], ids=lambda p: p.name)
def test_compiled_matches_the_reference_with_gradients(problem: Problem) -> None:
    torch._dynamo.reset()
    problem = problem.with_(K=max(16, problem.K), V=max(16, problem.V))
    compiled = torch.compile(lambda **arguments: causal_attention(**arguments), fullgraph=True)
    truth = compare.run(CAUSAL, "reference", problem.build(device="cuda"))
    for dtype in (torch.float32, torch.bfloat16):
        rounding = compare.run(CAUSAL, "reference", problem.build(dtype=dtype, device="cuda"))
        with use(causal_attention="flex"):
            found = compare.called(compiled, problem.build(dtype=dtype, device="cuda"))
        wrong = compare.complaints(found, rounding, truth, dtype)
        assert not wrong, (dtype, wrong)


@pytest.mark.parametrize(
    ("compiled", "masked", "chosen"), [(True, 1, "flex"), (False, 1, "sdpa"), (True, 0, "sdpa")], ids=["compiled", "eager", "no mask"]
)
def test_serves_windows_and_documents_of_a_compiled_graph_on_a_gpu(compiled: bool, masked: int, chosen: str) -> None:
    verdicts = CAUSAL.explain("cuda", torch.bfloat16, compiled=compiled, K=64, V=64, masked=masked)
    assert next(v.name for v in verdicts if v.reason is None) == chosen
