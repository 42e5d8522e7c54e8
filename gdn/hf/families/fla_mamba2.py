"""flash-linear-attention's Mamba2 (0.6): blocks of a norm and a mixer, without an MLP.

Heads of one group stand side by side, as in the official kernels and in their own decoding. Where those kernels are not installed, their
prefill deals the groups out to the heads in turn (`B.repeat`), which is another model unless there is one group or one head in each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gdn.core.errors import ConfigError
from gdn.hf.families.base import Family, Fields, Line, Table, Wishes
from gdn.hf.families.fla import GENERIC, WITHOUT_EFFECT
from gdn.mixers.mamba2 import Mamba2
from gdn.models.lm import LM

ANY_TIME_STEP: Any = {"__float__": "Infinity"}
"""How transformers writes the infinity of a configuration."""


def _table(config: LM.Config) -> Table:
    biased = any(isinstance(m, Mamba2.Config) and m.conv_bias for m in config.mixers)
    bias = (Line("conv.bias", "mixer.conv1d.bias"),) * biased
    names = ("in_proj.weight", "A_log", "dt_bias", "D", "norm.weight", "out_proj.weight")
    return Table(
        model=(Line("embedding.weight", "backbone.embeddings.weight"), Line("norm.weight", "backbone.norm_f.weight", norm=True)),
        head="lm_head.weight",
        theirs="backbone.layers.{i}.",
        block=(Line("mixer_norm.weight", "norm.weight", norm=True),),
        mixers={
            "mamba2": (*(Line(n, f"mixer.{n}") for n in names), Line("conv.weight", "mixer.conv1d.weight", taps=True), *bias),
        },
    )


def _read(config: Mapping[str, Any]) -> LM.Config:
    f = Fields(config, "mamba2")
    how_weights_begin = ("conv_init", "dt_init_floor", "rescale_prenorm_residual")
    f.free(*GENERIC, *WITHOUT_EFFECT, *how_weights_begin, "chunk_size", "residual_in_fp32")
    f.only("hidden_act", "silu", "swish")
    f.only("rmsnorm", True)
    for name in ("norm_before_gate", "D_has_hdim", "use_bias"):
        f.only(name, False)
    f.only("dt_limit", [0.0, math.inf], (0.0, math.inf), [0.0, ANY_TIME_STEP], None)
    width, head_dim, expand = f["hidden_size"], f.get("head_dim", 64), f.get("expand", 2)
    if expand != int(expand):
        raise ConfigError(f"mamba2: expand={expand} is not supported; expected a whole number")
    f.only("num_heads", None, 0, int(expand * width) // head_dim)
    low, high = f.get("A_init_range", (1, 16))
    mixer = Mamba2.Config(
        expand=int(expand),
        head_dim=head_dim,
        state_dim=f.get("state_size", 128),
        groups=f.get("n_groups", 1),
        conv_size=f.get("conv_kernel", 4),
        conv_bias=f.get("use_conv_bias", True),
        norm_eps=f.get("norm_eps", 1e-5),
        decay_range=(float(low), float(high)),
        dt_range=(f.get("dt_min", 0.001), f.get("dt_max", 0.1)),
    )
    read = LM.Config(
        vocab=f["vocab_size"],
        width=width,
        layers=f["num_hidden_layers"],
        mlp=0,
        pattern=(mixer,),
        norm_eps=f.get("norm_eps", 1e-5),
        tie_embeddings=f.get("tie_word_embeddings", False),
    )
    f.finish()
    return read


def _write(config: LM.Config) -> dict[str, Any]:
    wishes = Wishes("mamba2")
    mixer = wishes.one_of_each(config, "mamba2")["mamba2"]
    wishes.fixed(config, "", norm_after=(), mlp=0)
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "hidden_act": "silu",
        "norm_eps": wishes.same("epsilon", {"norm_eps": config.norm_eps, "mamba2.norm_eps": mixer.norm_eps}),
        "tie_word_embeddings": config.tie_embeddings,
        "expand": mixer.expand,
        "head_dim": mixer.head_dim,
        "num_heads": mixer.heads(config.width),
        "state_size": mixer.state_dim,
        "n_groups": mixer.groups,
        "conv_kernel": mixer.conv_size,
        "use_conv_bias": mixer.conv_bias,
        "A_init_range": list(mixer.decay_range),
        "dt_min": mixer.dt_range[0],
        "dt_max": mixer.dt_range[1],
    }


MAMBA2 = Family(
    name="mamba2",
    owns=lambda config: config.get("model_type") == "mamba2" and "layer_norm_epsilon" not in config,
    read_config=_read,
    write_config=_write,
    table=_table,
)
"""transformers' own Mamba2 has the same `model_type` and an epsilon of another name; its norm knows no groups."""
