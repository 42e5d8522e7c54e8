"""transformers' Qwen3.5 text models (dense) and Qwen3-Next (layers with a dense MLP): 3 : 1 hybrids with gated attention.

Their norms are stored around zero. Qwen3.5 splits the input projections of a layer; Qwen3-Next interleaves them by key head. Both
interleave the queries and output gates of attention by head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gdn.core.errors import ConfigError
from gdn.hf.families.base import MLP, Family, Line, Table, Wishes, no_mlp_without_width, rope_of, supported
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

MODEL = (Line("embedding.weight", "model.embed_tokens.weight"), Line("norm.weight", "model.norm.weight", norm=True))

BLOCK = (
    Line("mixer_norm.weight", "input_layernorm.weight", norm=True),
    Line("mlp_norm.weight", "post_attention_layernorm.weight", norm=True),
    *MLP,
)


def _by_head(mixer: Any) -> Tensor:
    """[query, gate] of each head, keys, values -> queries, keys, values, gates."""
    rows = mixer.heads * mixer.head_dim
    both = torch.arange(2 * rows).view(mixer.heads, 2, mixer.head_dim)
    rest = torch.arange(2 * rows, 2 * rows + 2 * mixer.num_kv_heads * mixer.head_dim)
    return torch.cat([both[:, 0].flatten(), rest, both[:, 1].flatten()])


def _by_key_head(mixer: Any) -> Tensor:
    """[query, key, values, output gates] of each key head -> queries, keys, values, output gates."""
    grouped = mixer.num_value_heads // mixer.heads * mixer.value_dim
    sizes = [mixer.head_dim, mixer.head_dim, grouped, grouped]
    return torch.cat([part.flatten() for part in torch.arange(mixer.heads * sum(sizes)).view(mixer.heads, -1).split(sizes, dim=1)])


def _gates_by_key_head(mixer: Any) -> Tensor:
    """[b, a] of each key head -> b, a."""
    group = mixer.num_value_heads // mixer.heads
    return torch.cat(
        [part.flatten() for part in torch.arange(2 * mixer.num_value_heads).view(mixer.heads, -1).split([group, group], dim=1)]
    )


COMMON = (
    Line("conv.weight", "linear_attn.conv1d.weight", taps=True),
    Line("A_log", "linear_attn.A_log"),
    Line("dt_bias", "linear_attn.dt_bias"),
    Line("o_norm.weight", "linear_attn.norm.weight"),
    Line("o_proj.weight", "linear_attn.out_proj.weight"),
)

SPLIT = (
    Line("qkv_proj.weight", "linear_attn.in_proj_qkv.weight"),
    Line("g_proj.weight", "linear_attn.in_proj_z.weight"),
    Line("b_proj.weight", "linear_attn.in_proj_b.weight"),
    Line("a_proj.weight", "linear_attn.in_proj_a.weight"),
)

INTERLEAVED = (
    Line("qkv_proj.weight g_proj.weight", "linear_attn.in_proj_qkvz.weight", order=_by_key_head),
    Line("b_proj.weight a_proj.weight", "linear_attn.in_proj_ba.weight", order=_gates_by_key_head),
)

ATTENTION = (
    Line(
        "qkv_proj.weight g_proj.weight",
        {"self_attn.q_proj.weight": "2q", "self_attn.k_proj.weight": "k", "self_attn.v_proj.weight": "v"},
        order=_by_head,
    ),
    Line("o_proj.weight", "self_attn.o_proj.weight"),
    Line("q_norm.weight", "self_attn.q_norm.weight", norm=True),
    Line("k_norm.weight", "self_attn.k_norm.weight", norm=True),
)


def _table(config: LM.Config, projections: tuple[Line, ...]) -> Table:
    block = no_mlp_without_width(BLOCK, config)
    return Table(MODEL, "lm_head.weight", block=block, mixers={"gated_deltanet": (*projections, *COMMON), "attention": ATTENTION})


def _read(config: Mapping[str, Any], family: str) -> LM.Config:
    c = config.get("text_config", config)
    supported(c, family, hidden_act="silu", attention_bias=False)
    linear = GatedDeltaNet.Config(
        heads=c["linear_num_key_heads"],
        head_dim=c["linear_key_head_dim"],
        value_heads=c["linear_num_value_heads"],
        expand_v=c["linear_value_head_dim"] / c["linear_key_head_dim"],
        conv_size=c["linear_conv_kernel_dim"],
        beta_bias=False,
        norm_eps=c["rms_norm_eps"],
        decay_range=(0.01, 16.0),
    )
    return LM.Config(
        vocab=c["vocab_size"],
        width=c["hidden_size"],
        layers=c["num_hidden_layers"],
        mlp=c["intermediate_size"],
        pattern=tuple(linear if kind == "linear_attention" else _attention(c, family) for kind in _layer_types(c)),
        norm_eps=c["rms_norm_eps"],
        norm_offset=1.0,
        tie_embeddings=config.get("tie_word_embeddings", c.get("tie_word_embeddings", False)),
    )


def _layer_types(c: Mapping[str, Any]) -> list[str]:
    interval = c.get("full_attention_interval", 4)
    count = c["num_hidden_layers"]
    return c.get("layer_types") or ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(count)]


def _attention(c: Mapping[str, Any], family: str) -> Any:
    from gdn.mixers.attention import Attention

    rope = rope_of(c, family, partial_rotary_factor=0.25)
    return Attention.Config(
        heads=c["num_attention_heads"],
        kv_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        rope_base=float(rope["rope_theta"]),
        rope_fraction=rope["partial_rotary_factor"],
        qk_norm=True,
        output_gate=True,
        norm_eps=c["rms_norm_eps"],
        norm_offset=1.0,
    )


def _write(config: LM.Config, family: str) -> dict[str, Any]:
    wishes = Wishes(family)
    mixers = wishes.one_of_each(config, "gated_deltanet", "attention")
    linear, attention = mixers.get("gated_deltanet"), mixers.get("attention")
    wishes.fixed(config, "", norm_after=())
    if not config.mlp:
        wishes.refuse("mlp=0", "a block with an MLP")
    if linear is None:
        wishes.refuse("a model without Gated DeltaNet", "at least one such block")
    assert linear is not None
    needed = {"short_conv": True, "qk_activation": "silu", "qk_norm": "l2", "gate": True, "allow_neg_eigval": False, "beta_bias": False}
    wishes.fixed(linear, "gated_deltanet.", **needed, output_gate=True, output_norm=True)
    epsilons = {"norm_eps": config.norm_eps, "gated_deltanet.norm_eps": linear.norm_eps}
    if attention is not None:
        wishes.fixed(attention, "attention.", qk_norm=True, output_gate=True, window=None, norm_all_heads=False)
        epsilons["attention.norm_eps"] = attention.norm_eps
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.mlp,
        "tie_word_embeddings": config.tie_embeddings,
        "rms_norm_eps": wishes.same("epsilon", epsilons),
        "layer_types": ["linear_attention" if m.tag() == "gated_deltanet" else "full_attention" for m in config.mixers],
        "linear_num_key_heads": linear.heads,
        "linear_num_value_heads": linear.num_value_heads,
        "linear_key_head_dim": linear.head_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_conv_kernel_dim": linear.conv_size,
        "hidden_act": "silu",
        "model_type": family,
        **_write_attention(attention, linear),
    }


def _write_attention(attention: Any, linear: Any) -> dict[str, Any]:
    if attention is None:  # transformers counts cached tokens in attention layers only, so a pure model cannot use its cache there
        return {"num_attention_heads": linear.heads, "num_key_value_heads": linear.heads, "head_dim": linear.head_dim, "use_cache": False}
    rope = {"rope_type": "default", "rope_theta": attention.rope_base, "partial_rotary_factor": attention.rope_fraction}
    return {
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "attention_bias": False,
        "rope_parameters": rope,
    }


def _read_next(config: Mapping[str, Any]) -> LM.Config:
    if config.get("num_experts", 512):
        sparse = config.get("decoder_sparse_step", 1)
        dense = set(config.get("mlp_only_layers") or ())
        experts = [i for i in range(config["num_hidden_layers"]) if i not in dense and (i + 1) % sparse == 0]
        if experts:
            raise ConfigError(f"qwen3_next: the mixture of experts of layer {experts[0]} is not supported; expected dense layers only")
    return _read(config, "qwen3_next")


def _write_next(config: LM.Config) -> dict[str, Any]:
    dense = {"mlp_only_layers": list(range(config.layers)), "num_experts": 0, "architectures": ["Qwen3NextForCausalLM"]}
    return {**_write(config, "qwen3_next"), **dense}


QWEN3_5_TEXT = Family(
    name="qwen3_5_text",
    owns=lambda config: config.get("model_type") in ("qwen3_5_text", "qwen3_5"),
    read_config=lambda config: _read(config, "qwen3_5_text"),
    write_config=lambda config: {**_write(config, "qwen3_5_text"), "architectures": ["Qwen3_5ForCausalLM"]},
    table=lambda config: _table(config, SPLIT),
    offset=1.0,
    ignored=(r"mtp\..*", r"model\.visual\..*"),
    canonical=lambda name: name.replace("model.language_model.", "model.", 1),
)

QWEN3_NEXT = Family(
    name="qwen3_next",
    owns=lambda config: config.get("model_type") == "qwen3_next",
    read_config=_read_next,
    write_config=_write_next,
    table=lambda config: _table(config, INTERLEAVED),
    offset=1.0,
    ignored=(r"mtp\..*",),
)
