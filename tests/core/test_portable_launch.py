"""What the hosts of Triton kernels rely on: keys of compiled code, and tensors as rows."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from gdn.core.portable_launch import _kind, integer_kind
from gdn.core.portable_rows import token_rows


def test_kinds_of_integers_have_different_keys() -> None:
    """One is compiled in as a constant, so its code must serve no multiple of 16; as a key, `True` would be 1."""
    assert len({integer_kind(n) for n in (1, 16, 17)}) == 3
    assert integer_kind(16) == integer_kind(0) == integer_kind(64)
    assert len({_kind(n) for n in (1, 16, 17, 2**32 + 1, 2**32)}) == 5


def test_short_and_long_rows_do_not_share_code() -> None:
    from gdn.ops.delta_rule.portable import plan

    short, long = (plan(1, n, 1, n // 64, 512, 512, 64, 64, False, False, 132) for n in (64, 1024))
    assert short.S == long.S and short.code != long.code


def test_rows_of_one_token_have_the_stride_of_a_token() -> None:
    x = torch.arange(2 * 3 * 8.0).view(2, 3, 1, 8).transpose(1, 2)
    assert x.is_contiguous() and x.stride(1) == 8
    rows = token_rows(x)
    assert torch.equal(rows, x) and rows.stride() == (24, 24, 8, 1)
