"""Small random models of other libraries' own classes, to convert and to compare with: transformers' and flash-linear-attention's.

    model = random_model("delta_net", use_gate=True)
    logits_of(model, tokens)

flash-linear-attention has kernels for GPUs only. Without one they run in Triton's interpreter if that was chosen before Triton was first
imported (`TRITON_INTERPRET=1`): slow, and the whole of their model, so that nothing about it has to be believed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn.core.device import has_package, interprets_triton
from gdn.core.errors import ConfigError

SIZES: dict[str, Any] = {"vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 96}

HYBRID: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "pad_token_id": 0,
}

ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}


@dataclass(frozen=True)
class Peer:
    """A class of language models of another library, without its endings Config and ForCausalLM, and sizes for a small one."""

    library: str
    name: str
    sizes: dict[str, Any] = field(default_factory=dict)


PEERS = {
    "qwen3_5_text": Peer("transformers", "Qwen3_5", {**HYBRID, "head_dim": 16, "rope_parameters": ROPE}),
    "qwen3_next": Peer(
        "transformers", "Qwen3Next", {**HYBRID, "head_dim": 16, "rope_parameters": ROPE, "num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]}
    ),
    "olmo_hybrid": Peer("transformers", "OlmoHybrid", HYBRID),
    "gated_deltanet": Peer("fla.models", "GatedDeltaNet", {"num_heads": 2, "num_v_heads": 4, "head_dim": 16}),
    "delta_net": Peer("fla.models", "DeltaNet", {"num_heads": 2}),
    "gated_deltaproduct": Peer(
        "fla.models",
        "GatedDeltaProduct",
        {"num_heads": 2, "head_dim": 16, "num_householder": 2, "use_forget_gate": True, "allow_neg_eigval": True},
    ),
    "kda": Peer("fla.models", "KDA", {"num_heads": 2, "num_v_heads": 4, "head_dim": 16}),
    "gla": Peer("fla.models", "GLA", {"num_heads": 2}),
    "gsa": Peer("fla.models", "GSA", {"num_heads": 2, "num_slots": 16}),
    "retnet": Peer("fla.models", "RetNet", {"num_heads": 2}),
    "hgrn2": Peer("fla.models", "HGRN2", {"expand_ratio": 16}),
    "mamba2": Peer("fla.models", "Mamba2", {"head_dim": 64, "state_size": 16, "n_groups": 2}),
}
"""By family of `gdn.hf.families`. The others have no class of another library."""


def missing(family: str) -> str | None:
    """Why models of a family cannot be built here; None where they can."""
    peer = PEERS.get(family)
    if peer is None:
        return "no other library has it"
    package = peer.library.partition(".")[0]
    if not has_package(package):
        return f"{package} is not installed"
    if package == "fla" and not torch.cuda.is_available() and not interprets_triton():
        return "fla needs a GPU, or TRITON_INTERPRET=1"
    return None


def random_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """A small model of the library's own class in eval mode on the CPU, with no weight left at a special value.

    Args:
        family: one of `PEERS`.
        changes: fields of its configuration.
    """
    reason = missing(family)
    if reason is not None:
        raise ConfigError(f"{family}: {reason}")
    peer = PEERS[family]
    sizes = {**SIZES, **peer.sizes, **changes}
    if family == "mamba2":
        del sizes["intermediate_size"]
    with _quiet():
        library = _library(peer.library)
        config = getattr(library, f"{peer.name}TextConfig" if peer.name == "Qwen3_5" else f"{peer.name}Config")
        torch.manual_seed(seed)
        return scattered(getattr(library, f"{peer.name}ForCausalLM")(config(**sizes)).eval())


@torch.no_grad()
def scattered(model: Any) -> Any:
    """The model with no weight left at a special value."""
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def open_folder(family: str, folder: str | Path) -> Any:
    """The model of a folder, opened by the library of its family, in eval mode."""
    from transformers import AutoModelForCausalLM

    with _quiet():
        library = PEERS[family].library if family in PEERS else "gdn.hf"
        _library(library)
        return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Of a whole sequence, without a cache. In float32 transformers' models run the rule in torch, as they define it: the kernels of
    flash-linear-attention, which they call where it is installed, take products of float32 as TF32 (an error of 4e-3)."""
    with _quiet(), _plain_rule(model) if model.dtype == torch.float32 else nullcontext():
        return model(tokens, use_cache=False).logits


@contextmanager
def _plain_rule(model: Any) -> Iterator[None]:
    module, name = importlib.import_module(type(model).__module__), "torch_chunk_gated_delta_rule"
    chosen = getattr(module, name, None)
    if chosen is None:
        yield
        return
    setattr(module, name, inspect.unwrap(chosen))
    try:
        yield
    finally:
        setattr(module, name, chosen)


@functools.cache
def _library(name: str) -> Any:
    if not name.startswith("fla"):
        return importlib.import_module(name)
    from triton.runtime import autotuner

    begin = autotuner.Autotuner.__init__

    def with_one(self: Any, fn: Any, names: Any, configs: Any, *rest: Any, **more: Any) -> None:
        begin(self, fn, names, configs[:1], *rest, **more)

    # A choice would be timed: minutes on a GPU, and without one there is no driver. The numbers are what is compared here.
    autotuner.Autotuner.__init__ = with_one  # type: ignore[method-assign]
    try:
        return importlib.import_module(name)
    finally:
        autotuner.Autotuner.__init__ = begin  # type: ignore[method-assign]


@contextmanager
def _quiet() -> Iterator[None]:
    """Both libraries warn at length, of what they would run faster with."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
