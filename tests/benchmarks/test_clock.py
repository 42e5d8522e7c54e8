"""Times of calls: what cannot be captured in a CUDA graph is told, and spoils nothing that comes after it."""

from __future__ import annotations

import clock
import torch
from on_gpu import gpu


@gpu
def test_after_a_failed_capture_random_numbers_can_be_drawn() -> None:
    x = torch.ones(3, device="cuda")
    found = clock.measure(lambda: x.sum().item(), "cuda")
    assert "graph_ms" not in found and "captur" in found["graph_error"]
    assert torch.randn(100, device="cuda").std() > 0
    assert clock.measure(lambda: torch.randn(100, device="cuda"), "cuda")["graph_ms"] > 0


def test_a_processor_has_no_graphs() -> None:
    found = clock.measure(lambda: torch.zeros(3), "cpu", repeats=5)
    assert set(found) == {"first_s", "eager_ms"} and found["eager_ms"] > 0
