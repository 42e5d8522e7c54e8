"""transformers' OLMo Hybrid: attention blocks norm what mixer and MLP give, Gated DeltaNet blocks what they get.

On disk q, k and v have convolutions of their own. Files that transformers 5.23 writes differ from those it was made to read: the filters
are cut into three pieces of about equal length, whatever the widths of q, k and v, and the first norm of attention blocks has the name of
the second one of the others. Both kinds are read here (and by transformers); what is written has the widths and the names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdn.hf.families.base import MLP, Family, Line, Table, Wishes, rope_of, supported
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

CONV = {f"linear_attn.{part}_conv1d.weight": part for part in "qkv"}

TABLE = Table(
    model=(Line("embedding.weight", "model.embed_tokens.weight"), Line("norm.weight", "model.norm.weight")),
    head="lm_head.weight",
    blocks={
        "gated_deltanet": (
            Line("mixer_norm.weight", "attention_layer_norm.weight"),
            Line("mlp_norm.weight", "feedforward_layer_norm.weight"),
            *MLP,
        ),
        "attention": (
            Line("mixer_norm.weight", "post_attention_layernorm.weight"),
            Line("mlp_norm.weight", "post_feedforward_layernorm.weight"),
            *MLP,
        ),
    },
    mixers={
        "gated_deltanet": (
            Line("qkv_proj.weight", {f"linear_attn.{part}_proj.weight": part for part in "qkv"}),
            Line("conv.weight", CONV, taps=True),
            *(Line(f"{part}_proj.weight", f"linear_attn.{part}_proj.weight") for part in "abgo"),
            Line("A_log", "linear_attn.A_log"),
            Line("dt_bias", "linear_attn.dt_bias"),
            Line("o_norm.weight", "linear_attn.o_norm.weight"),
        ),
        "attention": (
            Line("qkv_proj.weight", {f"self_attn.{part}_proj.weight": part for part in "qkv"}),
            *(Line(f"{name}.weight", f"self_attn.{name}.weight") for name in ("o_proj", "q_norm", "k_norm")),
        ),
    },
)

EPS = 1e-5
"""Of the output norm, whatever the configuration says."""


def _read(c: Mapping[str, Any]) -> LM.Config:
    from gdn.mixers.attention import Attention

    supported(c, "olmo_hybrid", hidden_act="silu", attention_bias=False)
    theta = rope_of(c, "olmo_hybrid")["rope_theta"]
    width, heads = c["hidden_size"], c["num_attention_heads"]
    linear = GatedDeltaNet.Config(
        heads=c["linear_num_key_heads"],
        head_dim=c["linear_key_head_dim"],
        value_heads=c["linear_num_value_heads"],
        expand_v=c["linear_value_head_dim"] / c["linear_key_head_dim"],
        conv_size=c["linear_conv_kernel_dim"],
        allow_neg_eigval=c["linear_allow_neg_eigval"],
        beta_bias=False,
        norm_eps=EPS,
        decay_range=(c["linear_a_log_min"], c["linear_a_log_max"]),
        dt_range=(c["linear_dt_min"], c["linear_dt_max"]),
    )
    attention = Attention.Config(
        heads=heads,
        kv_heads=c["num_key_value_heads"],
        head_dim=c.get("head_dim") or width // heads,
        rope_base=float(theta or 10000.0),
        rope_fraction=1.0 if theta is not None else 0.0,
        qk_norm=True,
        norm_all_heads=True,
        norm_eps=c["rms_norm_eps"],
    )
    return LM.Config(
        vocab=c["vocab_size"],
        width=width,
        layers=c["num_hidden_layers"],
        mlp=c["intermediate_size"],
        pattern=tuple(linear if kind == "linear_attention" else attention for kind in c["layer_types"]),
        norm_eps=c["rms_norm_eps"],
        norm_after=("attention",),
        tie_embeddings=c.get("tie_word_embeddings", False),
    )


def _write(config: LM.Config) -> dict[str, Any]:
    wishes = Wishes("olmo_hybrid")
    mixers = wishes.one_of_each(config, "gated_deltanet", "attention")
    for kind in ("gated_deltanet", "attention"):
        if kind not in mixers:
            wishes.refuse(f"a model without {kind}", "both kinds of blocks")
    linear, attention = mixers["gated_deltanet"], mixers["attention"]
    wishes.fixed(config, "", norm_after=("attention",), norm_offset=0.0)
    if not config.mlp:
        wishes.refuse("mlp=0", "a block with an MLP")
    needed = {"short_conv": True, "qk_activation": "silu", "qk_norm": "l2", "gate": True, "beta_bias": False, "norm_eps": EPS}
    wishes.fixed(linear, "gated_deltanet.", **needed, output_gate=True, output_norm=True)
    wishes.fixed(attention, "attention.", qk_norm=True, norm_all_heads=True, norm_offset=0.0, output_gate=False, window=None)
    if attention.rope_fraction not in (0.0, 1.0):
        wishes.refuse(f"attention.rope_fraction={attention.rope_fraction}", "0 or 1")
    rope = {"rope_type": "default", "rope_theta": attention.rope_base if attention.rope_fraction else None}
    return {
        "model_type": "olmo_hybrid",
        "architectures": ["OlmoHybridForCausalLM"],
        "pad_token_id": None,  # theirs would be a row of their own vocabulary, and a smaller one could not be opened
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.mlp,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": "silu",
        "rms_norm_eps": wishes.same("epsilon", {"norm_eps": config.norm_eps, "attention.norm_eps": attention.norm_eps}),
        "layer_types": ["linear_attention" if m.tag() == "gated_deltanet" else "full_attention" for m in config.mixers],
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.num_kv_heads,
        **({} if attention.heads * attention.head_dim == config.width else {"head_dim": attention.head_dim}),
        "attention_bias": False,
        "rope_parameters": rope,
        "linear_num_key_heads": linear.heads,
        "linear_num_value_heads": linear.num_value_heads,
        "linear_key_head_dim": linear.head_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_conv_kernel_dim": linear.conv_size,
        "linear_allow_neg_eigval": linear.allow_neg_eigval,
        "linear_a_log_min": linear.decay_range[0],
        "linear_a_log_max": linear.decay_range[1],
        "linear_dt_min": linear.dt_range[0],
        "linear_dt_max": linear.dt_range[1],
    }


OLMO_HYBRID = Family(
    name="olmo_hybrid",
    owns=lambda config: config.get("model_type") == "olmo_hybrid",
    read_config=_read,
    write_config=_write,
    table=lambda config: TABLE,
    aliases=(("post_attention_layernorm.weight", "feedforward_layer_norm.weight"),),
)
