"""The training loop.

    Trainer(Trainer.Config(model=LM.Config(...), data=DataConfig(...), directory="runs/mine")).run()

One process or many (`torchrun`) run the same loop. Everything that decides what comes next is in a checkpoint: model, optimizer, the step
(and with it the schedule), the position in the data, the random states, the sums behind the next row of metrics. So a run that was
stopped, in whatever way, and started again computes on a CPU bit for bit what an unbroken run computes, as long as it is limited by steps
and has the same number of threads. A run limited by time follows the clock, which no two runs share.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import distributed as dist

from gdn.core import device as hardware
from gdn.core.errors import CheckpointError, ConfigError, NonFiniteError
from gdn.data import Batch, Data, Loader, Tokenizer
from gdn.eval.perplexity import evaluate
from gdn.models.lm import LM
from gdn.train import checkpoint, metrics, random_state, report
from gdn.train.config import TrainerConfig, first_difference
from gdn.train.display import Display
from gdn.train.distributed import World, processes, shard
from gdn.train.lock import alone
from gdn.train.metrics import Metrics, Row
from gdn.train.progress import Progress, Speed
from gdn.train.schedule import position
from gdn.train.step import Step, autocast, check_precision, train_step
from gdn.train.stop import StopRequest, exit_code

MODEL = "model"
"""Folder of the exported model in the run's directory."""


class Trainer:
    """Runs a `Trainer.Config`."""

    Config = TrainerConfig

    def __init__(self, config: TrainerConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds from any beginning; a time limit and the recorded times follow it."""
        self.config, self.clock = config, clock

    def run(self) -> int:
        """Train to the end, or until SIGINT or SIGTERM. Returns the exit status: 0, or 130 and 143 after these signals.

        Resumes by itself. Raises `NonFiniteError`, `CheckpointError`, `DataError` or `ConfigError`; the last checkpoint is then intact.
        """
        config, folder = self.config, Path(self.config.directory)
        with processes(config.device) as world:
            run = build(config, world)
            with alone(folder, world):
                return self._run(run, folder, world)

    def _run(self, run: Run, folder: Path, world: World) -> int:
        config = self.config
        found = resume(run, config, folder, world)
        start = _place(run.progress, config)
        with Display(config.steps, start, silent=not world.is_first) as display, StopRequest() as request:
            display.say(_opening(run, found, config, world))
            stopped = loop(run, config, world, request, display, self.clock)
        export(run, config, world)
        if stopped:
            display.say(f"stopped after step {run.progress.step:,} and saved; the same command goes on from there ({folder})")
        else:
            finish(run, config, world, display)
        return exit_code(stopped)


@dataclass
class Run:
    """What a run consists of."""

    model: LM
    optimizer: torch.optim.Optimizer
    loader: Loader
    validation: list[Batch]
    """Held-out text, the same each time; empty for none."""
    tokenizer: Tokenizer
    progress: Progress


def build(config: TrainerConfig, world: World) -> Run:
    """The parts of a run at step 0, on this process's device."""
    _expect_room(config, world)
    data = Data(config.data)
    vocab = data.tokenizer.vocab_size
    if vocab > config.model.vocab:
        raise ConfigError(f"model.vocab: expected at least the {vocab} tokens of the tokenizer, got {config.model.vocab}")
    loader = data.train_loader(rank=world.rank, world=world.size)
    validation = data.validation(config.validation_tokens) if config.validation_tokens else []
    random_state.seed(config.seed)
    with world.device:
        model = LM(config.model)
    check_precision(model)
    model.recompute = config.recompute
    shard(model, world)
    optimizer = config.optim.build(model)
    if config.compile:
        model.compile_blocks()
    random_state.seed(config.seed + world.rank)
    return Run(model.train(), optimizer, loader, validation, data.tokenizer, Progress())


def _expect_room(config: TrainerConfig, world: World) -> None:
    """Raise `ConfigError` for a model that cannot fit: a process makes all weights, and keeps its share of them and of their gradients."""
    parameters, room = config.model.num_parameters(), hardware.total_bytes(world.device)
    least = 4 * max(parameters, 2 * parameters // world.size)
    if room and least > room:
        raise ConfigError(
            f"model: {parameters:,} parameters take {least / 2**30:,.1f} GiB and more, and {world.device} has {room / 2**30:,.1f} GiB: "
            "choose a smaller size"
        )


def resume(run: Run, config: TrainerConfig, folder: Path, world: World) -> Path | None:
    """Bring a run to where its directory's last whole checkpoint stands; that checkpoint, or None."""
    found, some = world.broadcast((checkpoint.latest(folder), checkpoint.found_in(folder)) if world.is_first else None)
    if found is None:
        if some:
            raise CheckpointError(
                f"no checkpoint of the run in {folder} can be used: choose another directory, "
                f"or begin again by deleting {folder / checkpoint.FOLDER}"
            )
        return None
    if not config.resume:
        raise CheckpointError(f"{folder} holds a run (resume is off): choose another directory or delete it")
    difference = first_difference(json.loads((found / checkpoint.RUN).read_text()), config.to_dict())
    if difference:
        raise CheckpointError(f"{folder} holds a run of another configuration: {difference}. Choose another directory or delete it")
    local = checkpoint.load(found, run.model, run.optimizer, world=world)
    run.loader.load_state_dict(local["data"])
    run.progress = Progress(**local["progress"])
    random_state.restore(local["random"])
    return found


def loop(run: Run, config: TrainerConfig, world: World, request: StopRequest, display: Display, clock: Callable[[], float]) -> int:
    """Update until the last step, the end of the time, or a signal; write metrics and checkpoints on the way and one at the end.

    Returns the number of the signal that stopped the run, 0 if it is complete.
    """
    folder, progress, speed = Path(config.directory), run.progress, Speed()
    began = clock() - progress.seconds
    stopped, over = 0, _is_over(progress, config)
    with _log(folder, config, progress, world) as log:
        while not (over or stopped):
            began_step = clock()
            rate = config.optim.lr * config.schedule.factor(progress.step, config.steps, _place(progress, config))
            result = _update(run, config, world, rate)
            progress.add(result)
            speed.add(result.tokens, clock() - began_step)
            # All processes must agree on the time, which moves the learning rate, and on whether to go on.
            progress.seconds, received = world.reduce([clock() - began, request.received], dist.ReduceOp.MAX)
            over = _is_over(progress, config)
            stopped = 0 if over else int(received)
            row = _row(run, config, world, speed, over=over) | {"lr": rate, "grad_norm": result.grad_norm}
            if log and "loss/train" in row:
                log.write({"step": progress.step} | row)
            display.advance(progress.step, _place(progress, config), row)
            if over or stopped or progress.step % config.checkpoints.every == 0:
                save(run, config, world)
    return stopped


def save(run: Run, config: TrainerConfig, world: World) -> Path:
    """Write a checkpoint and delete the oldest."""
    folder = Path(config.directory)
    local = {"progress": asdict(run.progress), "data": run.loader.state_dict(), "random": random_state.capture()}
    path = checkpoint.save(folder, run.progress.step, run.model, run.optimizer, local=local, config=config.to_dict(), world=world)
    if world.is_first:
        checkpoint.prune(path, config.checkpoints.keep)
    return path


def export(run: Run, config: TrainerConfig, world: World) -> None:
    """Leave model and tokenizer in `model/` of the directory, for `gdn generate` and `gdn.models.load_model`."""
    folder = Path(config.directory, MODEL)
    checkpoint.export(run.model, config.model, folder, world=world)
    if world.is_first:
        with _writing(folder, config):
            run.tokenizer.save(folder)


def finish(run: Run, config: TrainerConfig, world: World, display: Display) -> None:
    """Draw the losses, print the table and a sample of text."""
    if not world.is_first:
        return
    folder = Path(config.directory)
    rows = list(metrics.read(folder / metrics.FILE))
    display.console.print(report.table(rows, parameters=config.model.num_parameters()))
    with _writing(folder / "loss.png", config):
        picture = report.plot(rows, folder / "loss.png")
    display.say(f"{folder}: {MODEL}, {metrics.FILE}" + (", loss.png" if picture else ""))
    if config.sample_tokens:
        text = report.sample(folder / MODEL, run.tokenizer, prompt=config.prompt, tokens=config.sample_tokens, device=world.device)
        display.say(f"\nThe model writes:\n\n{text}\n")
    scores = [row["bits_per_byte/val"] for row in rows if "bits_per_byte/val" in row]
    if scores:
        display.say(f"validation bits per byte {scores[-1]:.2f}")


def _update(run: Run, config: TrainerConfig, world: World, rate: float) -> Step:
    """One step at a learning rate; an error says where it happened and what to try."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    batches = [next(run.loader) for _ in range(config.accumulate)]
    try:
        return train_step(run.model, run.optimizer, batches, world=world, precision=config.precision, clip=config.clip)
    except NonFiniteError as error:
        raise NonFiniteError(_explain(str(error), run.progress, config, rate)) from error


def _explain(what: str, progress: Progress, config: TrainerConfig, rate: float) -> str:
    first = progress.step * config.accumulate
    batches = f"batch {first}" if config.accumulate == 1 else f"batches {first} to {first + config.accumulate - 1}"
    losses = ", ".join(f"{loss:.4g}" for loss in progress.losses) or "none"
    kept = checkpoint.untouched(Path(config.directory))
    return (
        f"step {progress.step + 1}: {what}. It was {batches} of this process (0 is the first), learning rate {rate:.3g}, "
        f"losses before it: {losses}. Nothing was updated{kept}. "
        "To try: a smaller optim.lr or a longer schedule.warmup; "
        f"clip={config.clip} lower; precision=fp32 if it is bf16; `gdn doctor` for the operators on this machine. "
        "If it comes back at this batch whatever the learning rate, look at the data."
    )


def _row(run: Run, config: TrainerConfig, world: World, speed: Speed, *, over: bool) -> Row:
    """The metrics due after a step: training every `log_every` steps, validation every `validate_every`, both at the end. Often empty."""
    progress = run.progress
    validating = over or (config.validate_every > 0 and progress.step % config.validate_every == 0)
    validating = validating and bool(run.validation)
    if not (over or validating or progress.step % config.log_every == 0):
        return {}
    row = progress.take_window() | {"tokens_seen": progress.tokens, "seconds": round(progress.seconds, 3)}
    row["tokens_per_second"] = speed.take()
    row["memory/peak_gib"] = _peak_memory(world.device) / 2**30
    flops = 3 * config.model.flops_per_token(config.data.length) * row["tokens_per_second"]
    mfu = metrics.utilisation(flops, world.device, world.size)
    if mfu is not None:
        row["mfu"] = mfu
    if validating:
        row |= validate(run, config, world)
    return row


def validate(run: Run, config: TrainerConfig, world: World) -> Row:
    """Loss and bits per byte on held-out text, the same text every time. Every process computes all of it: sharded parameters need all."""
    with autocast(world.device, config.precision):
        result = evaluate(run.model, run.validation)
    return {"loss/val": result.loss, "bits_per_byte/val": result.bits_per_byte}


def _place(progress: Progress, config: TrainerConfig) -> float:
    return position(progress.step, config.steps, progress.seconds, config.time_limit_s)


def _is_over(progress: Progress, config: TrainerConfig) -> bool:
    return progress.step >= config.steps or (config.time_limit_s is not None and progress.seconds >= config.time_limit_s)


@contextlib.contextmanager
def _log(folder: Path, config: TrainerConfig, progress: Progress, world: World) -> Iterator[Metrics | None]:
    """The metrics file of the first process, opened where the run stands; the configuration beside it."""
    if not world.is_first:
        yield None
        return
    with _writing(folder, config):
        log = Metrics(folder, progress.step)
        checkpoint.write_synced(folder / checkpoint.RUN, json.dumps(config.to_dict(), indent=2) + "\n")
    try:
        yield log
    finally:
        log.close()


@contextlib.contextmanager
def _writing(path: Path, config: TrainerConfig) -> Iterator[None]:
    """Turn a failure to write into a `CheckpointError` that says where."""
    try:
        yield
    except OSError as error:
        kept = checkpoint.untouched(Path(config.directory))
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}{kept}") from error


def _opening(run: Run, found: Path | None, config: TrainerConfig, world: World) -> str:
    where = str(world.device) if world.size == 1 else f"{world.size} x {world.device.type}"
    size = f"{config.model.num_parameters():,} parameters"
    text = f"{config.directory}: {size}, {where}, {config.precision}, up to {config.steps:,} steps"
    if found is None:
        return text
    more = "complete" if _is_over(run.progress, config) else f"going on after step {run.progress.step:,}"
    return f"{text}\n{found.name}: {more}"


def _peak_memory(device: torch.device) -> int:
    """Bytes: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
