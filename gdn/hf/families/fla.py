"""flash-linear-attention's models (0.6), in what they share: blocks of a mixer and a SwiGLU, some of them with attention for a mixer.

What is particular to one of them is its `Layer` (`fla_delta`, `fla_linear`); Mamba2's blocks are of another kind (`fla_mamba2`). Every
field of a config.json is read, or has to have the one value that is supported, or is listed as saying nothing about what is computed;
any other is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gdn.core.errors import ConfigError
from gdn.hf.families.base import MLP, Family, Fields, Line, Table, Wishes
from gdn.mixers.base import MixerConfig
from gdn.models.lm import LM

GENERIC = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "model_type",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)
"""What transformers writes into every configuration."""

WITHOUT_EFFECT = (
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_norm",
    "fuse_swiglu",
    "initializer_range",
    "use_l2warp",
)
"""How weights begin, which kernels run, what is added to the loss: logits are the same."""

QKV = Line("qkv_proj.weight", {f"attn.{part}_proj.weight": part for part in "qkv"})

CONV = Line("conv.weight", {f"attn.{part}_conv1d.weight": part for part in "qkv"}, taps=True)

O_PROJ = Line("o_proj.weight", "attn.o_proj.weight")

BLOCK = (Line("mixer_norm.weight", "attn_norm.weight", norm=True), Line("mlp_norm.weight", "mlp_norm.weight", norm=True), *MLP)


def same(*names: str) -> tuple[Line, ...]:
    """Weights of the mixer that have the same names there."""
    return tuple(Line(name, f"attn.{name}") for name in names)


@dataclass(frozen=True)
class Layer:
    """What is particular to one of the models."""

    name: str
    """Their `model_type`."""
    architecture: str
    tag: str
    """Of our mixer."""
    lines: Callable[[Any], tuple[Line, ...]]
    """The table of the mixer, from its configuration."""
    read: Callable[[Fields], MixerConfig]
    write: Callable[[Any, LM.Config, Wishes], dict[str, Any]]
    """The mixer's fields of config.json."""
    outside: Callable[[LM.Config], tuple[Line, ...]] = lambda config: ()
    """Weights of the mixers that are kept outside the blocks."""
    epsilon: float | None = None
    """Of the mixer's norm, where that is not the configuration's."""
    hidden_ratio: int = 4
    aliases: tuple[tuple[str, str], ...] = ()


def family_of(layer: Layer) -> Family:
    """The family of a model."""
    return Family(
        name=layer.name,
        owns=lambda config: config.get("model_type") == layer.name,
        read_config=lambda config: _read(config, layer),
        write_config=lambda config: _write(config, layer),
        table=lambda config: _table(config, layer),
        aliases=layer.aliases,
    )


def _table(config: LM.Config, layer: Layer) -> Table:
    outside = (Line("embedding.weight", "model.embeddings.weight"), Line("norm.weight", "model.norm.weight", norm=True))
    mixer = next((m for m in config.mixers if m.tag() == layer.tag), None)
    return Table(
        model=(*outside, *layer.outside(config)),
        head="lm_head.weight",
        block=BLOCK if config.mlp else BLOCK[:1],
        mixers={"attention": (QKV, O_PROJ), **({} if mixer is None else {layer.tag: layer.lines(mixer)})},
    )


def _read(config: Mapping[str, Any], layer: Layer) -> LM.Config:
    fields = Fields(config, layer.name)
    fields.free(*GENERIC, *WITHOUT_EFFECT, "attn_mode", "max_position_embeddings")
    fields.only("hidden_act", "swish", "silu")
    fields.only("attnres_block_size", None)
    fields.only("norm_first", True)
    width, layers = fields["hidden_size"], fields["num_hidden_layers"]
    ratio = fields.get("hidden_ratio", layer.hidden_ratio) or 4
    mixer, attention = layer.read(fields), _read_attention(fields, width)
    read = LM.Config(
        vocab=fields["vocab_size"],
        width=width,
        layers=layers,
        mlp=fields.get("intermediate_size", None) or -(-int(width * ratio * 2 / 3) // 256) * 256,
        pattern=tuple(attention.get(i, mixer) for i in range(layers)),
        norm_eps=fields.get("norm_eps", 1e-6),
        tie_embeddings=fields.get("tie_word_embeddings", False),
    )
    fields.finish()
    return read


def _read_attention(fields: Fields, width: int) -> dict[int, MixerConfig]:
    """The layers with attention: one specification, or a list of them."""
    from gdn.mixers.attention import Attention

    given = fields.get("attn", None) or []
    found: dict[int, MixerConfig] = {}
    for spec in [given] if isinstance(given, Mapping) else given:
        inner = Fields(spec, fields.family, "attn.")
        inner.only("qkv_bias", False)
        inner.only("qk_norm", False)
        heads = inner["num_heads"]
        if width % heads:
            raise ConfigError(f"{fields.family}: attn.num_heads: expected a divisor of hidden_size={width}, got {heads}")
        attention = Attention.Config(
            heads=heads,
            kv_heads=inner.get("num_kv_heads", None),
            head_dim=width // heads,
            window=inner.get("window_size", None),
            rope_base=float(inner.get("rope_theta", 10000.0)),
        )
        found |= dict.fromkeys(inner["layers"], attention)
        inner.finish()
    return found


def _write(config: LM.Config, layer: Layer) -> dict[str, Any]:
    wishes = Wishes(layer.name)
    mixers = wishes.one_of_each(config, layer.tag, "attention", several=("attention",))
    if layer.tag not in mixers:
        wishes.refuse(f"a model without {layer.tag}", "at least one such block")
    mixer = mixers[layer.tag]
    wishes.fixed(config, "", norm_after=())
    if not config.mlp:
        wishes.refuse("mlp=0", "a block with an MLP")
    if layer.epsilon is None:
        wishes.same("epsilon", {"norm_eps": config.norm_eps, f"{layer.tag}.norm_eps": mixer.norm_eps})
    else:
        wishes.fixed(mixer, f"{layer.tag}.", norm_eps=layer.epsilon)
    return {
        "model_type": layer.name,
        "architectures": [layer.architecture],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "intermediate_size": config.mlp,
        "hidden_act": "swish",
        "norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attn": _write_attention(config, wishes),
        **layer.write(mixer, config, wishes),
    }


def _write_attention(config: LM.Config, wishes: Wishes) -> dict[str, Any] | list[dict[str, Any]] | None:
    places: dict[Any, list[int]] = {}
    for i, mixer in enumerate(config.mixers):
        if mixer.tag() == "attention":
            places.setdefault(mixer, []).append(i)
    for attention in places:
        wishes.fixed(attention, "attention.", qk_norm=False, output_gate=False, rope_fraction=1.0)
        if attention.heads * attention.head_dim != config.width:
            wishes.refuse(f"attention.head_dim={attention.head_dim}", f"width / heads = {config.width / attention.heads}")
    specs = [
        {
            "layers": layers,
            "num_heads": attention.heads,
            "num_kv_heads": attention.kv_heads,
            "qkv_bias": False,
            "window_size": attention.window,
            "rope_theta": attention.rope_base,
        }
        for attention, layers in places.items()
    ]
    return specs if len(specs) > 1 else specs[0] if specs else None
