"""The models that are compared on a GPU: for each name the mixers of its layers, with heads of one width."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from gdn.core.errors import ConfigError, nearest
from gdn.mixers.attention import Attention
from gdn.mixers.base import MixerConfig
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.deltaproduct import DeltaProduct
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.gsa import GSA
from gdn.mixers.mamba2 import Mamba2
from gdn.mixers.swat import Swat

SLOW_DECAY = (0.01, 1.0)
"""Rates that decay starts with. With the published 16 at most, a model of two heads forgets within a dozen tokens wherever it begins: it
had not begun to recall 64 pairs after 2000 steps, where the delta rule without decay took 600."""
Pattern = tuple[MixerConfig, ...]
T = TypeVar("T")


def pattern(name: str, width: int, heads: int, window: int) -> Pattern:
    """The mixers of a model with a residual stream of `width`, `heads` heads of `width / heads`, and attention windows of `window`.

    Values are as wide as keys, so that a head of any delta-rule model has a state of the same size.
    """
    if name not in MODELS:
        raise ConfigError(f'no model "{name}".{nearest(name, MODELS)}')
    return MODELS[name](width, heads, window)


def _gdn(width: int, heads: int) -> GatedDeltaNet.Config:
    return GatedDeltaNet.Config(heads=heads, head_dim=width // heads, expand_v=1.0, decay_range=SLOW_DECAY)


def _attention(width: int, heads: int, window: int | None = None) -> Attention.Config:
    return Attention.Config(heads=heads, head_dim=width // heads, window=window)


def _product(width: int, heads: int) -> DeltaProduct.Config:
    return DeltaProduct.Config(householders=2, gate=True, allow_neg_eigval=True, heads=heads, head_dim=width // heads)


def _mamba2(width: int) -> Mamba2.Config:
    """The published expansion of 2; heads and states as wide as fit."""
    return Mamba2.Config(head_dim=min(64, width), state_dim=min(64, width), decay_range=SLOW_DECAY)


MODELS: dict[str, Callable[[int, int, int], Pattern]] = {
    "Gated DeltaNet": lambda width, heads, window: (_gdn(width, heads),),
    "Gated DeltaNet, beta < 2": lambda width, heads, window: (_gdn(width, heads).with_(allow_neg_eigval=True),),
    "DeltaNet": lambda width, heads, window: (DeltaNet.Config(heads=heads, head_dim=width // heads),),
    "DeltaProduct, 2 writes": lambda width, heads, window: (_product(width, heads),),
    "Mamba2": lambda width, heads, window: (_mamba2(width),),
    "GSA": lambda width, heads, window: (GSA.Config(heads=heads, slots=width // heads),),
    "SWAT": lambda width, heads, window: (Swat.Config(heads=heads, head_dim=width // heads, window=window),),
    "Transformer": lambda width, heads, window: (_attention(width, heads),),
    "Gated DeltaNet-H1": lambda width, heads, window: (_gdn(width, heads), _attention(width, heads, window)),
    "Gated DeltaNet-H2": lambda width, heads, window: (_mamba2(width), _gdn(width, heads), _attention(width, heads, window)),
}


def depth(mixers: Pattern, least: int) -> int:
    """Layers of a model of `least` layers, but at least one of each mixer: a hybrid of three has three."""
    return max(least, len(mixers))


def every(settings: Sequence[T], *, toy: bool) -> Iterator[tuple[str, T]]:
    """Every model at every setting; for a toy every model at the first and one model at the others."""
    for i, setting in enumerate(settings):
        for name in list(MODELS)[: 1 if toy and i else None]:
            yield name, setting
