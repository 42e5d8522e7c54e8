"""The model class: storage, precision, losses, padding, packing, recomputation, embeddings, the Trainer."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from small import MIXERS, causal, config, tokens
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments

from gdn.core.errors import ArgumentError, ConfigError
from gdn.hf import GdnCache, GdnConfig, GdnForCausalLM, GdnModel
from gdn.hf.names import CACHE
from gdn.models.lm import LM
from gdn.models.start import tune_start
from gdn.models.store import load_model

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def test_the_configuration_is_that_of_the_model_and_is_checked() -> None:
    c = config("hybrid")
    assert GdnConfig.from_lm(c.lm_config()).to_dict() == c.to_dict()
    assert GdnConfig.from_dict(json.loads(c.to_json_string())).lm_config() == c.lm_config()
    assert LM(c.lm_config()).config.width == 24
    GdnConfig()
    with pytest.raises(ConfigError, match=r'pattern.0.head_dims: unknown field.*Did you mean "head_dim"'):
        config(lm={"pattern": [{"type": "gated_deltanet", "head_dims": 8}]})


@pytest.mark.parametrize("mixers", MIXERS)
@pytest.mark.parametrize("tied", [True, False])
def test_saved_whole_or_in_pieces_a_model_comes_back_equal(tmp_path, mixers: str, tied: bool) -> None:
    model = causal(mixers, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "pieces", max_shard_size="10KB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 3
    for name in ("whole", "pieces"):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert type(again) is GdnForCausalLM
        assert again.config.lm_config() == model.config.lm_config() == AutoConfig.from_pretrained(tmp_path / name).lm_config()
        assert {k: v.dtype for k, v in again.state_dict().items()} == {k: v.dtype for k, v in model.state_dict().items()}
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    model.save_pretrained(tmp_path / "pieces")  # in one, beside the index of the pieces
    assert (tmp_path / "pieces" / "model.safetensors.index.json").is_file()
    assert torch.equal(load_model(tmp_path / "pieces")(tokens()).logits, model(tokens()).logits)
    trunk = AutoModel.from_pretrained(tmp_path / "whole")
    assert type(trunk) is GdnModel
    assert "lm.head.weight" not in trunk.state_dict()
    last = model(tokens(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(trunk(tokens()).last_hidden_state, last)


def test_layers_may_be_offloaded(tmp_path) -> None:
    model, x = causal("hybrid"), tokens()
    model.save_pretrained(tmp_path / "model")
    places = {"lm.embedding": "cpu", "lm.norm": "cpu", **{f"lm.blocks.{i}": "disk" if i else "cpu" for i in range(3)}}
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk"))
    assert any(p.is_meta for p in opened.parameters())
    torch.testing.assert_close(opened(x).logits, model(x).logits)
    for kind in (None, "static"):
        options = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": kind}
        assert torch.equal(opened.generate(x, **options), model.generate(x, **options))
    places["lm.embedding"] = "disk"
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map=places, offload_folder=str(tmp_path / "disk"))
    with pytest.raises(ArgumentError, match="device_map: expected the embedding and the head in memory"):
        opened(x)


def test_weights_that_a_checkpoint_lacks_start_as_in_a_new_model(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = causal(tie_word_embeddings=False, hidden_size=64, intermediate_size=256)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    kept = {k: v for k, v in weights.items() if not k.endswith(("embedding.weight", "mlp.down.weight", "A_log"))}
    save_file(kept, file, metadata={"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    now = again.state_dict()
    assert all(torch.equal(now[k], v) for k, v in kept.items())
    assert 0.015 < now["lm.embedding.weight"].std() < 0.025
    new, old = now["lm.blocks.1.mlp.down.weight"], weights["lm.blocks.1.mlp.down.weight"]
    assert not torch.equal(new, old)
    assert 0.9 < new.std() / old.std() < 1.1
    assert (now["lm.blocks.0.mixer.A_log"] <= torch.tensor(16.0).log()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gates_stay_float32_under_any_cast(tmp_path, dtype: torch.dtype) -> None:
    model = causal()
    gates = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(("A_log", "dt_bias"))}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for cast in (model.to(dtype), loaded, causal().half().to(dtype), causal().bfloat16()):
        for name, parameter in cast.named_parameters():
            assert (parameter.dtype == torch.float32) == (name in gates), name
            if name in gates:
                assert torch.equal(parameter, gates[name]), name
        assert cast(tokens()).logits.dtype in (torch.bfloat16, torch.float16)
    assert causal().double().lm.blocks[0].mixer.A_log.dtype == torch.float64


def test_the_loss_is_that_of_the_logits_and_counts_what_the_trainer_counts() -> None:
    model, x = causal(), tokens()
    labels = x.clone()
    labels[0, 3:9] = -100
    out = model(x, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    summed = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=torch.tensor(100)).loss, summed / 100)
    torch.testing.assert_close(model(x, shift_labels=F.pad(labels[:, 1:], (0, 1), value=-100)).loss, expected)
    model.config.logits_with_loss = False
    assert model(x, labels=labels).logits is None
    assert model(x, logits_to_keep=2).logits.shape == (2, 2, 17)
    assert isinstance(model(x, return_dict=False), tuple)


@pytest.mark.parametrize("mixers", MIXERS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding_on_any_side_leaves_no_trace(mixers: str, side: str) -> None:
    model = causal(mixers).double()
    texts = [tokens(1, n, seed=n)[0] for n in (4, 11, 7)]
    rows, masks = [], []
    for text in texts:
        room = 13 - len(text)
        before = {"left": room, "right": 0, "both": room // 2}[side]
        pads = (before, room - before)
        rows.append(F.pad(text, pads, value=9))
        masks.append(F.pad(torch.ones_like(text), pads))
    x, mask = torch.stack(rows), torch.stack(masks)
    labels = x.clone()  # as a careless collator gives them: padding not masked
    out = model(x, attention_mask=mask, labels=labels, output_hidden_states=True, use_cache=True)
    following = tokens(3, 3)
    more = model(following, past_key_values=out[CACHE]).logits
    summed = 0.0
    for i, text in enumerate(texts):
        alone = model(text[None], labels=text[None], output_hidden_states=True, use_cache=True)
        torch.testing.assert_close(out.logits[i][masks[i].bool()], alone.logits[0], **EXACT)
        torch.testing.assert_close(out.hidden_states[1][i][masks[i].bool()], alone.hidden_states[1][0], **EXACT)
        summed += alone.loss.item() * (len(text) - 1)
        after = model(following[i : i + 1], cache=alone[CACHE]).logits
        torch.testing.assert_close(more[i], after[0], **EXACT)
    assert out.loss.item() == pytest.approx(summed / sum(len(t) - 1 for t in texts), rel=1e-9)


@pytest.mark.parametrize("mixers", MIXERS)
@pytest.mark.parametrize("by", ["position_ids", "seq_idx", "cu_seq_lens_q", "cu_seqlens", "seq_idx and padding"])
def test_packed_rows_equal_separate_ones(mixers: str, by: str) -> None:
    model = causal(mixers).double()
    features = [{"input_ids": tokens(1, n, seed=n)[0].tolist()} for n in (5, 1, 9, 3)]
    collate = DataCollatorWithFlattening(return_seq_idx=True, return_flash_attn_kwargs=True)
    batch = collate(features, return_tensors="pt")
    x = batch["input_ids"]
    given = {by: batch["cu_seq_lens_q" if by == "cu_seqlens" else by.split()[0]]}
    if "padding" in by:
        x = F.pad(x, (0, 3))
        given = {"seq_idx": F.pad(batch["seq_idx"], (0, 3), value=3), "attention_mask": F.pad(torch.ones(1, 18), (0, 3))}
    out = model(x, labels=x, output_hidden_states=True, **given)
    begin, summed = 0, 0.0
    for feature in features:
        text = torch.tensor([feature["input_ids"]])
        alone = model(text, labels=text)
        torch.testing.assert_close(out.logits[:, begin : begin + text.shape[1]], alone.logits, **EXACT)
        summed += alone.loss.item() * (text.shape[1] - 1)
        begin += text.shape[1]
    assert out.loss.item() == pytest.approx(summed / 14, rel=1e-9)
    assert getattr(out, CACHE) is None
    with pytest.raises(ArgumentError, match="packed rows"):
        model(x, past_key_values=model(tokens(1))[CACHE], **{**given, "seq_idx": torch.arange(x.shape[1])[None]})


def test_positions_that_only_count_are_not_packing() -> None:
    model, x = causal(), tokens()
    positions = torch.arange(30)[None] + 4
    assert torch.equal(model(x, position_ids=positions).logits, model(x).logits)


def test_wrong_inputs_are_named() -> None:
    model, x = causal(), tokens()
    for words, given in (
        ("exactly one of input_ids and inputs_embeds", {}),
        (r"input_ids: expected 2 dimensions \[B, T\], got \[30\]", {"input_ids": x[0]}),
        (r"inputs_embeds: expected \[B=2, T=3, D=24\], got \[2, 3, 5\]", {"inputs_embeds": torch.zeros(2, 3, 5)}),
        ("attention_mask: expected", {"input_ids": x, "attention_mask": torch.ones(2, 4)}),
        ("position_ids: expected", {"input_ids": x, "position_ids": torch.arange(4)[None]}),
        ("expected a GdnCache", {"input_ids": x, "past_key_values": ()}),
        ("holds 2 sequences", {"input_ids": x[:1], "past_key_values": model(x)[CACHE]}),
        ("cache: given twice", {"input_ids": x, "past_key_values": model(x)[CACHE], "cache": GdnCache()}),
    ):
        with pytest.raises(ArgumentError, match=words):
            model(**given)


def test_embeddings_as_input_and_recomputation_change_nothing() -> None:
    model, x = causal(), tokens()
    model.train()
    loss = model(x, labels=x).loss
    expected = torch.autograd.grad(loss, list(model.parameters()))
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    out = model(inputs_embeds=model.get_input_embeddings()(x), labels=x, output_hidden_states=True)
    assert len(out.hidden_states) == 4
    for a, b in zip(torch.autograd.grad(out.loss, list(model.parameters())), expected):
        torch.testing.assert_close(a, b)
    assert len(out.hidden_states) == 4
    model.gradient_checkpointing_disable()
    assert model.lm.recompute == "none"


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_resize(tmp_path, tied: bool) -> None:
    model, x = causal(tie_word_embeddings=tied), tokens()
    before = model(x).logits
    model.resize_token_embeddings(20)
    assert model.lm.config.vocab == 20 == model.config.vocab_size
    after = model(x).logits
    assert after.shape[-1] == 20
    torch.testing.assert_close(after[..., :17], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(x).logits, after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_first_memory_is_saved_with_the_model(tmp_path, dtype: torch.dtype) -> None:
    model, x = causal("hybrid"), tokens()
    with torch.no_grad():
        for memory in tune_start(model.lm).memories.values():
            memory.normal_()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, memory in model.lm.start.memories.items():
        assert torch.equal(again.lm.start.memories[name], memory)
    if dtype == torch.float32:
        assert torch.equal(again(x).logits, model(x).logits)
        assert torch.equal(AutoModel.from_pretrained(tmp_path)(x).last_hidden_state, model(x, output_hidden_states=True).hidden_states[-1])
        assert torch.equal(load_model(tmp_path)(x).logits, model(x).logits)


def test_a_model_that_exists_is_wrapped_without_a_copy() -> None:
    lm = LM(config().lm_config())
    model = GdnForCausalLM.from_lm(lm)
    assert model.lm is lm
    assert torch.equal(model.eval()(tokens()).logits, lm(tokens()).logits)


def test_the_trainer_trains_resumes_and_evaluates(tmp_path) -> None:
    rows = [{"input_ids": r.tolist(), "labels": r.tolist()} for r in tokens(24, 12)]

    def trainer(steps: int, folder: str) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            save_steps=3,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        )
        model = causal(logits_with_loss=folder != "resumed")
        return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], data_collator=DataCollatorWithFlattening())  # type: ignore[arg-type]

    whole = trainer(6, "whole")
    whole.train()
    losses = [h["loss"] for h in whole.state.log_history if "loss" in h]
    assert losses[-1] < losses[0]
    trainer(3, "resumed").train()
    again = trainer(6, "resumed")
    again.train(resume_from_checkpoint=True)
    for (name, a), b in zip(whole.model.named_parameters(), again.model.parameters()):
        assert torch.equal(a, b), name
    assert whole.evaluate()["eval_loss"] == pytest.approx(again.evaluate()["eval_loss"])


def test_smoothed_labels_are_those_of_the_next_token(tmp_path) -> None:
    x, model = tokens(4, 12), causal()
    rows = datasets.Dataset.from_dict({"input_ids": x.tolist(), "labels": x.tolist()})
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], disable_tqdm=True, use_cpu=True)
    expected = F.cross_entropy(model(x).logits[:, :-1].flatten(0, 1), x[:, 1:].flatten(), label_smoothing=0.1)
    assert Trainer(model, arguments, eval_dataset=rows).evaluate()["eval_loss"] == pytest.approx(expected.item())


def test_evaluation_gathers_logits_and_no_caches(tmp_path) -> None:
    x, model, seen = tokens(4, 12), causal(logits_with_loss=True), []
    rows = datasets.Dataset.from_dict({"input_ids": x.tolist(), "labels": x.tolist()})
    arguments = TrainingArguments(str(tmp_path), use_cache=True, report_to=[], disable_tqdm=True, use_cpu=True)
    Trainer(model, arguments, eval_dataset=rows, compute_metrics=lambda found: seen.append(found.predictions) or {}).evaluate()
    torch.testing.assert_close(torch.from_numpy(seen[0]), model(x).logits)
