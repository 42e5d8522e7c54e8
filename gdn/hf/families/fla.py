"""flash-linear-attention's `gated_deltanet` (0.6): separate q, k, v and their convolutions; some layers may be attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdn.hf.families.base import MLP, Family, Line, Table, Wishes, no_mlp_without_width, supported
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM

QKV = Line("qkv_proj.weight", {"attn.q_proj.weight": "q", "attn.k_proj.weight": "k", "attn.v_proj.weight": "v"})

CONV = Line("conv.weight", {"attn.q_conv1d.weight": "q", "attn.k_conv1d.weight": "k", "attn.v_conv1d.weight": "v"}, taps=True)

LINEAR = (
    QKV,
    Line("a_proj.weight", "attn.a_proj.weight"),
    Line("b_proj.weight", "attn.b_proj.weight"),
    Line("A_log", "attn.A_log"),
    Line("dt_bias", "attn.dt_bias"),
    Line("o_norm.weight", "attn.o_norm.weight"),
    Line("o_proj.weight", "attn.o_proj.weight"),
)


def _table(config: LM.Config) -> Table:
    linear: Any = next((m for m in config.mixers if m.tag() == "gated_deltanet"), GatedDeltaNet.Config())
    extra: tuple[Line, ...] = (CONV,) * linear.short_conv + (Line("g_proj.weight", "attn.g_proj.weight"),) * linear.output_gate
    return Table(
        model=(Line("embedding.weight", "model.embeddings.weight"), Line("norm.weight", "model.norm.weight")),
        head="lm_head.weight",
        block=no_mlp_without_width(
            (Line("mixer_norm.weight", "attn_norm.weight", norm=True), Line("mlp_norm.weight", "mlp_norm.weight", norm=True), *MLP), config
        ),
        mixers={"gated_deltanet": (*LINEAR, *extra), "attention": (QKV, Line("o_proj.weight", "attn.o_proj.weight"))},
    )


def _read(c: Mapping[str, Any]) -> LM.Config:
    supported(c, "gated_deltanet", hidden_act=("swish", "silu"), attnres_block_size=None, output_gate_activation=("swish", "silu"))
    eps = c.get("norm_eps", 1e-6)
    linear = GatedDeltaNet.Config(
        heads=c.get("num_heads", 6),
        head_dim=c.get("head_dim", 256),
        value_heads=c.get("num_v_heads"),
        expand_v=float(c.get("expand_v", 2.0)),
        short_conv=c.get("use_short_conv", True),
        conv_size=c.get("conv_size", 4),
        output_gate=c.get("use_gate", True),
        allow_neg_eigval=c.get("allow_neg_eigval", False),
        beta_bias=False,
        norm_eps=eps,
    )
    width, layers, attn = c["hidden_size"], c["num_hidden_layers"], c.get("attn") or {}
    places = set(attn.get("layers", ())) if isinstance(attn, Mapping) else set()
    supported({"attn": type(attn)}, "gated_deltanet", attn=dict)
    return LM.Config(
        vocab=c["vocab_size"],
        width=width,
        layers=layers,
        mlp=c.get("intermediate_size") or -(-int(width * c.get("hidden_ratio", 4) * 2 / 3) // 256) * 256,
        pattern=tuple(_attention(attn, width) if i in places else linear for i in range(layers)),
        norm_eps=eps,
        tie_embeddings=c.get("tie_word_embeddings", False),
    )


def _attention(attn: Mapping[str, Any], width: int) -> Any:
    from gdn.mixers.attention import Attention

    supported(attn, "gated_deltanet", qkv_bias=False, qk_norm=False)
    return Attention.Config(
        heads=attn["num_heads"],
        kv_heads=attn.get("num_kv_heads"),
        head_dim=width // attn["num_heads"],
        window=attn.get("window_size"),
        rope_base=float(attn.get("rope_theta", 10000.0)),
    )


def _write(config: LM.Config) -> dict[str, Any]:
    wishes = Wishes("gated_deltanet")
    mixers = wishes.one_of_each(config, "gated_deltanet", "attention")
    if "gated_deltanet" not in mixers:
        wishes.refuse("a model without Gated DeltaNet", "at least one such block")
    linear, attention = mixers["gated_deltanet"], mixers.get("attention")
    wishes.fixed(config, "", norm_after=())
    if not config.mlp:
        wishes.refuse("mlp=0", "a block with an MLP")
    wishes.fixed(linear, "gated_deltanet.", qk_activation="silu", qk_norm="l2", gate=True, beta_bias=False, output_norm=True)
    return {
        "model_type": "gated_deltanet",
        "architectures": ["GatedDeltaNetForCausalLM"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.mlp,
        "num_heads": linear.heads,
        "num_v_heads": linear.value_heads,
        "head_dim": linear.head_dim,
        "expand_v": linear.expand_v,
        "use_gate": linear.output_gate,
        "use_short_conv": linear.short_conv,
        "conv_size": linear.conv_size,
        "allow_neg_eigval": linear.allow_neg_eigval,
        "norm_eps": wishes.same("epsilon", {"norm_eps": config.norm_eps, "gated_deltanet.norm_eps": linear.norm_eps}),
        "tie_word_embeddings": config.tie_embeddings,
        "attn": None if attention is None else _write_attention(config, attention, wishes),
    }


def _write_attention(config: LM.Config, attention: Any, wishes: Wishes) -> dict[str, Any]:
    wishes.fixed(attention, "attention.", qk_norm=False, output_gate=False, rope_fraction=1.0)
    if attention.heads * attention.head_dim != config.width:
        wishes.refuse(f"attention.head_dim={attention.head_dim}", f"width / heads = {config.width / attention.heads}")
    return {
        "layers": [i for i, m in enumerate(config.mixers) if m.tag() == "attention"],
        "num_heads": attention.heads,
        "num_kv_heads": attention.kv_heads,
        "qkv_bias": False,
        "window_size": attention.window,
        "rope_theta": attention.rope_base,
    }


GATED_DELTANET = Family(
    name="gated_deltanet",
    owns=lambda config: config.get("model_type") == "gated_deltanet",
    read_config=_read,
    write_config=_write,
    table=_table,
)
