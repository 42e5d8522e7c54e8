"""Run in a process of its own by test_tuning.py: an autotuned kernel, compiled for an H100 behind a driver that launches nothing."""

from __future__ import annotations

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.language as tl
import tuning
from triton.backends.compiler import GPUTarget

WARPS = (1, 2, 4, 8)
SLOW = 8
"""Warps of the configuration whose process does not end in time."""


def twice_kernel(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, 2 * tl.load(x + at, mask=at < n), mask=at < n)


def main(processes: int, limit: float) -> None:
    """Launch twice, and once more with another dtype after all; print the warps of what was launched and of what this process compiled."""
    here, launched, compiled = os.getpid(), list[int](), list[int]()

    def listen(*, metadata: dict[str, Any], cache_hit: bool, **rest: Any) -> None:
        if os.getpid() == here and not cache_hit:
            compiled.append(metadata["num_warps"])
        elif os.getpid() != here and metadata["num_warps"] == SLOW:
            time.sleep(60)

    def time_it(call: Any, quantiles: Any) -> list[float]:
        call()
        return [1.0 / launched[-1]] * 3  # more warps are faster

    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_benchmarker=lambda: time_it,
        launcher_cls=lambda source, metadata: lambda *launch: launched.append(metadata.num_warps),
        utils=SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 232448}, load_binary=lambda *binary: (None, None, 32, 0, 1024)
        ),
    )
    triton.runtime.driver.set_active(driver)
    triton.knobs.compilation.listener = listen
    kernel = triton.autotune([triton.Config({"BLOCK": 32}, num_warps=warps) for warps in WARPS], key=["n"])(triton.jit(twice_kernel))
    x = torch.zeros(64)
    with tuning.compiled_ahead(processes, limit) as tuned:
        kernel[(2,)](x, x, 64)
        kernel[(2,)](x, x, 64)
    after = len(launched)
    kernel[(2,)](x.double(), x, 64)
    found = {"launched": launched[:after], "plain": launched[after:], "compiled": compiled, "facts": tuned.facts()}
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
