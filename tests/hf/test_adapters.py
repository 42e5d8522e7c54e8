"""Adapters reach every projection, train, come back, and never skip a layer in silence."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from small import causal, tokens
from torch import nn
from transformers import (
    OlmoHybridConfig,
    OlmoHybridForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from gdn.core.errors import ConfigError
from gdn.hf.adapters import PRESETS, check_targets, lora_parameters, lora_targets, projections, routed_experts

SIZES = {"vocab_size": 33, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
GATED = {**LINEAR, "num_key_value_heads": 1, "head_dim": 8}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
SIGHT = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16, "num_position_embeddings": 16}
ARCHITECTURES: dict[str, Any] = {
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, GATED),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM, {**GATED, "num_experts": 0, "mlp_only_layers": [0, 1, 2, 3]}),
    "qwen3_5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration, {"text_config": {**SIZES, **GATED}, "vision_config": SIGHT}),
    "olmo_hybrid": (OlmoHybridConfig, OlmoHybridForCausalLM, {**LINEAR, "pad_token_id": 0, "eos_token_id": 1}),
}


def build(name: str) -> nn.Module:
    if name == "gdn":
        return causal("hybrid")
    config, model, sizes = ARCHITECTURES[name]
    return model(config(**(sizes if "text_config" in sizes else {**SIZES, **sizes})))


@pytest.mark.parametrize("name", ["gdn", *ARCHITECTURES])
def test_presets_reach_every_projection_of_every_layer(name: str) -> None:
    model = build(name)
    for part in ("mixers",) if name == "qwen3_next" else ("mixers", "all"):
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=lora_targets(model, part)))
        layers = [path for path, _ in projections(wrapped, part) if path.endswith(".base_layer")]
        model = wrapped.unload()
        reached = {path.removesuffix(".base_layer").removeprefix("base_model.model.") for path in layers}
        assert reached == {path for path, _ in projections(model, part)}
        assert min(sum(f".{i}." in path for path in reached) for i in range(3)) >= (2 if part == "mixers" else 4)
    if name == "qwen3_next":
        with pytest.raises(ConfigError, match="PEFT takes gate_proj, up_proj, down_proj for experts"):
            lora_targets(model)
    with pytest.raises(ConfigError, match=r"skip \d+ of \d+ projections"):
        check_targets(model, ["o_proj", "v_proj"])


def test_routed_experts_are_not_skipped_in_silence() -> None:
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**{**SIZES, **GATED, **EXPERTS}))
    for part in ("all", "mlps"):
        with pytest.raises(
            ConfigError, match=r"8 parameters of routed experts \(model.layers.0.mlp.experts.gate_up_proj, ...\) are no modules"
        ):
            lora_targets(model, part)  # type: ignore[arg-type]
    assert lora_targets(model, "mixers") == lora_targets(build("qwen3_5_text"), "mixers")
    assert lora_parameters(build("qwen3_5_text")) == []
    before, routed = [path for path, _ in projections(model)], len(list(routed_experts(model)))
    targets = {"target_modules": lora_targets(model, experts=True), "target_parameters": lora_parameters(model)}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    x = tokens(1, 12)
    wrapped(input_ids=x, labels=x).loss.backward()
    trained = {name: p.grad for name, p in wrapped.named_parameters() if "lora_B" in name}
    assert len(trained) == len(before) + routed
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in trained.values())


def test_routed_experts_of_qwen3_next_beside_its_mixers() -> None:
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**{**SIZES, **GATED, **EXPERTS}))
    with pytest.raises(ConfigError, match="PEFT takes gate_proj, up_proj, down_proj for experts"):
        lora_targets(model, experts=True)
    expected = len(list(projections(model, "mixers"))) + len(list(routed_experts(model)))
    targets = {"target_modules": lora_targets(model, "mixers"), "target_parameters": lora_parameters(model)}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    assert sum("lora_B" in name for name, _ in wrapped.named_parameters()) == expected


def test_what_a_preset_does_not_know_is_refused() -> None:
    model = causal()
    model.lm.blocks[1].mixer.extra_proj = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"skip 1 of \d+ projections \(extra_proj\), the first of them lm.blocks.1.mixer.extra_proj"):
        lora_targets(model)
    with pytest.raises(ConfigError, match='no adapter preset for "Linear"'):
        lora_targets(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="part: expected"):
        lora_targets(causal(), "heads")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no projections"):
        check_targets(nn.Linear(2, 2), ["x"])
    assert set(PRESETS) >= set(ARCHITECTURES)


def test_an_adapter_trains_and_comes_back(tmp_path: Path) -> None:
    x, config = tokens(), peft.LoraConfig(r=2, target_modules=lora_targets(causal("hybrid")), task_type="CAUSAL_LM")
    model = peft.get_peft_model(causal("hybrid"), config)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=0.02), []
    for _ in range(8):
        loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    model.eval()
    expected = model(input_ids=x).logits
    again = peft.PeftModel.from_pretrained(causal("hybrid"), str(tmp_path)).eval()
    assert torch.equal(again(input_ids=x).logits, expected)
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(x).logits, expected, rtol=1e-4, atol=1e-5)
    generated = [m.generate(input_ids=x[:, :5], max_new_tokens=5, do_sample=False) for m in (model, merged)]
    assert torch.equal(*generated)


def test_an_adapter_around_the_head_takes_part() -> None:
    x, model = tokens(), causal("hybrid", tie_word_embeddings=False)
    labels = x.masked_fill(x < 4, -100)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False))
    for items in (None, torch.tensor(40)):
        out = wrapped(input_ids=x, labels=labels, num_items_in_batch=items)
        out.loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in wrapped.parameters() if p.requires_grad)
        merged = copy.deepcopy(wrapped).merge_and_unload()(x, labels=labels, num_items_in_batch=items)
        torch.testing.assert_close(out.loss, merged.loss)
        torch.testing.assert_close(out.logits, merged.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(wrapped(input_ids=x, logits_to_keep=2).logits, out.logits[:, -2:])
    assert wrapped(input_ids=x, labels=torch.full_like(x, -100)).loss == 0
