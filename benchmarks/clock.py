"""Times and memory of a call on a device: medians of single calls, the caches flushed before each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Call = Callable[[], Any]
FLUSH_BYTES = 1 << 28
"""More than any L2 cache."""


def measure(call: Call, device: torch.device | str, *, repeats: int = 20, seconds: float = 3.0, graph: bool = True) -> dict[str, Any]:
    """Seconds to the first result, peak memory of one call beyond what stood before it, eager time, and time under a CUDA graph.

    Between 3 and `repeats` calls are timed: as many as fit in `seconds`.
    """
    device = torch.device(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    found: dict[str, Any] = {"first_s": round(time.perf_counter() - begin, 2)}
    if device.type == "cuda":
        found["peak_MiB"] = peak_bytes(call) >> 20
    found["eager_ms"] = median_ms(call, device, repeats, seconds)
    return found | (graph_ms(call, device, repeats, seconds) if graph and device.type == "cuda" else {})


def graph_ms(call: Call, device: torch.device | str, repeats: int = 20, seconds: float = 3.0) -> dict[str, Any]:
    """`median_ms` of a call as a CUDA graph, or why there is none as `graph_error`."""
    try:
        return {"graph_ms": median_ms(captured(call), device, repeats, seconds)}
    except Exception as failure:
        return {"graph_error": f"{type(failure).__name__}: {' '.join(str(failure).split())}"[:200]}


def median_ms(call: Call, device: torch.device | str, repeats: int = 20, seconds: float = 3.0) -> float:
    """Median milliseconds of single calls after three that are not counted."""
    device = torch.device(device)
    begin = time.perf_counter()
    for _ in range(3):
        call()
    synchronize(device)
    each = (time.perf_counter() - begin) / 3
    repeats = max(3, min(repeats, int(seconds / each)))
    return round(statistics.median((_events if device.type == "cuda" else _processor)(call, repeats)), 4)


def _events(call: Call, repeats: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    pairs = []
    for _ in range(repeats):
        flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def _processor(call: Call, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return times


def captured(call: Call) -> Call:
    """The call as a CUDA graph. If that fails, random numbers can still be drawn: torch would hold that they are being captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, generator = torch.cuda.CUDAGraph(), torch.cuda.default_generators[torch.cuda.current_device()]
    try:
        with torch.cuda.graph(graph):
            call()
    except BaseException:
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay


def peak_bytes(call: Call) -> int:
    """Most memory that one call takes beyond what is allocated before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
