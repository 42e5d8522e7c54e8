"""Checkpoint formats as data: how a family names and lays out weights, and how its configuration reads.

find(config)            the family of a folder's config.json
family("qwen3_5_text")  by name
refusals(LM.Config())   what each cannot express
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from gdn.core.errors import ConfigError, nearest
from gdn.hf.families.base import Family
from gdn.models.lm import LM

FAMILIES = {
    "gdn": "gdn.hf.families.own:GDN",
    "run": "gdn.hf.families.own:RUN",
    "qwen3_5_text": "gdn.hf.families.qwen:QWEN3_5_TEXT",
    "qwen3_next": "gdn.hf.families.qwen:QWEN3_NEXT",
    "olmo_hybrid": "gdn.hf.families.olmo:OLMO_HYBRID",
    "gated_deltanet": "gdn.hf.families.fla_delta:GATED_DELTANET",
    "delta_net": "gdn.hf.families.fla_delta:DELTA_NET",
    "gated_deltaproduct": "gdn.hf.families.fla_delta:GATED_DELTAPRODUCT",
    "kda": "gdn.hf.families.fla_delta:KDA",
    "gla": "gdn.hf.families.fla_linear:GLA",
    "gsa": "gdn.hf.families.fla_linear:GSA",
    "retnet": "gdn.hf.families.fla_linear:RETNET",
    "hgrn2": "gdn.hf.families.fla_linear:HGRN2",
    "mamba2": "gdn.hf.families.fla_mamba2:MAMBA2",
    "nvlabs": "gdn.hf.families.nvlabs:NVLABS",
}
"""gdn: this package's Hugging Face folder. run: its training folder. nvlabs: the official code. From
gated_deltanet to mamba2: flash-linear-attention, by its own names."""


def family(name: str) -> Family:
    """A family by name."""
    if name not in FAMILIES:
        raise ConfigError(f'no checkpoint family "{name}".{nearest(name, FAMILIES)}')
    module, _, attribute = FAMILIES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def find(config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` belongs to."""
    found = [name for name in FAMILIES if family(name).owns(config)]
    if len(found) != 1:
        kind = config.get("model_type", "no model_type")
        raise ConfigError(f"config.json: no known checkpoint family ({kind}). Known: {', '.join(FAMILIES)}")
    return family(found[0])


def refusals(config: LM.Config) -> dict[str, str]:
    """By family: what of a model it cannot express; empty where it can express all of it."""
    found: dict[str, str] = {}
    for name in FAMILIES:
        try:
            family(name).write_config(config)
            found[name] = ""
        except ConfigError as error:
            found[name] = str(error).removeprefix(f"{name}: ")
    return found
