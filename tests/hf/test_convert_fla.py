"""flash-linear-attention's families: their names written down by hand, what cannot be expressed, and, where it is installed, their own
classes, whole, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from gdn.core.errors import CheckpointError, ConfigError
from gdn.hf.convert import convert, load
from gdn.hf.families import family
from gdn.mixers.attention import Attention
from gdn.mixers.deltanet import DeltaNet
from gdn.mixers.deltaproduct import DeltaProduct
from gdn.mixers.gla import GLA
from gdn.mixers.gsa import GSA
from gdn.mixers.hgrn2 import HGRN2
from gdn.mixers.kimi_delta import KimiDelta
from gdn.mixers.mamba2 import Mamba2
from gdn.mixers.retnet import RetNet
from gdn.models.lm import LM
from gdn.models.store import save_model
from gdn.testing.checkpoints import PEERS, logits_of, missing, open_folder, random_model

SIZES = {"vocab_size": 33, "hidden_size": 24, "num_hidden_layers": 3, "hidden_act": "swish", "norm_eps": 1e-6, "intermediate_size": 40}

CONFIGS: dict[str, dict[str, Any]] = {
    "delta_net": {"num_heads": 2, "expand_k": 0.5, "use_gate": True, "qk_norm": "sum", "qk_activation": "elu", "use_output_norm": True},
    "gated_deltaproduct": {"num_heads": 2, "head_dim": 8, "num_householder": 2, "use_forget_gate": True, "allow_neg_eigval": True},
    "kda": {"num_heads": 2, "num_v_heads": 4, "head_dim": 8, "safe_gate": False, "lower_bound": None},
    "gla": {"num_heads": 2, "use_short_conv": True, "feature_map": None, "use_gk": True, "use_gv": False},
    "gsa": {"num_heads": 2, "num_slots": 5, "feature_map": "swish", "expand_k": 0.5, "expand_v": 1, "use_norm": True},
    "retnet": {"num_heads": 2, "hidden_ratio": 2},
    "hgrn2": {"expand_ratio": 8, "num_heads": 3, "use_lower_bound": True},
    "mamba2": {
        "hidden_act": "silu",
        "head_dim": 8,
        "state_size": 6,
        "n_groups": 2,
        "dt_limit": [0.0, {"__float__": "Infinity"}],
        "num_heads": 6,
    },
}

ROWS = {
    "delta_net": (12, 12, 24),
    "gated_deltaproduct": (16, 32, 64),
    "kda": (16, 16, 32),
    "gla": (12, 12, 24),
    "gsa": (12, 12, 24),
    "retnet": (24, 24, 48),
    "hgrn2": (24, 24, 24),
}
"""Of q, k and v; of q, f and i in HGRN2."""

DECAY = {"a_proj.weight": "a_proj.weight", "A_log": "A_log", "dt_bias": "dt_bias"}
OTHERS: dict[str, dict[str, str]] = {
    "delta_net": {"b_proj.weight": "b_proj.weight", "g_proj.weight": "g_proj.weight", "o_norm.weight": "o_norm.weight"},
    "gated_deltaproduct": {n: n for n in ("b_proj.weight", "g_proj.weight", "o_norm.weight")} | DECAY,
    "kda": {
        "b_proj.weight": "b_proj.weight",
        "f_proj.0.weight": "f_a_proj.weight",
        "f_proj.1.weight": "f_b_proj.weight",
        "g_proj.0.weight": "g_a_proj.weight",
        "g_proj.1.weight": "g_b_proj.weight",
        "g_proj.1.bias": "g_b_proj.bias",
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "o_norm.weight": "o_norm.weight",
    },
    "gla": {
        "gk_proj.0.weight": "decay_proj.0.weight",
        "gk_proj.1.weight": "decay_proj.1.weight",
        "gk_proj.1.bias": "decay_proj.1.bias",
        "g_proj.weight": "g_proj.weight",
        "g_norm_swish_gate.weight": "o_norm.weight",
    },
    "gsa": {"f_proj.weight": "f_proj.weight", "g_norm.weight": "o_norm.weight"},
    "retnet": {"g_proj.weight": "g_proj.weight", "g_norm_swish_gate.weight": "o_norm.weight"},
    "hgrn2": {"g_norm.weight": "o_norm.weight"},
}
"""Their name of a layer's weight to ours."""


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    config = {"model_type": name, **SIZES, **CONFIGS[name], **changes}
    if name == "mamba2":
        del config["intermediate_size"]
    return config


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def by_hand(name: str, model: LM) -> dict[str, Tensor]:
    """The weights of a model under their names."""
    found = {"lm_head.weight": model.head.weight}
    for i, block in enumerate(model.blocks):
        prefix, mixer = f"model.layers.{i}.", block.mixer
        if name == "mamba2":
            prefix = f"backbone.layers.{i}."
            found |= {f"{prefix}norm.weight": block.mixer_norm.weight, f"{prefix}mixer.conv1d.weight": mixer.conv.weight[:, None]}
            names = ("in_proj.weight", "out_proj.weight", "norm.weight", "A_log", "D", "dt_bias")
            found |= {f"{prefix}mixer.{n}": mixer.get_parameter(n) for n in names}
            found[f"{prefix}mixer.conv1d.bias"] = mixer.conv.bias
            continue
        gate, up = block.mlp.gate_up.weight.chunk(2)
        found |= {f"{prefix}attn_norm.weight": block.mixer_norm.weight, f"{prefix}mlp_norm.weight": block.mlp_norm.weight}
        found |= {
            f"{prefix}mlp.gate_proj.weight": gate,
            f"{prefix}mlp.up_proj.weight": up,
            f"{prefix}mlp.down_proj.weight": block.mlp.down.weight,
        }
        letters, stack = ("qfi", mixer.qfi_proj) if name == "hgrn2" else ("qkv", mixer.qkv_proj)
        found |= {f"{prefix}attn.{n}_proj.weight": w for n, w in zip(letters, stack.weight.split(ROWS[name]))}
        if hasattr(mixer, "conv"):
            found |= {f"{prefix}attn.{n}_conv1d.weight": w[:, None] for n, w in zip(letters, mixer.conv.weight.split(ROWS[name]))}
        found |= {f"{prefix}attn.{theirs}": mixer.get_parameter(ours) for theirs, ours in OTHERS[name].items()}
        found[f"{prefix}attn.o_proj.weight"] = mixer.o_proj.weight
    if name == "mamba2":
        found |= {"backbone.embeddings.weight": model.embedding.weight, "backbone.norm_f.weight": model.norm.weight}
    else:
        found |= {"model.embeddings.weight": model.embedding.weight, "model.norm.weight": model.norm.weight}
    if name == "hgrn2":
        found["model.lower_bounds"] = torch.stack([block.mixer.bound for block in model.blocks])
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_bytes(one: Path, other: Path) -> None:
    a, b = weights(one), weights(other)
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def ids(length: int = 12) -> Tensor:
    return torch.randint(33, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_names_written_down_by_hand(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    config = config_of(name)
    model = perturbed(LM(family(name).read_config(config)))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps(config))
    save_file(by_hand(name, model), theirs / "model.safetensors")
    assert torch.equal(load(theirs)(ids()).logits, model(ids()).logits)
    convert(theirs, tmp_path / "ours", "gdn")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(ids()).logits, model(ids()).logits)
    convert(tmp_path / "ours", tmp_path / "back", name)
    same_bytes(theirs, tmp_path / "back")
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {k: after[k] for k in config} == config
    save_model(model, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "fresh", name)
    same_bytes(theirs, tmp_path / "fresh")
    fresh = json.loads((tmp_path / "fresh" / "config.json").read_text())
    assert family(name).read_config(fresh) == model.config


@pytest.mark.parametrize(
    ("name", "theirs", "value", "ours", "expected"),
    [
        ("delta_net", "qk_activation", "identity", "qk_activation", "identity"),
        ("delta_net", "qk_norm", "l2", "qk_norm", "l2"),
        ("delta_net", "use_beta", False, "beta", False),
        ("delta_net", "use_short_conv", False, "short_conv", False),
        ("delta_net", "expand_v", 2.0, "value_dim", 24),
        ("delta_net", "allow_neg_eigval", True, "allow_neg_eigval", True),
        ("gated_deltaproduct", "num_householder", 3, "householders", 3),
        ("gated_deltaproduct", "use_forget_gate", False, "gate", False),
        ("gated_deltaproduct", "use_output_gate", False, "output_gate", False),
        ("kda", "expand_v", 2.0, "value_dim", 16),
        ("kda", "num_v_heads", None, "num_value_heads", 2),
        ("gla", "norm_eps", 1e-3, "norm_eps", 1e-3),
        ("gsa", "norm_eps", 1e-3, "norm_eps", 1e-5),
        ("gsa", "num_slots", None, "slots", 6),
        ("gsa", "gate_logit_normalizer", 4, "gate_normaliser", 4.0),
        ("gsa", "elementwise_affine", False, "norm_weight", False),
        ("gsa", "feature_map", "relu", "feature_map", "relu"),
        ("retnet", "use_short_conv", True, "norm_eps", 1e-6),
        ("hgrn2", "use_lower_bound", False, "lower_bound", False),
        ("hgrn2", "expand_ratio", None, "head_dim", 8),
        ("hgrn2", "norm_eps", 1e-3, "norm_eps", 1e-5),
        ("mamba2", "use_conv_bias", False, "conv_bias", False),
        ("mamba2", "A_init_range", [2, 8], "decay_range", (2.0, 8.0)),
    ],
)
def test_fields_are_honoured(name: str, theirs: str, value: Any, ours: str, expected: Any) -> None:
    assert getattr(family(name).read_config(config_of(name, **{theirs: value})).mixers[0], ours) == expected


@pytest.mark.parametrize(("name", "width"), [("retnet", 256), ("gla", 256), ("delta_net", 1536)])
def test_the_width_of_an_mlp_follows_from_its_ratio(name: str, width: int) -> None:
    """2/3 of ratio times width, rounded up to a multiple of 256; the ratio is 2 in RetNet and 4 in the others."""
    size = {"delta_net": 512, "gla": 64, "retnet": 128}[name]
    config = config_of(name, hidden_size=size, intermediate_size=None)
    config.pop("hidden_ratio", None)
    assert family(name).read_config(config).mlp == width


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("delta_net", {"qk_norm": "none"}, r"delta_net: qk_norm='none' is not supported; expected 'l2' or 'sum'"),
        ("delta_net", {"conv_bias": True}, r"conv_bias=True is not supported; expected no such field"),
        ("delta_net", {"num_heads": 5}, r"expand_k: expected expand_k \* hidden_size to be a multiple of num_heads=5, got 0.5 \* 24"),
        ("delta_net", {"attnres_block_size": 2}, "attnres_block_size=2"),
        ("delta_net", {"hidden_act": "powlu"}, "hidden_act='powlu'"),
        ("delta_net", {"attn": {"layers": [1], "num_heads": 4, "qkv_bias": True}}, r"attn\.qkv_bias=True"),
        ("delta_net", {"attn": {"layers": [1], "num_heads": 5}}, r"attn\.num_heads: expected a divisor of hidden_size=24, got 5"),
        ("delta_net", {"attn": {"layers": [1], "num_heads": 4, "sinks": 3}}, r"attn\.sinks=3"),
        ("kda", {"lower_bound": -5.0}, "lower_bound=-5.0"),
        ("kda", {"safe_gate": True}, "safe_gate=True"),
        ("gla", {"clamp_min": -1.0}, "clamp_min=-1.0"),
        ("gla", {"num_kv_heads": 1}, r"num_kv_heads=1 is not supported; expected None or 2"),
        ("gla", {"use_output_gate": False}, "use_output_gate=False"),
        ("gla", {"elementwise_affine": False}, "elementwise_affine=False"),
        ("gsa", {"use_short_conv": True}, "use_short_conv=True"),
        ("gsa", {"feature_map": "t2r"}, "feature_map='t2r'"),
        ("gsa", {"expand_v": 2}, "expand_v=2"),
        ("retnet", {"feature_map": "relu"}, "feature_map='relu'"),
        ("hgrn2", {"attn": {"layers": [1], "num_heads": 4}}, "use_lower_bound=True is not supported beside attn"),
        ("hgrn2", {"use_short_conv": True}, "use_short_conv=True"),
        ("mamba2", {"rmsnorm": False}, "rmsnorm=False"),
        ("mamba2", {"norm_before_gate": True}, "norm_before_gate=True"),
        ("mamba2", {"dt_limit": [0.0, 0.1]}, r"dt_limit=\[0.0, 0.1\]"),
        ("mamba2", {"expand": 1.5}, "expand=1.5"),
        ("mamba2", {"num_heads": 5}, "num_heads=5"),
    ],
)
def test_what_is_not_supported_is_named(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        family(name).read_config(config_of(name, **changes))


PLAIN = LM.Config(vocab=33, width=24, layers=2, mlp=40)
WHOLE = Attention.Config(heads=4, head_dim=6)


@pytest.mark.parametrize(
    ("to", "mixer", "words"),
    [
        ("delta_net", DeltaNet.Config(heads=2, head_dim=8, qk_norm="none"), "deltanet.qk_norm='none'; expected 'l2' or 'l1'"),
        ("delta_net", HGRN2.Config(head_dim=8), "the mixer hgrn2 of block 0; expected deltanet or attention"),
        ("delta_net", DeltaNet.Config(heads=2, head_dim=8, norm_eps=1e-6), "norm_eps=1e-05, deltanet.norm_eps=1e-06"),
        (
            "gated_deltaproduct",
            DeltaProduct.Config(householders=2, gate=True, allow_neg_eigval=True, heads=2, value_heads=4, head_dim=8),
            "value_heads=4; expected as many as heads=2",
        ),
        ("kda", KimiDelta.Config(heads=2, head_dim=8, output_gate_bias=False), "output_gate_bias=False"),
        ("gla", GLA.Config(heads=2, gate_rank=8), "gla.gate_rank=8; expected 16"),
        ("gla", GLA.Config(heads=2, gate_normaliser=8.0), "gla.gate_normaliser=8.0"),
        ("gsa", GSA.Config(heads=2, norm_eps=1e-6), "gsa.norm_eps=1e-06; expected 1e-05"),
        ("gsa", GSA.Config(heads=2, expand_v=2.0), "gsa.expand_v=2.0"),
        ("retnet", RetNet.Config(heads=2, rope_base=5000.0), "retnet.rope_base=5000.0"),
        ("mamba2", Mamba2.Config(head_dim=8), "mlp=40; expected 0"),
    ],
)
def test_what_cannot_be_expressed_is_named(to: str, mixer: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        family(to).write_config(PLAIN.with_(pattern=(mixer,)))


def test_hybrids_are_one_specification_for_each_kind_of_attention() -> None:
    linear, window = DeltaNet.Config(heads=2, head_dim=8), WHOLE.with_(window=5, rope_base=3000.0)
    config = PLAIN.with_(layers=4, pattern=(WHOLE, linear, window, linear))
    written = family("delta_net").write_config(config)
    assert [spec["layers"] for spec in written["attn"]] == [[0], [2]]
    assert family("delta_net").read_config(written) == config
    one = family("delta_net").write_config(config.with_(pattern=(WHOLE, linear)))
    assert one["attn"]["layers"] == [0, 2]
    bounds = PLAIN.with_(pattern=(WHOLE, HGRN2.Config(head_dim=8)))
    with pytest.raises(ConfigError, match="lower_bound=True beside attention"):
        family("hgrn2").write_config(bounds)
    with pytest.raises(ConfigError, match=r"attention.head_dim=8; expected width / heads = 6"):
        family("delta_net").write_config(config.with_(pattern=(linear, WHOLE.with_(head_dim=8))))


def test_a_matrix_of_another_number_of_rows_is_named(tmp_path: Path) -> None:
    model = perturbed(LM(family("hgrn2").read_config(config_of("hgrn2"))))
    (tmp_path / "config.json").write_text(json.dumps(config_of("hgrn2")))
    for name, wrong, words in (
        ("model.lower_bounds", torch.zeros(2, 24), r"model.lower_bounds: expected 72 rows, got 48: \[2, 24\]"),
        (
            "model.layers.1.attn.f_proj.weight",
            torch.zeros(8, 24),
            r"f_proj.weight .*: expected \[72, 24\], got \[56, 24\]",
        ),
    ):
        save_file({**by_hand("hgrn2", model), name: wrong}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path)


def test_a_norm_that_is_not_fused_has_another_name(tmp_path: Path) -> None:
    config = config_of("gla", fuse_norm=False)
    model = perturbed(LM(family("gla").read_config(config)))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    renamed = {n.replace("g_norm_swish_gate", "g_norm"): t for n, t in by_hand("gla", model).items()}
    save_file(renamed, tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(load(tmp_path / "theirs").eval()(ids()).logits, model(ids()).logits)
    convert(tmp_path / "theirs", tmp_path / "back", "gla")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["fuse_norm"] is True
    assert any("g_norm_swish_gate" in n for n in weights(tmp_path / "back"))


def test_the_mamba2_of_transformers_is_not_taken_for_theirs(tmp_path: Path) -> None:
    assert not family("mamba2").owns({"model_type": "mamba2", "layer_norm_epsilon": 1e-5})


# Their own classes

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "gated_deltanet": [{}, {"num_v_heads": None, "use_gate": False, "allow_neg_eigval": True, "expand_v": 1.0}],
    "delta_net": [
        {},
        {"use_gate": True, "qk_activation": "elu", "qk_norm": "sum", "expand_k": 0.5},
        {"use_beta": False, "qk_activation": "relu", "qk_norm": "sum", "use_short_conv": False, "allow_neg_eigval": True},
        {"qk_activation": "identity", "tie_word_embeddings": True, "expand_v": 2.0},
    ],
    "gated_deltaproduct": [
        {},
        {"num_householder": 3, "use_forget_gate": False, "allow_neg_eigval": False, "use_output_gate": False},
    ],
    "kda": [{}, {"use_short_conv": False, "expand_v": 2.0, "num_v_heads": None, "allow_neg_eigval": True}],
    "gla": [{}, {"use_short_conv": True, "expand_k": 1.0}],
    "gsa": [{}, {"feature_map": "relu", "elementwise_affine": False, "gate_logit_normalizer": 4}],
    "retnet": [{}, {"expand_v": 1.0, "intermediate_size": None}],
    "hgrn2": [{}, {"use_lower_bound": False}, {"expand_ratio": None, "num_heads": 2}],
    "mamba2": [{}, {"head_dim": 16, "n_groups": 1, "use_conv_bias": False, "tie_word_embeddings": True, "A_init_range": (2, 8)}],
}


def close(actual: Tensor, expected: Tensor) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 2e-5, f"relative error {error:.2g}"


@contextmanager
def attention_without_its_package(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Their attention needs a package for GPUs; this is what it is asked for."""
    import fla.layers.attn

    def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, window_size: tuple[int, int]) -> Tensor:
        ago = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
        seen = (ago >= 0) & ((ago <= window_size[0]) if window_size[0] >= 0 else True)
        heads = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*heads, attn_mask=seen, enable_gqa=True).transpose(1, 2)

    with monkeypatch.context() as patch:
        patch.setattr(fla.layers.attn, "flash_attn_func", attend)
        yield


def there_and_back(folder: Path, name: str, model: Any, run: Callable[[Any, Tensor], Tensor]) -> None:
    """Equal logits, byte-equal tensors and an equal configuration; and the other way round, opened by their class."""
    tokens, theirs = ids(), folder / "theirs"
    model.save_pretrained(theirs)
    expected = run(model, tokens)
    close(load(theirs).eval()(tokens).logits, expected)
    convert(theirs, folder / "ours", "gdn")
    convert(folder / "ours", folder / "back", name)
    same_bytes(theirs, folder / "back")
    before, after = (json.loads((folder / f / "config.json").read_text()) for f in ("theirs", "back"))
    assert {k: v for k, v in after.items() if before[k] is not None} == {k: v for k, v in before.items() if v is not None}
    convert(theirs, folder / "run", "run")
    convert(folder / "run", folder / "fresh", name)
    fresh = open_folder(name, folder / "fresh")
    assert type(fresh) is type(model)
    assert torch.equal(run(fresh, tokens), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), [(name, changes) for name, several in VARIANTS.items() for changes in several])
@torch.no_grad()
def test_their_own_models(tmp_path: Path, name: str, changes: dict[str, Any]) -> None:
    if reason := missing(name):
        pytest.skip(reason)
    there_and_back(tmp_path, name, random_model(name, **changes), logits_of)


@pytest.mark.slow
@torch.no_grad()
def test_their_own_hybrids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := missing("delta_net"):
        pytest.skip(reason)
    random_model("delta_net")
    with attention_without_its_package(monkeypatch):
        attn = [{"layers": [0], "num_heads": 4, "num_kv_heads": 2}, {"layers": [2], "num_heads": 2, "window_size": 4, "rope_theta": 300.0}]
        there_and_back(tmp_path, "delta_net", random_model("delta_net", attn=attn), logits_of)


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.library == "fla.models"])
def test_every_field_of_theirs_is_read_or_refused_or_without_effect(name: str) -> None:
    if reason := missing(name):
        pytest.skip(reason)
    whole = random_model(name).config.to_dict()
    base = family(name).read_config(whole)
    for field, value in whole.items():
        other: Any = {"bool": not value, "int": 5, "float": 0.75, "str": "other", "NoneType": 7}.get(type(value).__name__, ["other"])
        try:
            changed = family(name).read_config({**whole, field: other}) != base
        except (ConfigError, ValueError, TypeError):
            changed = True
        assert changed or field in WITHOUT_EFFECT | WITHOUT_EFFECT_IN.get(name, set()), f"{field}={other!r} was passed over"


WITHOUT_EFFECT = {
    *(
        "_name_or_path",
        "architectures",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "is_encoder_decoder",
    ),
    *("label2id", "model_type", "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict"),
    *("transformers_version", "use_cache", "attn_mode", "max_position_embeddings", "initializer_range", "fuse_cross_entropy"),
    *("fuse_linear_cross_entropy", "fuse_norm", "fuse_swiglu", "use_l2warp"),
    "hidden_ratio",  # the MLP's width is given
}
WITHOUT_EFFECT_IN = {
    "delta_net": {"use_output_norm"},
    "gla": {"use_gk", "use_gv"},
    "gsa": {"use_output_gate", "use_norm", "clamp_min", "clamp_max", "conv_size"},
    "retnet": {"use_short_conv", "conv_size"},
    "hgrn2": {"num_heads", "conv_size"},
    "mamba2": {"conv_init", "dt_init_floor", "rescale_prenorm_residual", "chunk_size", "residual_in_fp32"},
}
"""By the code of 0.6: these reach nothing that computes logits."""
