"""Slots of past tokens: a rolling and a growing cache against plain lists."""

from __future__ import annotations

import pytest
import torch

from gdn.nn import cache


@pytest.mark.parametrize("slots", [4, 32])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_cache_holds_the_last_tokens_in_order(slots: int, in_place: bool) -> None:
    tokens = torch.arange(1.0, 25.0).view(1, 24, 1, 1)
    kept, seen = torch.zeros(1, slots, 1, 1), 0
    for piece in tokens.split([1, 2, 3, 7, 1, 10], dim=1):
        row = cache.lined_up(kept, torch.tensor([seen]), piece, past=3)
        start = int(cache.line_start(torch.tensor([seen]), 3))
        assert start == 3 - min(seen, 3)
        assert row[0, start:, 0, 0].tolist() == tokens[0, max(0, seen - 3) : seen + piece.shape[1], 0, 0].tolist()
        if in_place:
            cache.append_(kept, torch.tensor([seen]), piece)
        else:
            kept = cache.written(kept, torch.tensor([seen]), piece)
        seen += piece.shape[1]
        places = cache.held(torch.tensor([seen - 1]), slots)[0].tolist()
        assert sorted(p for p in places if p >= 0) == list(range(max(0, seen - slots), seen))
        assert all(kept[0, s, 0, 0] == (p + 1 if p >= 0 else 0) for s, p in enumerate(places))


def test_padding_leaves_no_trace_between_pieces() -> None:
    """Three sequences, each given its tokens in two pieces with padding on the left of both; 99 marks padding."""
    first = torch.tensor([[99.0, 1, 2], [1, 2, 3], [99, 99, 99]]).view(3, 3, 1, 1)
    second = torch.tensor([[99.0, 3], [99, 99], [1, 2]]).view(3, 2, 1, 1)
    kept, seen = torch.zeros(3, 4, 1, 1), torch.zeros(3, dtype=torch.int64)
    for piece in (first, second):
        pads = (piece == 99).flatten(1).sum(1)
        row, start = cache.lined_up(kept, seen, piece, 3, pads), cache.line_start(seen, 3, pads)
        for b in range(3):
            count = int(seen[b] + piece.shape[1] - pads[b])
            assert row[b, start[b] :, 0, 0].tolist() == [float(i + 1) for i in range(count)]
        kept, seen = cache.written(kept, seen, piece, pads), seen + piece.shape[1] - pads
    assert seen.tolist() == [3, 3, 2]
    assert kept[..., 0, 0].tolist() == [[1, 2, 3, 0], [1, 2, 3, 0], [1, 2, 0, 0]]
