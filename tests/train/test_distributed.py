from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import fresh
import pytest
import torch
import two_processes

from gdn.models.store import load_model
from gdn.train import Trainer, metrics
from gdn.train.distributed import World, processes


def test_one_process_agrees_with_itself() -> None:
    with processes("cpu") as world:
        assert world == World(rank=0, size=1, device=torch.device("cpu"))
        assert world.is_first
        assert world.reduce([1.5, 2]) == [1.5, 2]
        assert world.broadcast("x") == "x"
        world.barrier()


@pytest.mark.slow
def test_two_processes_are_one_with_twice_the_batch_and_resume_together(tiny: Callable[..., Trainer.Config], tmp_path: Path) -> None:
    """FSDP2 over gloo on the CPU."""
    config = tiny(sample_tokens=0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [tmp_path / f"output {rank}" for rank in (0, 1)]
    started = [
        fresh.start(output, two_processes.one_of_two, rank, port, config.to_dict(), tmp_path / "found.json", strict=False)
        for rank, output in enumerate(outputs)
    ]
    try:
        for process, output in zip(started, outputs):
            process.join(60)
            assert process.exitcode == 0, output.read_text()[-3000:]
    finally:
        for process in started:
            process.kill()
    found = json.loads((tmp_path / "found.json").read_text())

    for one, two in found["steps"] + found["joined"]["steps"]:
        assert two == pytest.approx(one, rel=2e-5)
    assert found["sharded"] and found["joined"]["sharded"]
    assert set(found["gates"].values()) == {"torch.float32"}
    assert {"blocks.0.mixer.A_log", "blocks.0.mixer.dt_bias", "norm.weight", "blocks.0.mixer.o_proj.weight"} <= set(found["no_decay"])

    assert found["statuses"] == [0, 143, 0]
    whole, broken = (Path(config.directory, name) for name in ("whole", "broken"))
    rows = [
        [(row["step"], row["loss/train"], row["grad_norm"]) for row in metrics.read(folder / metrics.FILE)] for folder in (whole, broken)
    ]
    assert rows[0] == rows[1]
    assert [step for step, _, _ in rows[0]] == [2, 4, 6, 8, 10, 12]
    assert load_model(whole / "model").config == config.model
    assert (whole / "model" / "model.safetensors").read_bytes() == (broken / "model" / "model.safetensors").read_bytes()
    assert "going on after step 5" in outputs[0].read_text()
