"""Operators that write into their arguments: order, dtypes under autocast and the registered operator's promises under the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gdn.core.opaque import InPlace


def _write(x: Tensor, pool: Tensor, row: int, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    """Add x to a row of the pool; return the row as it was, and a product that autocast would narrow."""
    before = pool[row].clone()
    pool[row] += x if extra is None else x + extra
    return before, x[:, None] @ x[None]


def _fake(x: Tensor, pool: Tensor, row: int, extra: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[0])


WRITE = InPlace("gdn::test_in_place_write", _write, mutates=("pool",), fake=_fake)
X = torch.tensor([1.0, 2.0])


def twice(x: Tensor, pool: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first, _ = WRITE(x, pool, 1, None)
    between = pool.sum()
    second, _ = WRITE(x, pool, 1, x)
    return first, between, second


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_writes_happen_in_order_and_nowhere_else(compiled: bool) -> None:
    function = torch.compile(twice, fullgraph=True, backend="aot_eager") if compiled else twice
    pool = torch.ones(3, 2)
    first, between, second = function(X, pool)
    assert first.tolist() == [1, 1]
    assert between.item() == 9
    assert second.tolist() == [2, 3]
    assert pool.tolist() == [[1, 1], [4, 7], [1, 1]]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_views_are_written_where_they_are(compiled: bool) -> None:
    function = torch.compile(twice, fullgraph=True, backend="aot_eager") if compiled else twice
    pools = torch.zeros(3, 2, 2)
    function(X, pools[:, 1])
    assert pools[:, 1].tolist() == [[0, 0], [3, 6], [0, 0]]
    assert not pools[:, 0].any()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_autocast_does_not_reach_inside(compiled: bool) -> None:
    def product(x: Tensor, pool: Tensor) -> Tensor:
        return WRITE(x, pool, 0, None)[1]

    function = torch.compile(product, fullgraph=True, backend="aot_eager") if compiled else product
    with torch.autocast("cpu", torch.bfloat16):
        result = function(X + 2**-12, torch.zeros(1, 2))
        assert result.dtype == torch.float32
        assert result[0, 0] == (1 + 2**-12) ** 2
        assert (X[:, None] @ X[None]).dtype == torch.bfloat16, "autocast goes on outside"


def test_the_registered_operator_keeps_its_promises() -> None:
    torch.library.opcheck(WRITE._operator, (X, torch.ones(3, 2), 2, None))
    torch.library.opcheck(WRITE._operator, (X, torch.ones(3, 2), 2, X))
