"""Models as the experiments use them: a language model, or one whose last hidden state is decoded into the whole sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdn.data.synthetic.base import Task
from gdn.models.lm import LM, LMOutput
from gdn.nn import RMSNorm
from gdn.ops import linear_cross_entropy


class Model(nn.Module):
    """A language model with logits at chosen places only."""

    def __init__(self, config: LM.Config) -> None:
        super().__init__()
        self.lm = LM(config)

    @property
    def device(self) -> torch.device:
        return self.lm.embedding.weight.device

    def hidden(self, tokens: Tensor) -> Tensor:
        """`[B, T, width]`"""
        return self.lm.hidden(tokens)[0]

    def forward(self, tokens: Tensor, *, targets: Tensor, places: Tensor | None = None) -> LMOutput:
        """The mean loss over the targets `[B, T]`; or over `[B, n]`, those at `places` `[B, n]`."""
        hidden = self.hidden(tokens)
        if places is not None:
            hidden = hidden.gather(1, places.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))
        return LMOutput(loss=linear_cross_entropy(hidden, self.lm.head_weight.to(hidden.dtype), targets))

    def logits(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """`[n, vocab]` for the n places that the mask `[B, T]` asks for."""
        hidden = self.hidden(tokens)[asked]
        return F.linear(hidden, self.lm.head_weight.to(hidden.dtype))


class FromLast(Model):
    """The hidden state of the last place plus sinusoidal codes of each place, through an MLP: MAD's decoder for compression."""

    def __init__(self, config: LM.Config) -> None:
        super().__init__(config)
        width, eps = config.width, config.norm_eps
        layers = [layer for _ in range(2) for layer in (RMSNorm(width, eps), nn.Linear(width, width), nn.GELU())]
        self.decoder = nn.Sequential(*layers, RMSNorm(width, eps))

    def hidden(self, tokens: Tensor) -> Tensor:
        last = self.lm.hidden(tokens)[0][:, -1:]
        return self.decoder(last + place_codes(tokens.shape[1], last.shape[-1], last.device).to(last.dtype))


def place_codes(length: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sines and cosines of each place at geometric wavelengths, `[length, width]` (Vaswani et al. 2017)."""
    rate = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=device) / max(1, width // 2 - 1))
    angle = torch.arange(length, device=device)[:, None] * rate
    return F.pad(torch.cat((angle.sin(), angle.cos()), dim=1), (0, width % 2))


def build(config: LM.Config, task: Task) -> Model:
    """The model for a task, with new parameters from torch's generator."""
    return FromLast(config) if task.from_last else Model(config)
