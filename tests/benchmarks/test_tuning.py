"""Configurations of autotuners compiled ahead in forked processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import rows
import tuning

FOREVER = float("inf")


def wrong() -> None:
    raise ValueError


def killed(parent: int) -> None:
    assert os.getpid() != parent
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("processes", [1, 3])
def test_a_job_is_done_in_a_process_and_its_result_made_here(processes: int, tmp_path: Path) -> None:
    def job(name: str) -> int:
        with (tmp_path / name).open("a") as file:
            file.write(f"{os.getpid()}\n")
        return os.getpid()

    with tuning.Forks(processes, 60, FOREVER) as pool:
        futures = {name: pool.submit(job, name) for name in "abcde"}
        pool.finish()
    for name, future in futures.items():
        first, second = (tmp_path / name).read_text().split()
        assert int(first) != int(second) == os.getpid() == future.result()


def test_what_fails_or_takes_too_long_is_told_apart() -> None:
    begin = time.monotonic()
    with tuning.Forks(3, 0.3, FOREVER) as pool:
        jobs = [pool.submit(time.sleep, 60), pool.submit(wrong), pool.submit(killed, os.getpid()), pool.submit(int, "7")]
        pool.finish()
    assert time.monotonic() - begin < 30
    assert [type(job.exception()) for job in jobs] == [tuning.TooLong, ValueError, tuning.Died, type(None)]
    assert jobs[3].result() == 7


def test_no_more_processes_run_at_once_than_are_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    most, fork = 0, tuning.forked
    with tuning.Forks(2, 60, FOREVER) as pool:

        def counted(job: Any) -> int:
            nonlocal most
            most = max(most, len(pool._running) + 1)
            return fork(job)

        monkeypatch.setattr(tuning, "forked", counted)
        for _ in range(6):
            pool.submit(int)
        pool.finish()
    assert most == 2


def test_when_time_is_over_everything_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    pids, fork = list[int](), tuning.forked
    monkeypatch.setattr(tuning, "forked", lambda job: pids.append(fork(job)) or pids[-1])
    pool = tuning.Forks(1, 60, time.monotonic() + 0.2)
    with pytest.raises(rows.OutOfTime), pool:
        futures = [pool.submit(time.sleep, 60) for _ in range(2)]
        pool.finish()
    assert all(isinstance(future.exception(timeout=0), tuning.Died) for future in futures)
    assert pids
    for pid in pids:
        with pytest.raises(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)


def test_an_autotuner_finds_its_configurations_compiled_and_not_the_slow_ones(tmp_path: Path) -> None:
    """In a process without Triton's interpreter."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    script = Path(__file__).with_name("tuned_kernel.py")
    done = subprocess.run([sys.executable, str(script), "2", "10"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["launched"] == [1, 2, 4, 4, 4], "tried, then the fastest of them twice"
    assert found["plain"] == [1, 2, 4, 8, 8], "all of them once it is over"
    assert found["compiled"] == [1, 2, 4, 8], "those of float64 alone"
    assert found["facts"]["configurations"] == 4 and found["facts"]["compile_ahead_s"] > 9
    assert found["facts"]["note"].startswith("1 of 4 configurations took too long to compile: twice_kernel (BLOCK: 32, num_warps: 8")


def test_where_everything_is_slow_the_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    autotuner = pytest.importorskip("triton.runtime.autotuner").Autotuner
    monkeypatch.setattr(autotuner, "prune_configs", lambda tuner, kwargs: ["a", "b"])
    monkeypatch.setattr(tuning, "too_slow", lambda tuner, configs, kwargs, pool: configs)
    tuner = SimpleNamespace(base_fn=wrong)
    with tuning.compiled_ahead(2, 7) as tuned, pytest.raises(tuning.TooLong, match="wrong: none of 2 configurations compiles within 7 s"):
        autotuner.prune_configs(tuner, {})
    assert tuned.left_out == ["wrong (a)", "wrong (b)"]
    with tuning.compiled_ahead(0, 7) as tuned:
        assert autotuner.prune_configs(tuner, {}) == ["a", "b"]
    assert tuned.facts() == {}
