"""Rows that Triton compiles are run once by other processes, and nothing waits for those that take too long."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import connection, get_context

import pytest
import torch

from gdn.core import device as hardware
from gdn.core.dispatch import ops
from gdn.testing import compile_ahead

CPU = torch.device("cpu")


def test_without_a_gpu_nothing_is_compiled() -> None:
    assert compile_ahead.compiled_rows("gated_delta_rule", CPU, torch.float32) == []
    assert compile_ahead.start(list(ops()), CPU, torch.float32) is None


def test_the_rows_that_triton_compiles_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "has_package", lambda name: True)
    assert compile_ahead.compiled_rows("gated_delta_rule", torch.device("cuda"), torch.bfloat16) == ["portable"]
    assert compile_ahead.compiled_rows("gated_delta_rule", torch.device("cuda"), torch.float64) == []


def test_ready_rows_are_counted_and_a_failing_one_is_left_to_its_examiner() -> None:
    rows = [("l2norm", "torch"), ("l2norm", "no such row"), ("rms_norm", "torch")]
    ahead = compile_ahead.Ahead(rows, CPU, torch.float32, ThreadPoolExecutor(1))
    assert ahead.join(time.monotonic() + 60) == 2


def test_late_processes_are_ended() -> None:
    pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
    ahead = compile_ahead.Ahead([], CPU, torch.float32, pool)
    ahead._jobs = [pool.submit(time.sleep, 600)]
    processes = list(pool._processes.values())
    assert ahead.join(time.monotonic()) == 0
    for process in processes:  # not its exit code: the pool's thread also waits for it, and whoever comes second is told none for a while
        assert connection.wait([process.sentinel], timeout=30)
