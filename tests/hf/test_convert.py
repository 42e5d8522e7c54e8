"""Checkpoints of every family: equal logits, equal bytes on the way back, and errors that name what cannot be expressed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from gdn.cli import main
from gdn.core.errors import CheckpointError, ConfigError
from gdn.data import load_tokenizer
from gdn.data.bpe import train_bpe
from gdn.hf.convert import convert, load
from gdn.hf.families import FAMILIES, family, find
from gdn.mixers.attention import Attention
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.models.sizes import size
from gdn.models.store import load_model, save_model
from gdn.testing.checkpoints import PEERS

LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
SIZES = {"vocab_size": 33, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
ROPE = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
GATED = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_parameters": ROPE}

STOCK = {
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, {**LINEAR, **GATED}),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM, {**LINEAR, **GATED, "num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]}),
}
OLMO = {**LINEAR, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
STOCK["olmo_hybrid"] = (OlmoHybridConfig, OlmoHybridForCausalLM, OLMO)


def stock(name: str, **changes: Any) -> Any:
    """A small random model of transformers' own class, no weight left at a special value."""
    config, model, sizes = STOCK[name]
    torch.manual_seed(0)
    built = model(config(**{**SIZES, **sizes, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 77, **changes})).eval()
    return perturbed(built)


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def ids() -> torch.Tensor:
    return torch.randint(33, (2, 70), generator=torch.Generator().manual_seed(1))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bytes(one: Path, other: Path) -> None:
    a, b = as_meant(weights(one)), as_meant(weights(other))
    assert sorted(a) == sorted(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def as_meant(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers 5.23 writes differently from what it reads, for OLMo Hybrid: filters cut at thirds, one norm misnamed."""
    for name in [n for n in found if n.endswith("linear_attn.q_conv1d.weight")]:
        parts = [found.pop(name.replace("q_conv1d", f"{part}_conv1d")) for part in "qkv"]
        found[name] = torch.cat(parts)
    for name in [n for n in found if n.endswith("q_norm.weight")]:
        layer = name.partition("self_attn")[0]
        if f"{layer}feedforward_layer_norm.weight" in found:
            found[f"{layer}post_attention_layernorm.weight"] = found.pop(f"{layer}feedforward_layer_norm.weight")
    return found


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, f"relative error {error:.2g}"


@pytest.mark.parametrize("name", STOCK)
@pytest.mark.parametrize("kind", ["hybrid", "other", "tied"])
@torch.no_grad()
def test_stock_models_load_with_equal_logits_and_go_back_byte_for_byte(tmp_path: Path, name: str, kind: str) -> None:
    pure, no_rope = {"layer_types": ["linear_attention"] * 4}, {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
    other = {**no_rope, "linear_allow_neg_eigval": False} if name == "olmo_hybrid" else pure
    model = stock(name, **{"hybrid": {}, "other": other, "tied": {"tie_word_embeddings": True}}[kind])
    expected = model(ids(), use_cache=False).logits
    model.save_pretrained(tmp_path / "theirs")
    close(load(tmp_path / "theirs")(ids()).logits, expected)
    done = convert(tmp_path / "theirs", tmp_path / "ours", "gdn", shard_bytes=20_000)
    assert (done.source, done.target, done.unused) == (name, "gdn", ())
    assert done.tensors == len(weights(tmp_path / "ours"))
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.config.eos_token_id == 2
    close(ours(ids()).logits, expected)
    convert(tmp_path / "ours", tmp_path / "back", name)
    same_bytes(tmp_path / "theirs", tmp_path / "back")
    before, after = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "back"))
    assert {k: after.get(k) for k in before if k not in UNUSED_WITHOUT_ATTENTION} == {
        k: v for k, v in before.items() if k not in UNUSED_WITHOUT_ATTENTION
    }
    again = type(model).from_pretrained(tmp_path / "back").eval()
    assert torch.equal(again(ids(), use_cache=False).logits, expected)


@pytest.mark.parametrize("name", STOCK)
@torch.no_grad()
def test_rotary_positions_are_read_as_transformers_reads_them(tmp_path: Path, name: str) -> None:
    model = stock(name)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    for changes in ({"rope_parameters": None}, {"rope_parameters": None, "rope_theta": 777.0}, {"rope_scaling": {"type": "default"}}):
        (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
        close(load(tmp_path)(ids()).logits, type(model).from_pretrained(tmp_path).eval()(ids(), use_cache=False).logits)
    for changes in ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 77}, {"type": "linear", "factor": 2.0}):
        with pytest.raises(ConfigError, match=f"{name}: rope_type='(yarn|linear)' is not supported"):
            family(name).read_config({**values, "rope_scaling": changes})


UNUSED_WITHOUT_ATTENTION = ("num_attention_heads", "num_key_value_heads", "head_dim", "use_cache")


@torch.no_grad()
def test_a_model_trained_here_opens_in_stock_transformers_and_generates_the_same(tmp_path: Path) -> None:
    attention = Attention.Config(heads=4, kv_heads=2, head_dim=8, qk_norm=True, output_gate=True, rope_fraction=0.25, norm_eps=1e-5)
    linear = GatedDeltaNet.Config(heads=2, head_dim=8, value_heads=4, beta_bias=False)
    for name, pattern in (("hybrid", (linear, linear, linear, attention)), ("pure", (linear,))):
        torch.manual_seed(0)
        model = perturbed(LM(LM.Config(vocab=33, width=24, layers=4, mlp=40, pattern=pattern))).eval()
        save_model(model, tmp_path / name / "run")
        expected = model(ids()).logits
        for to in ("qwen3_5_text", "qwen3_next"):
            convert(tmp_path / name / "run", tmp_path / name / to, to)
            theirs = AutoModelForCausalLM.from_pretrained(tmp_path / name / to).eval()
            assert type(theirs) is STOCK[to][1]
            close(theirs(ids()).logits, expected)
            convert(tmp_path / name / to, tmp_path / name / f"{to} back", "run")
            again = load_model(tmp_path / name / f"{to} back")
            assert again.config.norm_offset == 1
            close(again(ids()).logits, expected)
    prompt = ids()[:, :9]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid" / "qwen3_5_text").eval()
    convert(tmp_path / "hybrid" / "qwen3_5_text", tmp_path / "ours", "gdn")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    generated = [m.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0) for m in (theirs, ours)]
    assert torch.equal(*generated)


def fla_names(model: LM) -> dict[str, torch.Tensor]:
    """The weights of a model under flash-linear-attention's names, written down by hand."""
    found = {"model.embeddings.weight": model.embedding.weight, "model.norm.weight": model.norm.weight, "lm_head.weight": model.head.weight}
    for i, block in enumerate(model.blocks):
        prefix, mixer, gate_up = f"model.layers.{i}.", block.mixer, block.mlp.gate_up.weight
        found |= {f"{prefix}attn_norm.weight": block.mixer_norm.weight, f"{prefix}mlp_norm.weight": block.mlp_norm.weight}
        found |= {f"{prefix}mlp.gate_proj.weight": gate_up[:40], f"{prefix}mlp.up_proj.weight": gate_up[40:]}
        found |= {f"{prefix}mlp.down_proj.weight": block.mlp.down.weight, f"{prefix}attn.o_proj.weight": mixer.o_proj.weight}
        rows = (16, 16, 64) if hasattr(mixer, "A_log") else (24, 12, 12)
        found |= {f"{prefix}attn.{n}_proj.weight": w for n, w in zip("qkv", mixer.qkv_proj.weight.split(rows))}
        if hasattr(mixer, "A_log"):
            found |= {f"{prefix}attn.{n}_conv1d.weight": w[:, None] for n, w in zip("qkv", mixer.conv.weight.split(rows))}
            found |= {f"{prefix}attn.{n}_proj.weight": getattr(mixer, f"{n}_proj").weight for n in "abg"}
            found |= {f"{prefix}attn.{n}": getattr(mixer, n) for n in ("A_log", "dt_bias")}
            found |= {f"{prefix}attn.o_norm.weight": mixer.o_norm.weight}
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def nvlabs_names(model: LM) -> dict[str, torch.Tensor]:
    """The weights of a model under the official code's names, written down by hand."""
    found = {"transformer.wte.weight": model.embedding.weight, "transformer.ln_f.weight": model.norm.weight}
    found["lm_head.weight"] = model.embedding.weight
    for i, block in enumerate(model.blocks):
        prefix, mixer, gate_up = f"transformer.h.{i}.", block.mixer, block.mlp.gate_up.weight
        found |= {f"{prefix}norm_1.weight": block.mixer_norm.weight, f"{prefix}norm_2.weight": block.mlp_norm.weight}
        found |= {f"{prefix}mlp.swiglu.w1.weight": gate_up[:40], f"{prefix}mlp.swiglu.w2.weight": gate_up[40:]}
        found[f"{prefix}mlp.swiglu.w3.weight"] = block.mlp.down.weight
        if not hasattr(mixer, "A_log"):
            q, k, v = (w.reshape(3, 12, 36) for w in mixer.qkv_proj.weight.split(36))
            found[f"{prefix}attn.attn.weight"] = torch.stack([q, k, v], dim=1).reshape(108, 36)
            found[f"{prefix}attn.proj.weight"] = mixer.o_proj.weight
            continue
        rows = (27, 27, 54)
        found |= {f"{prefix}attn.{n}_proj.weight": w for n, w in zip("qkv", mixer.qkv_proj.weight.split(rows))}
        found |= {f"{prefix}attn.{n}_conv1d.weight": w[:, None] for n, w in zip("qkv", mixer.conv.weight.split(rows))}
        found |= {f"{prefix}attn.{n}": getattr(mixer, n) for n in ("A_log", "dt_bias")}
        found |= {f"{prefix}attn.gk_proj.weight": mixer.a_proj.weight, f"{prefix}attn.b_proj.bias": mixer.b_proj.bias}
        found |= {f"{prefix}attn.{n}_proj.weight": getattr(mixer, f"{n}_proj").weight for n in "bgo"}
        found |= {f"{prefix}attn.g_norm_swish_gate.weight": mixer.o_norm.weight, f"{prefix}attn.D": torch.ones(9)}
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


FLA_CONFIG = {
    "model_type": "gated_deltanet",
    "attn_mode": "chunk",
    **SIZES,
    "num_heads": 2,
    "num_v_heads": 4,
    "head_dim": 8,
    "expand_v": 2.0,
    "norm_eps": 1e-6,
    "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "qkv_bias": False, "window_size": 16, "rope_theta": 3000.0},
}
NVLABS_CONFIG = {
    "n_embd": 36,
    "n_layer": 4,
    "n_head": 3,
    "vocab_size": 33,
    "padding_multiple": 33,
    "intermediate_size": 40,
    "gated_delta_per_layer": 2,
    "local_window": 16,
    "rotary_percentage": 1.0,
    "bias": False,
    "parallel_residual": False,
    "_norm_class": "FusedRMSNorm",
    "norm_eps": 1e-5,
    "_mlp_class": "LLaMAMLP",
    "name": "GatedDeltaNet_H1_small",
}


@pytest.mark.parametrize(("name", "config", "names"), [("gated_deltanet", FLA_CONFIG, fla_names), ("nvlabs", NVLABS_CONFIG, nvlabs_names)])
@torch.no_grad()
def test_other_families_by_names_written_down_by_hand(tmp_path: Path, name: str, config: dict[str, Any], names: Any) -> None:
    torch.manual_seed(0)
    model = perturbed(LM(family(name).read_config(config))).eval()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(config))
    save_file(names(model), tmp_path / "theirs" / "model.safetensors")
    assert torch.equal(load(tmp_path / "theirs")(ids()).logits, model(ids()).logits)
    convert(tmp_path / "theirs", tmp_path / "ours", "gdn")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "ours")(ids()).logits, model(ids()).logits)
    convert(tmp_path / "ours", tmp_path / "back", name)
    same_bytes(tmp_path / "theirs", tmp_path / "back")
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert family(name).read_config(after) == model.config
    assert {k: after[k] for k in config if k != "attn"} == {k: v for k, v in config.items() if k != "attn"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("to", ["qwen3_5_text", "gdn"])
def test_the_configuration_says_which_dtype_the_weights_have(tmp_path: Path, to: str, dtype: str) -> None:
    config = LM.Config(vocab=33, width=24, layers=2, mlp=40, pattern=(GatedDeltaNet.Config(heads=2, head_dim=8, beta_bias=False),))
    save_model(LM(config).to(getattr(torch, dtype)), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "there", to)
    assert json.loads((tmp_path / "there" / "config.json").read_text())["dtype"] == dtype
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "there").dtype == getattr(torch, dtype)


def test_generation_ends_where_documents_end(tmp_path: Path) -> None:
    """A run's configuration does not name that token: its tokenizer does, for transformers in both its configuration and its tokenizer."""
    pattern = (
        GatedDeltaNet.Config(heads=2, head_dim=8, beta_bias=False),
        Attention.Config(heads=2, head_dim=8, qk_norm=True, output_gate=True),
    )
    pattern = pattern[0], pattern[1].with_(norm_eps=1e-5)
    run = tmp_path / "run"
    save_model(LM(LM.Config(vocab=300, width=24, layers=2, mlp=40, pattern=pattern)), run)
    ours = train_bpe(["an end of a document, and an ending of another one"], 300, tmp_path)
    ours.save(run)
    for to in ("gdn", "qwen3_5_text"):
        convert(run, tmp_path / to, to)
        theirs = AutoTokenizer.from_pretrained(tmp_path / to, trust_remote_code=True)
        assert theirs.eos_token_id == ours.end_id
        for text in ("an ending,  of\n\n one", "A\u030a 12345"):
            assert theirs(text).input_ids == ours.encode(text).tolist()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / to, trust_remote_code=True).eval()
        assert model.config.eos_token_id == model.generation_config.eos_token_id == ours.end_id
    convert(tmp_path / "gdn", tmp_path / "back", "run")
    assert (tmp_path / "back" / "config.json").read_text() == (run / "config.json").read_text()


def test_a_row_beyond_the_tokenizers_is_for_padding(tmp_path: Path) -> None:
    ours = train_bpe(["an end of a document, and an ending of another one"], 300, tmp_path)
    for vocab in (ours.vocab_size, ours.vocab_size + 1, ours.vocab_size + 9):
        run = tmp_path / f"run{vocab}"
        save_model(LM(PLAIN.with_(vocab=vocab)), run)
        ours.save(run)
        for to in ("gdn", "qwen3_5_text"):
            there = tmp_path / f"{to}{vocab}"
            convert(run, there, to)
            theirs = AutoTokenizer.from_pretrained(there, trust_remote_code=True)
            model = AutoModelForCausalLM.from_pretrained(there, trust_remote_code=True).eval()
            assert theirs.eos_token_id == ours.end_id and load_tokenizer(there).fingerprint == ours.fingerprint
            if vocab == ours.vocab_size:
                assert theirs.pad_token_id is model.config.pad_token_id is None
                continue
            assert theirs.pad_token_id == model.config.pad_token_id == ours.vocab_size
            texts = ["an end of", "an ending of a document"]
            batch = theirs(texts, padding=True, padding_side="left", return_tensors="pt")
            assert (batch.input_ids == ours.vocab_size).sum() == (1 - batch.attention_mask).sum() > 0
            alone = model(torch.from_numpy(ours.encode(texts[0])).unsqueeze(0)).logits
            together = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
            torch.testing.assert_close(together[:1, -alone.shape[1] :], alone, atol=1e-5, rtol=1e-5)
        assert "pad_token" not in (run / "tokenizer_config.json").read_text()


def test_a_small_vocabulary_has_no_row_for_olmos_padding(tmp_path: Path) -> None:
    config = family("olmo_hybrid").read_config(stock("olmo_hybrid").config.to_dict())
    save_model(LM(config).eval(), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "theirs", "olmo_hybrid")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").model.embed_tokens.padding_idx is None


def test_a_multimodal_folder_gives_its_language_model(tmp_path: Path) -> None:
    model = stock("qwen3_5_text")
    model.save_pretrained(tmp_path / "text")
    inside = weights(tmp_path / "text")
    outside = {n.replace("model.", "model.language_model.", 1): t for n, t in inside.items()} | {"model.visual.x": torch.ones(2)}
    (tmp_path / "both").mkdir()
    save_file(outside, tmp_path / "both" / "model.safetensors")
    text = json.loads((tmp_path / "text" / "config.json").read_text())
    (tmp_path / "both" / "config.json").write_text(json.dumps({"model_type": "qwen3_5", "text_config": text, "tie_word_embeddings": False}))
    done = convert(tmp_path / "both", tmp_path / "ours", "gdn")
    assert done.unused == ("model.visual.x",)
    convert(tmp_path / "ours", tmp_path / "back", "qwen3_5_text")
    convert(tmp_path / "both", tmp_path / "direct", "qwen3_5_text")
    for folder in ("back", "direct"):
        same_bytes(tmp_path / "text", tmp_path / folder)
        assert json.loads((tmp_path / folder / "config.json").read_text())["eos_token_id"] == 2


def test_half_precision_weights_stay_as_they_are_and_gates_are_widened_on_loading(tmp_path: Path) -> None:
    stock("qwen3_next").to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours", "gdn")
    convert(tmp_path / "ours", tmp_path / "back", "qwen3_next")
    same_bytes(tmp_path / "theirs", tmp_path / "back")
    for model in (load(tmp_path / "ours"), AutoModelForCausalLM.from_pretrained(tmp_path / "ours").lm):
        assert model.blocks[0].mixer.A_log.dtype == torch.float32
        assert model(ids()).logits.dtype == torch.bfloat16


LAYER = GatedDeltaNet.Config(heads=2, head_dim=8, beta_bias=False)
PLAIN = LM.Config(vocab=33, width=24, layers=2, mlp=40, pattern=(LAYER,))


@pytest.mark.parametrize(
    ("to", "config", "words"),
    [
        ("qwen3_5_text", PLAIN.with_(pattern=(LAYER.with_(beta_bias=True),)), r"gated_deltanet.beta_bias=True; expected False"),
        ("qwen3_5_text", PLAIN.with_(pattern=(LAYER.with_(allow_neg_eigval=True),)), "allow_neg_eigval=True"),
        ("qwen3_next", PLAIN.with_(pattern=(LAYER.with_(short_conv=False),)), "qwen3_next: cannot express gated_deltanet.short_conv=False"),
        ("qwen3_5_text", PLAIN.with_(norm_eps=1e-6), r"norm_eps=1e-06, gated_deltanet.norm_eps=1e-05; expected one epsilon"),
        ("qwen3_5_text", PLAIN.with_(mlp=0), "mlp=0"),
        ("qwen3_5_text", PLAIN.with_(pattern=(LAYER, LAYER.with_(heads=1))), "two different gated_deltanet mixers"),
        ("qwen3_5_text", PLAIN.with_(pattern=(LAYER, Attention.Config(heads=4, head_dim=8))), r"attention.qk_norm=False; expected True"),
        ("gated_deltanet", PLAIN.with_(pattern=(LAYER.with_(qk_norm="l1"),)), "qk_norm='l1'"),
        ("qwen3_5_text", PLAIN.with_(norm_after=("gated_deltanet",)), r"norm_after=\('gated_deltanet',\)"),
        ("olmo_hybrid", PLAIN, "a model without attention"),
        ("nvlabs", PLAIN, "heads=2; expected 9"),
        ("nvlabs", PLAIN.with_(tie_embeddings=False), "tie_embeddings=False"),
    ],
)
def test_what_a_family_cannot_express_is_named(tmp_path: Path, to: str, config: LM.Config, words: str) -> None:
    save_model(LM(config), tmp_path / "run")
    with pytest.raises(ConfigError, match=words):
        convert(tmp_path / "run", tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_what_a_model_exports_as_is_known_before_it_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "gdn_qwen_0.4b", "--exports"]) == 0
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(said) == list(FAMILIES)
    assert {name for name, words in said.items() if words == "yes"} == {"gdn", "run", "qwen3_5_text", "qwen3_next"}
    assert said["gated_deltanet"] == "cannot express attention.qk_norm=True; expected False"


def test_what_is_not_supported_or_damaged_is_named(tmp_path: Path) -> None:
    config = stock("qwen3_next").config.to_dict()
    with pytest.raises(ConfigError, match="mixture of experts of layer 1"):
        family("qwen3_next").read_config({**config, "num_experts": 4, "mlp_only_layers": [0]})
    with pytest.raises(ConfigError, match="hidden_act='gelu' is not supported"):
        family("qwen3_next").read_config({**config, "hidden_act": "gelu"})
    with pytest.raises(ConfigError, match=r'no checkpoint family "qwen3_nxt".*Did you mean "qwen3_next"'):
        family("qwen3_nxt")
    with pytest.raises(ConfigError, match=r"no known checkpoint family \(llama\)"):
        find({"model_type": "llama"})
    save_model(LM(PLAIN), tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "q", "qwen3_5_text")
    with pytest.raises(CheckpointError, match="already holds a checkpoint"):
        convert(tmp_path / "run", tmp_path / "q", "qwen3_5_text")
    file = tmp_path / "q" / "model.safetensors"
    whole = load_file(file)
    for name, damage, words in (
        ("model.layers.1.linear_attn.A_log", None, r"missing model.layers.1.linear_attn.A_log"),
        ("model.layers.0.linear_attn.A_log", torch.zeros(5), r"A_log: expected \[2\], got \[5\]"),
        ("model.layers.0.linear_attn.extra", torch.zeros(5), r"extra \[5\] has no place in a qwen3_5_text model"),
        ("lm_head.weight", torch.zeros(33, 24), "differs from the embedding"),
    ):
        broken = {**whole, name: damage} if damage is not None else {k: v for k, v in whole.items() if k != name}
        save_file(broken, file)
        with pytest.raises(CheckpointError, match=words):
            load(tmp_path / "q")
    (tmp_path / "q" / "config.json").write_text('{"model_type": "qwen3_5_text"}')
    for read in (load, lambda folder: convert(folder, tmp_path / "new", "gdn")):
        with pytest.raises(ConfigError, match=r"qwen3_5_text: .*config.json has no linear_num_key_heads"):
            read(tmp_path / "q")


def test_the_size_that_is_shaped_like_qwen_can_be_exported() -> None:
    for name in ("qwen3_5_text", "qwen3_next"):
        values = family(name).write_config(size("gdn_qwen_0.4b"))
        read = family(name).read_config(values)
        assert [m.tag() for m in read.mixers] == [m.tag() for m in size("gdn_qwen_0.4b").mixers]


def test_every_family_covers_every_weight_once() -> None:
    for name in FAMILIES:
        config = family(name).read_config(NVLABS_CONFIG) if name == "nvlabs" else PLAIN
        if name == "olmo_hybrid":
            config = family(name).read_config(stock(name).config.to_dict())
        if name in PEERS and PEERS[name].library == "fla.models":
            mlp = None if name == "mamba2" else 40
            config = family(name).read_config({**SIZES, **PEERS[name].sizes, "hidden_size": 64, "intermediate_size": mlp})
        rules = list(family(name).rules(config))
        ours = sorted(n for rule in rules for n in rule.ours)
        with torch.device("meta"):
            assert ours == sorted(LM(config).state_dict()), name
        theirs = [n for rule in rules for n in rule.theirs]
        assert len(theirs) == len(set(theirs)), name


def test_a_full_disk_is_an_error_of_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from safetensors import SafetensorError

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save_model(
        LM(LM.Config(vocab=17, width=24, layers=1, mlp=32, pattern=(GatedDeltaNet.Config(heads=2, head_dim=8, beta_bias=False),))),
        tmp_path / "run",
    )
    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "gated_deltanet"]) == 1
    assert "No space left on device" in capsys.readouterr().err
