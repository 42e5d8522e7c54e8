"""What test_distributed.py runs twice, as torchrun does: sharded steps beside unsharded ones, then a run that is stopped and resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from gdn.data import Batch
from gdn.mixers.hgrn2 import HGRN2
from gdn.models.lm import LM
from gdn.train import AdamW, Trainer, report, train_step, trainer
from gdn.train.distributed import World, processes, shard
from gdn.train.optim import groups


def batches(count: int) -> list[Batch]:
    """Rows of random tokens with more and more of the targets left out."""
    made = []
    for i in range(count):
        tokens = torch.randint(0, 257, (2, 17), generator=torch.Generator().manual_seed(i))
        targets = tokens[:, 1:].contiguous()
        targets.view(-1)[: 3 * i] = -100
        valid = int((targets != -100).sum())
        made.append(Batch(tokens=tokens[:, :-1], targets=targets, packing=None, num_targets=valid, num_bytes=valid))
    return made


def sharded_beside_whole(config: LM.Config, world: World) -> dict[str, Any]:
    """Losses and norms of three steps on one process with two micro-batches, and on two processes with one each."""
    whole, model = LM(config), LM(config)
    model.load_state_dict(whole.state_dict())
    for lm in (whole, model):
        lm.blocks[0].mixer.o_proj.weight._no_weight_decay = True
    shard(model, world)
    names = {id(p): name for name, p in model.named_parameters()}
    kept = [names[id(p)] for group in groups(model, AdamW()) if group["name"] == "no_decay" for p in group["params"]]
    one, alone = AdamW(lr=0.01).build(whole), World(device=world.device)
    many = AdamW(lr=0.01).build(model)
    results = []
    for i in range(3):
        pair = batches(6)[2 * i : 2 * i + 2]
        a = train_step(whole, one, pair, world=alone, clip=1.0)
        b = train_step(model, many, [pair[world.rank]], world=world, clip=1.0)
        results.append([[a.loss, a.grad_norm, a.tokens], [b.loss, b.grad_norm, b.tokens]])
    gates = {name: str(p.dtype) for name, p in model.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    sharded = all(isinstance(p, dist.tensor.DTensor) for p in model.parameters())
    return {"steps": results, "gates": gates, "sharded": sharded, "no_decay": sorted(kept)}


def stopped_after(config: Trainer.Config, step: int, rank: int) -> int:
    """Run, and send one process alone a request to stop. Both must heed it."""
    original, steps = trainer.train_step, 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == step and rank == 1:
            os.kill(os.getpid(), 15)
        return original(*args, **options)

    trainer.train_step = counted
    try:
        return Trainer(config).run()
    finally:
        trainer.train_step = original


def one_of_two(rank: int, port: int, settings: dict[str, Any], file: Path) -> None:
    """One of the processes, in the environment that torchrun gives it. The first leaves what it found in a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    report.has_package = lambda name: False  # a picture takes as long as the steps
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Trainer.Config.from_dict(settings)
    with processes("cpu") as world:
        found = sharded_beside_whole(config.model, world)
        found["joined"] = sharded_beside_whole(config.model.with_(pattern=(HGRN2.Config(head_dim=8),), layers=3), world)
        whole, broken = (config.with_(directory=f"{config.directory}/{name}") for name in ("whole", "broken"))
        found["statuses"] = [Trainer(whole).run(), stopped_after(broken, 5, world.rank), Trainer(broken).run()]
        if world.is_first:
            file.write_text(json.dumps(found))
