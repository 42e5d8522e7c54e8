"""This package's own folders: the one that transformers opens, and the one that a training run writes."""

from __future__ import annotations

from typing import Any

import torch

from gdn.hf.configuration import GdnConfig
from gdn.hf.families.base import Family, Line, Table
from gdn.models.lm import LM
from gdn.models.store import HF_PREFIX, read_config


def _table(config: LM.Config, prefix: str) -> Table:
    with torch.device("meta"):
        names = list(LM(config.with_(tie_embeddings=True)).state_dict())
    return Table(
        model=tuple(Line(name, prefix + name) for name in names), head=f"{prefix}head.weight", mixers={m.tag(): () for m in config.mixers}
    )


def _write(config: LM.Config) -> dict[str, Any]:
    return {**GdnConfig.from_lm(config).to_dict(), "architectures": ["GdnForCausalLM"]}


GDN = Family(
    name="gdn",
    owns=lambda config: config.get("model_type") == "gdn",
    read_config=read_config,
    write_config=_write,
    table=lambda config: _table(config, HF_PREFIX),
)

RUN = Family(
    name="run",
    owns=lambda config: "model_type" not in config and "pattern" in config,
    read_config=LM.Config.from_dict,
    write_config=LM.Config.to_dict,
    table=lambda config: _table(config, ""),
)
