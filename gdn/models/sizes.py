"""Configurations by name.

Published: `gdn_0.4b` and `gdn_1.3b` are the official Gated DeltaNet models (NVlabs/GatedDeltaNet; 32 000 tokens, tied embeddings).
The official code also creates one unused scalar per head and layer; it is left out here, so the counts are smaller by 9 x layers.
`deltanet_340m` and `deltanet_1.3b` are DeltaNet's (arXiv 2406.06484; 32 000 tokens, untied).

One dial: `gdn_d<depth>` has `depth` blocks of width `64 * depth`, key heads of 0.75 width in all, values twice as wide, and a SwiGLU of
8/3 width, rounded up to a multiple of 64. Depth 4 is for a laptop, 12 has 0.1 B parameters, 24 has 0.8 B.
"""

from __future__ import annotations

import re

from gdn.core.errors import ConfigError, nearest
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

SIZES: dict[str, LM.Config] = {
    "gdn_0.4b": LM.Config(vocab=32000, width=1536, layers=11, mlp=6144, pattern=(GatedDeltaNet.Config(heads=9, head_dim=128),)),
    "gdn_1.3b": LM.Config(vocab=32000, width=2400, layers=16, mlp=5888, pattern=(GatedDeltaNet.Config(heads=9, head_dim=200),)),
    "deltanet_340m": LM.Config(vocab=32000, width=1024, layers=24, mlp=2816, pattern=(DeltaNet.Config(heads=8),), tie_embeddings=False),
    "deltanet_1.3b": LM.Config(vocab=32000, width=2048, layers=24, mlp=5632, pattern=(DeltaNet.Config(heads=16),), tie_embeddings=False),
}


def size(name: str) -> LM.Config:
    """The configuration of a published size or of a depth (`gdn_d8`)."""
    if name in SIZES:
        return SIZES[name]
    dial = re.fullmatch(r"gdn_d(\d+)", name)
    if dial and int(dial[1]) >= 1:
        return from_depth(int(dial[1]))
    raise ConfigError(f'no size "{name}".{nearest(name, [*SIZES, "gdn_d8"])}')


def from_depth(depth: int, *, vocab: int = 32000) -> LM.Config:
    """The model of `depth` blocks; everything else follows."""
    width = 64 * depth
    heads = 3 * -(-depth // 8)
    mixer = GatedDeltaNet.Config(heads=heads, head_dim=48 * depth // heads // 8 * 8)
    return LM.Config(vocab=vocab, width=width, layers=depth, mlp=-(-8 * width // 3 // 64) * 64, pattern=(mixer,))
