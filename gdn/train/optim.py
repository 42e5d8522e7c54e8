"""AdamW, with parameters in groups by rule: those that decay, those that do not, and matrices for Muon if wanted."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from gdn.core.config import Config
from gdn.core.errors import ConfigError
from gdn.train.muon import Muon, split

GATES = ("A_log", "dt_bias")
"""Parameters of the decay gate: always float32, never decayed."""


class AdamW(Config):
    """The optimizer of a run. The defaults are those of the Gated DeltaNet paper, except that gates, norms and biases do not decay."""

    lr: float = 4e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of the averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the averaged squared gradient."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and convolution filters; multiplied by the learning rate, as in torch."""
    decay_embeddings: bool = True
    """Decay the embedding matrix too. With tied embeddings it is also the head."""
    matrices: Literal["adamw", "muon"] = "adamw"
    """How matrices of blocks are updated. "muon" makes the step of each orthogonal, of those stored in one (q, k, v; gate, up) apart.
    The rest stays with AdamW: embeddings, head, gates, convolution filters, norms."""
    momentum: float = 0.95
    """Of Muon's averaged gradient."""

    def check(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr: expected above 0, got {self.lr}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas: expected numbers from 0 to below 1, got {self.betas}")
        if self.eps <= 0:
            raise ConfigError(f"eps: expected above 0, got {self.eps}")
        if self.weight_decay < 0:
            raise ConfigError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum: expected a number from 0 to below 1, got {self.momentum}")

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model. Uses torch's fused kernel where every parameter's device has one."""
        if self.matrices == "muon":
            return self._muon(model)
        parameters = list(model.parameters())
        fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
        return torch.optim.AdamW(groups(model, self), lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)

    def _muon(self, model: nn.Module) -> Muon:
        from torch.distributed.tensor import DTensor

        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise ConfigError('matrices: "muon" needs whole matrices, but the parameters of this model are sharded; expected "adamw"')
        names, rows = split(model)
        matrices = {name: p for name, p in model.named_parameters() if name in names and p.requires_grad}
        held = {id(p) for p in matrices.values()}
        rest = [{**g, "params": [p for p in g["params"] if id(p) not in held]} for g in groups(model, self)]
        first = {"name": "muon", "params": list(matrices.values()), "weight_decay": self.weight_decay, "muon": True}
        given = [g for g in (first, *rest) if g["params"]]
        return Muon(given, rows, lr=self.lr, betas=self.betas, eps=self.eps, momentum=self.momentum)


def groups(model: nn.Module, config: AdamW) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one of two groups, `decay` and `no_decay`; an empty group is left out."""
    members: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": []}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            keep = id(parameter) in embeddings and not config.decay_embeddings
            members["no_decay" if keep or not decays(name, parameter) else "decay"].append(parameter)
    rates = {"decay": config.weight_decay, "no_decay": 0.0}
    return [{"name": name, "params": params, "weight_decay": rates[name]} for name, params in members.items() if params]


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay is right for a parameter.

    Not for gates, for anything that a module flagged `_no_weight_decay`, or for vectors (norms, biases): their scale is their meaning.
    Convolution filters `[channels, taps]` decay like matrices: they are linear maps of the activations, and the official code decays them.
    """
    return not (name.endswith(GATES) or getattr(parameter, "_no_weight_decay", False) or parameter.ndim <= 1)
