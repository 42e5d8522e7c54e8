"""Configurations by name.

Published: `gdn_0.4b` and `gdn_1.3b` are the official Gated DeltaNet models (NVlabs/GatedDeltaNet; 32 000 tokens, tied embeddings),
`gdn_h1_0.4b` and `gdn_h1_1.3b` its hybrids, every other layer attention through a window of 2048. The official code also creates one
unused scalar per head and Gated DeltaNet layer; it is left out here, so the counts are smaller by 9 x layers. `gdn_h2_1.3b` repeats the
paper's best order, Mamba2, Gated DeltaNet, attention; its size is not published, this one has the width and depth of `gdn_h1_1.3b`.
`samba_mamba2_0.4b` is Samba's smaller model with Mamba2 in place of Mamba.
`deltanet_340m` and `deltanet_1.3b` are DeltaNet's (arXiv 2406.06484; 32 000 tokens, untied), `deltanet_sliding_340m` and
`deltanet_global_340m` its hybrids with attention through a window in every other layer, or to everything in the second layer and the one
after the middle. `deltaproduct_392m` is DeltaProduct's with three writes a token (arXiv 2502.10297; 32 000 tokens, tied).
`transformer_340m` and `transformer_1.3b` are Transformer++. `gdn_qwen_0.4b` has no published counterpart of its size: three Gated DeltaNet
layers and then a gated attention layer, as in Qwen3-Next.

For comparisons on a small budget: `gdn_6m`, `gdn_32m`, `gdn_99m`, `gdn_269m`, and `transformer_6m`, `deltanet_6m`, `mamba2_6m`, ... are
matched within 3 % in parameters without the embedding, which their names count; `mamba2_mlp_6m`, ..., with an MLP after every Mamba2 layer,
are up to 7 % larger.

One dial: `gdn_d<depth>` has `depth` blocks of width `64 * depth`, key heads of 0.75 width in all, values twice as wide, and a SwiGLU of
8/3 width, rounded up to a multiple of 64. Depth 4 is for a laptop, 12 has 0.1 B parameters, 24 has 0.8 B.
"""

from __future__ import annotations

import re

from gdn.core.errors import ConfigError, nearest
from gdn.mixers.attention import Attention
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.deltaproduct import DeltaProduct
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.mamba2 import Mamba2
from gdn.models.lm import LM

_PRODUCT = DeltaProduct.Config(heads=6, householders=3, gate=False, allow_neg_eigval=True, output_gate=False)
_QWEN_LAYER = GatedDeltaNet.Config(heads=6, head_dim=128, beta_bias=False)
_GATED_ATTENTION = Attention.Config(
    heads=8, kv_heads=2, head_dim=128, qk_norm=True, output_gate=True, rope_base=1e7, rope_fraction=0.25, norm_eps=1e-5
)


def _h1(width: int, layers: int, head_dim: int) -> LM.Config:
    """Gated DeltaNet and sliding-window attention in turn."""
    pattern = GatedDeltaNet.Config(heads=9, head_dim=head_dim), Attention.Config(heads=width // 128, head_dim=128, window=2048)
    return LM.Config(vocab=32000, width=width, layers=layers, mlp=6144, pattern=pattern)


def _samba(width: int, layers: int, mlp: int) -> LM.Config:
    """Mamba2 and sliding-window attention in turn."""
    pattern = Mamba2.Config(), Attention.Config(heads=width // 128, head_dim=128, window=2048)
    return LM.Config(vocab=32000, width=width, layers=layers, mlp=mlp, pattern=pattern)


def _gdn(width: int, mlp: int, layers: int, heads: int) -> LM.Config:
    """Keys of 0.75 width in all, values twice as wide."""
    mixer = GatedDeltaNet.Config(heads=heads, head_dim=3 * width // 4 // heads)
    return LM.Config(vocab=32000, width=width, layers=layers, mlp=mlp, pattern=(mixer,))


def _transformer(width: int, mlp: int, layers: int) -> LM.Config:
    """Transformer++ with heads of 64 channels."""
    return LM.Config(vocab=32000, width=width, layers=layers, mlp=mlp, pattern=(Attention.Config(heads=width // 64, head_dim=64),))


def _deltanet_small(width: int, mlp: int, layers: int) -> LM.Config:
    """DeltaNet with heads of 128 channels."""
    return LM.Config(vocab=32000, width=width, layers=layers, mlp=mlp, pattern=(DeltaNet.Config(heads=width // 128),))


def _mamba2(width: int, mlp: int, layers: int) -> LM.Config:
    """Mamba2, as published without an MLP (0) or with one after each layer."""
    return LM.Config(vocab=32000, width=width, layers=layers, mlp=mlp, pattern=(Mamba2.Config(),))


def _deltanet(attention: Attention.Config, *places: int) -> LM.Config:
    """24 DeltaNet layers, those at the given places replaced by attention."""
    pattern = tuple(attention if i in places else DeltaNet.Config(heads=8) for i in range(24))
    return LM.Config(vocab=32000, width=1024, layers=24, mlp=2816, tie_embeddings=False, pattern=pattern)


SIZES: dict[str, LM.Config] = {
    "gdn_0.4b": LM.Config(vocab=32000, width=1536, layers=11, mlp=6144, pattern=(GatedDeltaNet.Config(heads=9, head_dim=128),)),
    "gdn_1.3b": LM.Config(vocab=32000, width=2400, layers=16, mlp=5888, pattern=(GatedDeltaNet.Config(heads=9, head_dim=200),)),
    "deltanet_340m": LM.Config(vocab=32000, width=1024, layers=24, mlp=2816, pattern=(DeltaNet.Config(heads=8),), tie_embeddings=False),
    "deltanet_1.3b": LM.Config(vocab=32000, width=2048, layers=24, mlp=5632, pattern=(DeltaNet.Config(heads=16),), tie_embeddings=False),
    "deltaproduct_392m": LM.Config(vocab=32000, width=1024, layers=24, mlp=2816, pattern=(_PRODUCT,)),
    "gdn_h1_0.4b": _h1(1536, 12, 128),
    "gdn_h1_1.3b": _h1(2304, 18, 192),
    "gdn_h2_1.3b": _h1(2304, 18, 192).with_(pattern=(Mamba2.Config(), *_h1(2304, 18, 192).pattern)),
    "samba_mamba2_0.4b": _samba(1536, 12, 4096),
    "gdn_qwen_0.4b": _gdn(1024, 2816, 24, 6).with_(pattern=(*3 * (_QWEN_LAYER,), _GATED_ATTENTION)),
    "gdn_6m": _gdn(256, 768, 6, 3),
    "gdn_32m": _gdn(512, 1536, 8, 3),
    "gdn_99m": _gdn(768, 2048, 12, 3),
    "gdn_269m": _gdn(1024, 2816, 18, 6),
    "transformer_6m": _transformer(256, 768, 7),
    "transformer_32m": _transformer(512, 1536, 9),
    "transformer_99m": _transformer(768, 2048, 14),
    "transformer_269m": _transformer(1024, 2816, 21),
    "deltanet_6m": _deltanet_small(256, 768, 7),
    "deltanet_32m": _deltanet_small(512, 1536, 9),
    "deltanet_99m": _deltanet_small(768, 2048, 14),
    "deltanet_269m": _deltanet_small(1024, 2816, 21),
    "mamba2_6m": _mamba2(256, 0, 13),
    "mamba2_32m": _mamba2(512, 0, 18),
    "mamba2_99m": _mamba2(768, 0, 26),
    "mamba2_269m": _mamba2(1024, 0, 41),
    "mamba2_mlp_6m": _mamba2(256, 768, 6),
    "mamba2_mlp_32m": _mamba2(512, 1536, 8),
    "mamba2_mlp_99m": _mamba2(768, 2048, 12),
    "mamba2_mlp_269m": _mamba2(1024, 2816, 18),
    "transformer_340m": _transformer(1024, 2816, 24),
    "transformer_1.3b": _transformer(2048, 5632, 24),
    "deltanet_sliding_340m": _deltanet(Attention.Config(heads=16, head_dim=64, window=2048), *range(1, 24, 2)),
    "deltanet_global_340m": _deltanet(Attention.Config(heads=16, head_dim=64), 1, 13),
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
