from __future__ import annotations

import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import random
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fresh
import interrupted
import numpy as np
import pytest
import torch
from on_gpu import gpu

from gdn.core.errors import CheckpointError, ConfigError, NonFiniteError
from gdn.data import Loader, load_tokenizer
from gdn.models import block
from gdn.models.store import load_model
from gdn.train import AdamW, Checkpoints, Schedule, Trainer, checkpoint, metrics, report, stop, trainer
from gdn.train.config import first_difference
from gdn.train.step import Step

Tiny = Callable[..., Trainer.Config]

TIMES = ("seconds", "tokens_per_second", "memory/peak_gib")
"""Metrics that no two runs share."""


def rows(config: Trainer.Config) -> list[dict[str, float]]:
    """What must be equal to the last bit."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics.read(Path(config.directory) / metrics.FILE)]


def weights(config: Trainer.Config) -> bytes:
    return Path(config.directory, "model", "model.safetensors").read_bytes()


def run(config: Trainer.Config) -> Trainer.Config:
    assert Trainer(config).run() == 0
    return config


def interrupt(config: Trainer.Config, signal: str, step: int, where: str = "step") -> fresh.Ended:
    """Run in another process that sends itself a signal."""
    return fresh.run(interrupted.train, config.to_dict(), signal, step, where)


def steps_saved(config: Trainer.Config) -> list[str]:
    return sorted(path.name for path in Path(config.directory, "checkpoints").iterdir())


@pytest.mark.usefixtures("picture")
def test_a_run_leaves_what_it_promises(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = run(tiny(prompt="one two"))
    folder = Path(config.directory)
    found = rows(config)
    assert [row["step"] for row in found] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in found if "loss/val" in row] == [6, 12]
    assert found[-1]["loss/val"] < found[0]["loss/train"]
    assert found[-1]["tokens_seen"] == 12 * 64
    assert {"lr", "grad_norm", "bits_per_byte/train"} <= found[0].keys()
    assert steps_saved(config) == ["step_00000008", "step_00000012"]
    assert Trainer.Config.from_dict(json.loads((folder / "config.json").read_text())) == config
    assert (folder / "loss.png").exists()
    assert load_model(folder / "model").config == config.model
    assert load_tokenizer(folder / "model").end_id == 256
    output = capsys.readouterr().out
    assert "step      2  loss " in output
    assert "The model writes:\n\none two" in output
    assert f"validation bits per byte {found[-1]['bits_per_byte/val']:.2f}\n" in output


@pytest.mark.parametrize(
    ("signal", "status", "where", "resumes"),
    [
        ("SIGINT", 130, "step", "step_00000007: going on after step 7"),
        ("SIGTERM", 143, "step", "step_00000007: going on after step 7"),
        ("SIGKILL", -9, "step", "step_00000004: going on after step 4"),
        ("SIGKILL", -9, "checkpoint", "step_00000004: going on after step 4"),
    ],
)
def test_a_run_that_was_stopped_and_resumed_is_bit_for_bit_one_that_was_not(
    tiny: Tiny, capsys: pytest.CaptureFixture[str], signal: str, status: int, where: str, resumes: str
) -> None:
    whole, broken = run(tiny("whole", accumulate=2)), tiny("broken", accumulate=2)
    stopped = interrupt(broken, signal, 7 if where == "step" else 8, where)
    assert stopped.status == status, stopped.output
    if status > 0:
        assert "stopped after step 7 and saved; the same command goes on from there" in stopped.output
        assert load_model(Path(broken.directory, "model")).config == broken.model
    if where == "checkpoint":
        assert steps_saved(broken) == ["step_00000004", "step_00000008.partial"]
    capsys.readouterr()
    run(broken)
    assert resumes in capsys.readouterr().out
    assert rows(broken) == rows(whole)
    assert weights(broken) == weights(whole)


def test_many_stops_are_as_none(tiny: Tiny) -> None:
    """In one process and at each step, by way of a longer and longer run. The schedule must not depend on the length for that."""
    flat = Schedule(warmup=3, final_fraction=1.0)
    whole, broken = run(tiny("whole", schedule=flat)), tiny("broken", schedule=flat)
    for steps in range(1, 13):
        run(broken.with_(steps=steps, validation_tokens=0, log_every=100, sample_tokens=0))
    assert weights(broken) == weights(whole)


def test_a_checkpoint_that_was_damaged_is_not_loaded_and_the_one_before_gives_the_same_end(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run(tiny())
    expected, model = rows(config), weights(config)
    data = Path(config.directory, "checkpoints", "step_00000012", "__0_0.distcp")
    data.write_bytes(data.read_bytes()[:1000])
    capsys.readouterr()
    run(config)
    output = capsys.readouterr().out
    assert "checkpoint step_00000012 cannot be used: __0_0.distcp has 1000 bytes" in output
    assert "step_00000008: going on after step 8" in output
    assert rows(config) == expected
    assert weights(config) == model


def test_a_run_without_a_usable_checkpoint_is_not_begun_again_over_them(tiny: Tiny) -> None:
    config = run(tiny())
    for data in Path(config.directory, "checkpoints").glob("*/__0_0.distcp"):
        data.write_bytes(data.read_bytes()[:1000])
    kept = steps_saved(config)
    with pytest.raises(CheckpointError, match=r"no checkpoint of the run in .* can be used"):
        Trainer(config.with_(steps=20)).run()
    assert steps_saved(config) == kept


def test_random_numbers_go_on_where_they_were(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainer.train_step

    def with_luck(*args: Any, **options: Any) -> Step:
        step = original(*args, **options)
        return dataclasses.replace(step, grad_norm=random.random() + np.random.rand() + float(torch.rand(1)))

    monkeypatch.setattr(trainer, "train_step", with_luck)
    whole, broken = run(tiny("whole")), tiny("broken")
    assert interrupt_at_once(broken, monkeypatch, after=5) == 130
    assert rows(run(broken)) == rows(whole)


@pytest.mark.parametrize("lost", ["data", "optimizer", "window"])
def test_the_comparison_sees_what_a_resumed_run_forgot(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, lost: str) -> None:
    """The data one batch late; the optimizer's moments anew; the sums behind the next row of metrics."""
    whole, broken = run(tiny("whole")), tiny("broken", checkpoints=Checkpoints(every=5))
    assert interrupt_at_once(broken, monkeypatch, after=5) == 130
    if lost == "data":
        load = Loader.load_state_dict

        def late(self: Loader, state: dict[str, Any]) -> None:
            load(self, state)
            next(self)

        monkeypatch.setattr(Loader, "load_state_dict", late)
    elif lost == "optimizer":
        original = checkpoint.load

        def forgetful(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> dict[str, Any]:
            local = original(folder, model, optimizer, **options)
            optimizer.state.clear()
            return local

        monkeypatch.setattr(checkpoint, "load", forgetful)
    else:
        original = checkpoint.load

        def without_sums(*args: Any, **options: Any) -> dict[str, Any]:
            local = original(*args, **options)
            local["progress"] |= {"window_nats": 0.0, "window_tokens": 0, "window_bytes": 0}
            return local

        monkeypatch.setattr(checkpoint, "load", without_sums)
    run(broken)
    assert rows(broken) != rows(whole)


def interrupt_at_once(config: Trainer.Config, monkeypatch: pytest.MonkeyPatch, *, after: int) -> int:
    """Run in this process and request a stop after a step, as a signal would."""
    requests: list[stop.StopRequest] = []

    class Request(stop.StopRequest):
        def __enter__(self) -> stop.StopRequest:
            requests.append(self)
            return super().__enter__()

    original, steps = trainer.train_step, []

    def counted(*args: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == after:
            requests[0].received = 2
        return original(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "StopRequest", Request)
        patch.setattr(trainer, "train_step", counted)
        return Trainer(config).run()


def test_a_finished_run_is_not_run_again(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = run(tiny())
    expected = rows(config)
    capsys.readouterr()
    run(config)
    output = capsys.readouterr().out
    assert "step_00000012: complete" in output
    assert "validation bits per byte" in output
    assert rows(config) == expected


def test_resuming_with_another_configuration_names_the_first_difference(tiny: Tiny) -> None:
    run(tiny())
    with pytest.raises(CheckpointError, match=r"optim.lr was 0.003 and is now 0.5"):
        Trainer(tiny(optim=AdamW(lr=0.5), seed=4)).run()
    with pytest.raises(CheckpointError, match="holds a run"):
        Trainer(tiny(resume=False)).run()


def test_what_may_change_may_change(tiny: Tiny) -> None:
    config = tiny()
    changed = config.with_(
        steps=20, log_every=1, checkpoints=Checkpoints(every=1), directory="elsewhere", data=config.data.with_(prefetch=0), time_limit_s=9.0
    )
    assert first_difference(config.to_dict(), changed.to_dict()) is None
    mixers = config.with_(model=config.model.with_(pattern=config.model.pattern * 2))
    assert first_difference(config.to_dict(), mixers.to_dict()) == "model.pattern.1.allow_neg_eigval was absent and is now False"
    assert first_difference(config.to_dict(), config.with_(data=config.data.with_(seed=1)).to_dict()) == "data.seed was 0 and is now 1"


def test_a_loss_that_is_not_finite_stops_with_where_and_what_to_try(tiny: Tiny) -> None:
    config = tiny(optim=AdamW(lr=1e30), schedule=Schedule(warmup=0), accumulate=2, checkpoints=Checkpoints(every=1))
    with pytest.raises(NonFiniteError) as caught:
        Trainer(config).run()
    message = str(caught.value)
    cause = r"(the loss of micro-batch 0 is nan|every loss is finite, the norm of the gradient is nan)"
    assert re.match(rf"step 2: {cause}\. It was batches 2 to 3 of this process \(0 is the first\), learning rate \d", message)
    assert "Nothing was updated. Earlier checkpoints are untouched. To try: " in message
    for part in ("losses before it: 5.", "smaller optim.lr", "schedule.warmup", "clip=1.0", "gdn doctor"):
        assert part in message, part
    assert checkpoint.defect(Path(config.directory, "checkpoints", "step_00000001")) is None
    with pytest.raises(NonFiniteError, match=r"Nothing was updated\. To try"):
        Trainer(config.with_(checkpoints=Checkpoints(every=2), directory=f"{config.directory}-without")).run()


def test_a_folder_that_cannot_be_written_is_named_and_checkpoints_only_where_there_are_some(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config = tiny()
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "Metrics", full)
        with pytest.raises(CheckpointError, match=r"cannot write .*run: No space left on device$"):
            Trainer(config).run()
    monkeypatch.setattr(report, "plot", full)
    with pytest.raises(CheckpointError, match=r"loss\.png: No space left on device\. Earlier checkpoints are untouched$"):
        Trainer(config).run()


def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(tiny: Tiny) -> None:
    import resource

    whole, config = run(tiny("whole")), tiny("full")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    run(config.with_(steps=4, schedule=config.schedule))
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="the disk is full"):
            Trainer(config).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert steps_saved(config) == ["step_00000004"]
    run(config)
    assert [row["step"] for row in rows(config)] == [row["step"] for row in rows(whole)]


def test_a_time_limit_ends_the_run_with_the_learning_rate_of_the_end(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny(steps=1_000_000, time_limit_s=0.5, log_every=1, validate_every=0)
    readings = itertools.count()
    assert Trainer(config, clock=lambda: 0.01 * next(readings)).run() == 0  # it is read at the start and three times a step
    found = rows(config)
    assert [row["step"] for row in found] == list(range(1, 18))
    peak, final = config.optim.lr, config.schedule.final_fraction
    before_last = 0.01 * 3 * 16 / 0.5
    assert found[-1]["lr"] == pytest.approx(peak * (final + (1 - final) * (1 + math.cos(math.pi * before_last)) / 2), rel=1e-3)
    assert found[-1]["lr"] < 0.15 * max(row["lr"] for row in found)
    assert "loss/val" in found[-1]
    capsys.readouterr()
    run(config)
    assert "complete" in capsys.readouterr().out


def test_recomputing_blocks_changes_no_number(tiny: Tiny) -> None:
    assert rows(run(tiny("kept"))) == rows(run(tiny("again", recompute="block")))


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_compiling_blocks_changes_no_number_and_never_gives_up(recompute: str, tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past eight versions of a block the compiler would go on without compiling: here an error."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    block._compiled_terms.cache_clear()
    torch._dynamo.reset()
    model = tiny().model.with_(layers=3)
    compiled = run(tiny("compiled", model=model, compile=True, recompute=recompute))
    block._compiled_terms.cache_clear()
    assert rows(compiled) == rows(run(tiny("eager", model=model)))
    assert graphs


def test_bf16_runs_and_resumes(tiny: Tiny) -> None:
    config = tiny(precision="bf16", schedule=Schedule(warmup=1, final_fraction=1.0))
    run(config.with_(steps=6))
    run(config)
    assert rows(config) == rows(run(tiny("whole", precision="bf16", schedule=Schedule(warmup=1, final_fraction=1.0))))


@gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_trains_and_resumes(tiny: Tiny, precision: str) -> None:
    flat = Schedule(warmup=1, final_fraction=1.0)
    whole, broken = (tiny(name, device="cuda", precision=precision, schedule=flat) for name in ("whole", "broken"))
    run(broken.with_(steps=6))
    ends = [rows(run(config))[-1] for config in (whole, broken)]
    assert ends[0]["loss/val"] == pytest.approx(ends[1]["loss/val"], rel=1e-3)
    assert ends[0]["loss/val"] < 5.3
    assert list(metrics.read(Path(whole.directory) / metrics.FILE))[-1]["memory/peak_gib"] > 0


def test_a_vocabulary_that_is_too_small_is_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"model.vocab: expected at least the 257 tokens of the tokenizer, got 200"):
        Trainer(tiny(model=tiny().model.with_(vocab=200))).run()


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"accumulate": 0}, {"clip": 0.0}, {"time_limit_s": -1.0}, {"validate_every": -1}])
def test_values_that_cannot_work_are_named(tiny: Tiny, wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        tiny(**wrong)


@pytest.mark.parametrize(("size", "bytes_of_one"), [(1, 8), (2, 4), (4, 4)])
def test_a_model_must_fit(size: int, bytes_of_one: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights in each process, and each one's share of weights and gradients; where nobody knows the memory all models may."""
    config: Any = SimpleNamespace(model=SimpleNamespace(num_parameters=lambda: 1000))
    world: Any = SimpleNamespace(size=size, device=torch.device("cpu"))
    for room, fits in ((1000 * bytes_of_one, True), (1000 * bytes_of_one - 1, False), (0, True)):
        monkeypatch.setattr("gdn.core.device.total_bytes", lambda device, room=room: room)
        with nullcontext() if fits else pytest.raises(ConfigError, match="model: 1,000 parameters take 0"):
            trainer._expect_room(config, world)
