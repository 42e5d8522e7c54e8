"""The official code's checkpoints (NVlabs/GatedDeltaNet): its `Config` fields as config.json, tied embeddings, H1 hybrids.

Each Gated DeltaNet layer there has a vector D of ones that takes no part in anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gdn.hf.families.base import Family, Line, Table, Wishes, supported
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

HEADS = 9
"""The layer's default, which the official models never change."""


def _by_group(mixer: Any) -> Tensor:
    """[queries, key, value] of each key head -> queries, keys, values."""
    queries = mixer.heads // mixer.num_kv_heads
    rows = torch.arange((mixer.heads + 2 * mixer.num_kv_heads) * mixer.head_dim).view(mixer.num_kv_heads, queries + 2, mixer.head_dim)
    return torch.cat([part.flatten() for part in rows.split([queries, 1, 1], dim=1)])


TABLE = Table(
    model=(Line("embedding.weight", "transformer.wte.weight"), Line("norm.weight", "transformer.ln_f.weight")),
    head="lm_head.weight",
    theirs="transformer.h.{i}.",
    block=(
        Line("mixer_norm.weight", "norm_1.weight", norm=True),
        Line("mlp_norm.weight", "norm_2.weight", norm=True),
        Line("mlp.gate_up.weight", {"mlp.swiglu.w1.weight": "m", "mlp.swiglu.w2.weight": "m"}),
        Line("mlp.down.weight", "mlp.swiglu.w3.weight"),
    ),
    mixers={
        "gated_deltanet": (
            Line("qkv_proj.weight", {"attn.q_proj.weight": "q", "attn.k_proj.weight": "k", "attn.v_proj.weight": "v"}),
            Line(
                "conv.weight",
                {"attn.q_conv1d.weight": "q", "attn.k_conv1d.weight": "k", "attn.v_conv1d.weight": "v"},
                taps=True,
            ),
            Line("a_proj.weight", "attn.gk_proj.weight"),
            Line("b_proj.weight", "attn.b_proj.weight"),
            Line("b_proj.bias", "attn.b_proj.bias"),
            Line("g_proj.weight", "attn.g_proj.weight"),
            Line("A_log", "attn.A_log"),
            Line("dt_bias", "attn.dt_bias"),
            Line("o_norm.weight", "attn.g_norm_swish_gate.weight"),
            Line("o_proj.weight", "attn.o_proj.weight"),
        ),
        "attention": (
            Line("qkv_proj.weight", "attn.attn.weight", order=_by_group),
            Line("o_proj.weight", "attn.proj.weight"),
        ),
    },
)


def _read(c: Mapping[str, Any]) -> LM.Config:
    supported(c, "nvlabs", bias=False, parallel_residual=False, _mlp_class="LLaMAMLP", _norm_class=("FusedRMSNorm", "RMSNorm"), mamba=False)
    width, every = c["n_embd"], c["gated_delta_per_layer"]
    linear = GatedDeltaNet.Config(heads=HEADS, head_dim=3 * width // 4 // HEADS, norm_eps=1e-5)
    return LM.Config(
        vocab=c.get("padded_vocab_size") or -(-c["vocab_size"] // c.get("padding_multiple", 512)) * c.get("padding_multiple", 512),
        width=width,
        layers=c["n_layer"],
        mlp=c["intermediate_size"],
        pattern=tuple(linear if i % every == 0 else _attention(c) for i in range(min(every, c["n_layer"]))),
        norm_eps=c.get("norm_eps", 1e-5),
    )


def _attention(c: Mapping[str, Any]) -> Any:
    from gdn.mixers.attention import Attention

    supported(c, "nvlabs", sc_attn=False)
    return Attention.Config(
        heads=c["n_head"],
        kv_heads=c.get("n_query_groups"),
        head_dim=c["n_embd"] // c["n_head"],
        window=c["local_window"],
        rope_fraction=c.get("rotary_percentage", 1.0),
    )


def _write(config: LM.Config) -> dict[str, Any]:
    wishes = Wishes("nvlabs")
    mixers = wishes.one_of_each(config, "gated_deltanet", "attention")
    wishes.fixed(config, "", tie_embeddings=True)
    every = len(config.pattern) if "attention" in mixers else 1
    kinds = ["gated_deltanet" if i % every == 0 else "attention" for i in range(config.layers)]
    if [m.tag() for m in config.mixers] != kinds:
        wishes.refuse("this order of mixers", "one Gated DeltaNet block and then attention blocks, repeated")
    wishes.fixed(config, "", norm_after=())
    if not config.mlp:
        wishes.refuse("mlp=0", "a block with an MLP")
    usual = GatedDeltaNet.Config(heads=HEADS, head_dim=3 * config.width // 4 // HEADS).to_dict()
    wishes.fixed(mixers["gated_deltanet"].with_(value_heads=None), "gated_deltanet.", **{k: v for k, v in usual.items() if k not in _FREE})
    if mixers["gated_deltanet"].num_value_heads != HEADS:
        wishes.refuse(f"gated_deltanet.value_heads={mixers['gated_deltanet'].value_heads}", str(HEADS))
    return {
        "n_embd": config.width,
        "n_layer": config.layers,
        "intermediate_size": config.mlp,
        "vocab_size": config.vocab,
        "padded_vocab_size": config.vocab,
        "gated_delta_per_layer": every,
        "norm_eps": config.norm_eps,
        "bias": False,
        "parallel_residual": False,
        "_norm_class": "FusedRMSNorm",
        "_mlp_class": "LLaMAMLP",
        **_write_attention(config, mixers.get("attention"), wishes),
    }


_FREE = ("type", "value_heads", "decay_range", "dt_range")


def _write_attention(config: LM.Config, attention: Any, wishes: Wishes) -> dict[str, Any]:
    if attention is None:
        return {}
    wishes.fixed(attention, "attention.", qk_norm=False, output_gate=False, rope_base=10000.0)
    if attention.heads * attention.head_dim != config.width or attention.window is None:
        wishes.refuse(f"attention.head_dim={attention.head_dim}, window={attention.window}", "head_dim = width / heads, and a window")
    return {
        "n_head": attention.heads,
        "n_query_groups": attention.kv_heads,
        "local_window": attention.window,
        "rotary_percentage": attention.rope_fraction,
    }


def _unused(config: LM.Config) -> dict[str, Tensor]:
    linear = [i for i, m in enumerate(config.mixers) if m.tag() == "gated_deltanet"]
    return {f"transformer.h.{i}.attn.D": torch.ones(HEADS) for i in linear}


NVLABS = Family(
    name="nvlabs",
    owns=lambda config: "n_embd" in config and "gated_delta_per_layer" in config,
    read_config=_read,
    write_config=_write,
    table=lambda config: TABLE,
    constant=_unused,
    writes_tied_head=True,
)
