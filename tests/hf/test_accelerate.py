"""A transformers model on our operators gives the numbers of the stock model, and is right where stock is not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gdn
from gdn.core.errors import ArgumentError, ImplementationError
from gdn.hf.accelerate import check_sources
from gdn.hf.accelerate.families import FAMILIES
from gdn.hf.names import CACHE

LENGTHS = [20, 1, 17, 12]
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


def tokens(batch: int = 2, length: int = 50, seed: int = 0) -> Tensor:
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def accelerated(models: Callable[..., Any], family: str) -> Any:
    """In float64, where a failed equality is a fault and not rounding."""
    model = models(family, torch.float64)
    gdn.accelerate(model)
    return model


def logits_and_gradients(model: Any, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    out = model(x, labels=x)
    yield "logits", out.logits.detach().double()
    gradients = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    for (name, _), gradient in zip(model.named_parameters(), gradients, strict=True):
        yield name, gradient.double()


def distance(actual: Tensor, truth: Tensor) -> float:
    return float((actual - truth).norm() / truth.norm().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_and_gradients_are_as_right_as_those_of_stock(models: Callable[..., Any], family: str, dtype: torch.dtype) -> None:
    x = tokens(length=70)
    stock = models(family).to(dtype)
    exact = copy.deepcopy(stock).double()
    gdn.accelerate(exact)
    truth, plain = dict(logits_and_gradients(exact, x)), dict(logits_and_gradients(stock, x))
    gdn.accelerate(stock)
    ours = dict(logits_and_gradients(stock, x))
    assert distance(plain["logits"], truth["logits"]) < 100 * torch.finfo(dtype).eps, "the truth is not the function of the stock model"
    for name, value in ours.items():
        error, allowed = distance(value, truth[name]), 2 * distance(plain[name], truth[name]) + 8 * torch.finfo(dtype).eps
        assert error <= allowed, f"{name}: relative error {error:.2e}, allowed {allowed:.2e}"


def test_generate_gives_the_same_tokens(models: Callable[..., Any], family: str) -> None:
    model, x = models(family), tokens(3, 12)
    mask = torch.ones_like(x)
    mask[0, :5] = mask[1, :1] = 0
    ways: list[dict[str, Any]] = [{}, {"num_beams": 3}]
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    expected = [model.generate(x, **settings, **way) for way in ways]
    with gdn.accelerate(model):
        for way, sequence in zip(ways, expected, strict=True):
            assert torch.equal(model.generate(x, **settings, **way), sequence), way


@torch.no_grad()
def test_caches_hold_what_those_of_stock_hold(models: Callable[..., Any], family: str) -> None:
    """Prompt in pieces, then single tokens; also while the cache records its past, which keeps inputs for `crop`."""
    from transformers import DynamicCache, StaticCache

    model, x = models(family), tokens(2, 24)
    for make in (lambda: DynamicCache(config=model.config), lambda: StaticCache(config=model.config, max_cache_len=24), _recording(model)):
        caches, outputs = [], []
        for fast in (False, True):
            handle = gdn.accelerate(model) if fast else None
            cache = make()
            outputs.append(torch.cat([model(p, use_cache=True, **{CACHE: cache}).logits for p in x.split([2, 9, 5, 3, 1, 1, 1, 2], 1)], 1))
            caches.append(cache.layers[0])
            if handle:
                handle.restore()
        torch.testing.assert_close(outputs[1], outputs[0])
        stock, ours = caches
        torch.testing.assert_close(ours.conv_states[0], stock.conv_states[0])
        torch.testing.assert_close(ours.recurrent_states[0], stock.recurrent_states[0])


def _recording(model: Any) -> Callable[[], Any]:
    from transformers import DynamicCache

    def make() -> Any:
        cache = DynamicCache(config=model.config)
        cache.activate_past_recording()
        return cache

    return make


@torch.no_grad()
def test_any_split_of_a_prompt_gives_the_same_logits(accelerated: Any) -> None:
    x = tokens()
    whole = accelerated(x).logits
    for cuts in ([1], [33], [3, 40], [47, 48, 49], [2, 10, 11]):
        cache, pieces = None, []
        for piece in x.tensor_split(cuts, dim=1):
            out = accelerated(piece, use_cache=True, **{CACHE: cache})
            cache = out[CACHE]
            pieces.append(out.logits)
        torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)


def _ways_to_say_packed() -> dict[str, Callable[[], dict[str, Any]]]:
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).unsqueeze(0)
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS), dtype=torch.int32), torch.tensor(LENGTHS)).unsqueeze(0)
    bounds = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0)
    return {
        "position_ids": lambda: {"position_ids": positions},
        "cu_seq_lens_q": lambda: {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 20, "max_length_k": 20},
        "cu_seqlens": lambda: {"cu_seqlens": bounds, "position_ids": positions},
        "seq_idx": lambda: {"seq_idx": numbers, "position_ids": positions},
        "packing": lambda: {"packing": gdn.Packing.from_lengths(LENGTHS)},
    }


@pytest.mark.parametrize("way", _ways_to_say_packed())
def test_packed_documents_equal_separate_ones(accelerated: Any, way: str) -> None:
    x = tokens(1)
    separate = torch.cat([accelerated(piece).logits for piece in x.split(LENGTHS, 1)], 1)
    packed = accelerated(x, **_ways_to_say_packed()[way]()).logits
    torch.testing.assert_close(packed, separate, **EXACT)
    weight = torch.randn(packed.shape, generator=torch.Generator().manual_seed(1), dtype=packed.dtype)
    parameters = list(accelerated.parameters())
    for a, b in zip(torch.autograd.grad((packed * weight).sum(), parameters), torch.autograd.grad((separate * weight).sum(), parameters)):
        torch.testing.assert_close(a, b, **EXACT)


def test_packed_rows_of_a_batch_and_gradient_checkpointing(accelerated: Any) -> None:
    x, positions = tokens(2), torch.cat([torch.arange(30), torch.arange(20)]).expand(2, -1)
    expected = torch.cat([accelerated(piece).logits for piece in x.split([30, 20], 1)], 1)
    torch.testing.assert_close(accelerated(x, position_ids=positions).logits, expected, **EXACT)
    parameters = list(accelerated.parameters())
    plain = torch.autograd.grad(accelerated(x, position_ids=positions, labels=x).loss, parameters)
    accelerated.train()
    accelerated.activation_checkpointing_enable({"use_reentrant": False})
    for a, b in zip(torch.autograd.grad(accelerated(x, position_ids=positions, labels=x).loss, parameters), plain):
        torch.testing.assert_close(a, b, **EXACT)


@torch.no_grad()
def test_padding_on_either_side_leaves_no_trace(accelerated: Any) -> None:
    x = tokens(1, 20)
    expected = accelerated(x, use_cache=True)
    for left, right in ((7, 0), (0, 3), (2, 5)):
        padded = torch.cat([tokens(1, left, 1), x, tokens(1, right, 2)], 1)
        mask = torch.tensor([[0] * left + [1] * 20 + [0] * right])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        out = accelerated(padded, attention_mask=mask, position_ids=positions, use_cache=True)
        torch.testing.assert_close(out.logits[:, left : left + 20], expected.logits, **EXACT)
        memory = [o[CACHE].layers[0].recurrent_states[0] for o in (out, expected)]
        torch.testing.assert_close(*memory, **EXACT)


def test_gradients_flow_through_a_cache(accelerated: Any) -> None:
    x, parameters = tokens(), list(accelerated.parameters())
    whole = torch.autograd.grad(accelerated(x).logits[:, 30:].square().sum(), parameters)
    first = accelerated(x[:, :30], use_cache=True)
    second = accelerated(x[:, 30:], use_cache=True, **{CACHE: first[CACHE]})
    for a, b in zip(torch.autograd.grad(second.logits.square().sum(), parameters), whole):
        torch.testing.assert_close(a, b, **EXACT)


@pytest.mark.parametrize("family", ["qwen3_next", "olmo_hybrid"])
def test_compiles_as_one_graph_packed_or_not(models: Callable[..., Any], family: str) -> None:
    model, x = models(family), tokens(1)
    if hasattr(model.config, "num_experts"):
        model.set_experts_implementation("grouped_mm")  # the one that compiles
    positions = _ways_to_say_packed()["position_ids"]()["position_ids"]
    gdn.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, use_cache=False).logits, model(x).logits)
        torch.testing.assert_close(compiled(x, position_ids=positions, use_cache=False).logits, model(x, position_ids=positions).logits)


def test_trains_as_one_graph(models: Callable[..., Any]) -> None:
    model, x = models("qwen3_5"), tokens(1)
    said = {"position_ids": _ways_to_say_packed()["position_ids"]()["position_ids"], "labels": x, "use_cache": False}
    gdn.accelerate(model)
    eager = torch.autograd.grad(model(x, **said).loss, list(model.parameters()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(torch.autograd.grad(compiled(x, **said).loss, list(model.parameters())), eager):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_restoring_gives_the_stock_model_back(models: Callable[..., Any], family: str) -> None:
    model, x = models(family), tokens()
    state, before = list(model.state_dict()), model(x).logits
    with gdn.accelerate(model) as report:
        assert list(model.state_dict()) == state
        twin = copy.deepcopy(model)
        gdn.accelerate(model)  # once more changes nothing
    assert not any(
        "forward" in vars(module) or "_loss_function" in vars(module) or "_gdn_no_pickle" in vars(module) for module in model.modules()
    )
    assert torch.equal(model(x).logits, before)
    assert gdn.restore(model) == 0
    assert gdn.restore(twin) == len(report.changed)
    assert torch.equal(twin(x).logits, before)


def test_a_pickle_that_could_not_be_read_is_not_written(models: Callable[..., Any], tmp_path: Path) -> None:
    model, x = models("qwen3_5"), tokens()
    with gdn.accelerate(model), pytest.raises(ImplementationError, match=r"cannot be pickled: gdn.restore\(model\) first"):
        torch.save(model, tmp_path / "model.pt")
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x).logits, model(x).logits)


def test_the_report_says_what_changed(models: Callable[..., Any]) -> None:
    report = gdn.accelerate(models("qwen3_5"))
    assert report.changed["model.layers.0.linear_attn"].startswith("convolved_qkv, gated_delta_rule")
    text = str(report)
    assert "11 modules" in text
    assert "1 x Qwen3_5GatedDeltaNet" in text
    assert "7 x Qwen3_5RMSNorm " in text
    assert report.changed[""].startswith("cross_entropy")


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["mean", "int", "tensor"])
def test_the_loss_counts_what_stock_counts(models: Callable[..., Any], items: Any, shifted: bool) -> None:
    model, x = models("qwen3_5"), tokens()
    labels = x.masked_fill(x < 20, -100)
    more = {"shift_labels": labels.roll(-1, 1)} if shifted else {}
    expected = model(x, labels=labels, num_items_in_batch=items, **more).loss
    with gdn.accelerate(model):
        torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=items, **more).loss, expected, rtol=1e-5, atol=0)
        nothing = model(x, labels=torch.full_like(x, -100)).loss
        assert nothing.isnan()
        assert all(not g.any() for g in torch.autograd.grad(nothing, list(model.parameters()), allow_unused=True, materialize_grads=True))
    model.loss_function = own = lambda *args, **kwargs: torch.zeros(())
    with gdn.accelerate(model):
        assert model.loss_function is own


def test_hooks_of_accelerate_stay_before_our_forward(models: Callable[..., Any]) -> None:
    """As `add_hook_to_module` of Hugging Face Accelerate leaves a module."""
    model, x = models("qwen3_5"), tokens()
    layer, calls = model.model.layers[0].linear_attn, []
    layer._old_forward = layer.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return layer._old_forward(*args, **kwargs)

    layer.forward = hooked
    before = model(x).logits
    with gdn.accelerate(model) as report:
        assert layer.forward is hooked
        assert layer._old_forward.__module__ == "gdn.hf.accelerate.forward"
        torch.testing.assert_close(model(x).logits, before)
        assert len(report.changed) == 11
    assert torch.equal(model(x).logits, before)
    assert len(calls) == 3


class QuiteAnotherGatedDeltaNet(nn.Module):
    pass


def test_refuses_what_it_does_not_know(models: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ArgumentError, match="Linear does not fit: it holds no gated delta rule layer"):
        gdn.accelerate(nn.Linear(2, 2))
    with pytest.raises(ArgumentError, match=r"QuiteAnotherGatedDeltaNet, which gdn.accelerate does not know"):
        gdn.accelerate(nn.Sequential(QuiteAnotherGatedDeltaNet()))
    model = models("qwen3_5")
    layer = model.model.layers[0].linear_attn
    layer.activation = "relu"
    with pytest.raises(ArgumentError, match='linear_attn: its convolution has the activation "relu"'):
        gdn.accelerate(model)
    layer.activation = "silu"
    layer.forward = lambda x: x
    with pytest.raises(ImplementationError, match="linear_attn: its forward has been replaced already, by test_accelerate"):
        gdn.accelerate(model)
    del layer.forward
    from transformers.models.qwen3_5 import modeling_qwen3_5

    monkeypatch.setattr(modeling_qwen3_5, "Qwen3_5RMSNormGated", QuiteAnotherGatedDeltaNet)
    with pytest.raises(ImplementationError, match=r"defines .*Qwen3_5RMSNormGated in a way that gdn.accelerate has not been checked"):
        gdn.accelerate(model)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_installed_transformers_is_one_that_was_checked(name: str) -> None:
    assert len(FAMILIES[name].sources) == 5
    check_sources(FAMILIES[name])


def test_refuses_packed_documents_with_a_cache_or_a_mask(models: Callable[..., Any]) -> None:
    model, x = models("qwen3_5"), tokens(1)
    gdn.accelerate(model)
    said = _ways_to_say_packed()["packing"]
    cache = model(x, use_cache=True)[CACHE]
    with pytest.raises(ArgumentError, match=rf"{CACHE}: cannot be given together with packed documents \(packing\)"):
        model(x, **{CACHE: cache}, **said())
    for module, other in ((model.model, "past_key_values"), (model.model.layers[0].linear_attn, "cache_params")):
        with pytest.raises(ArgumentError, match="cache: given twice"):
            module.forward(x, **{"cache": cache, other: cache})
    with pytest.raises(ArgumentError, match=r"use_cache: expected False with packed documents"):
        model(x, use_cache=True, **said())
    with pytest.raises(ArgumentError, match="attention_mask: cannot be given"):
        model(x, attention_mask=torch.tensor([[0] * 3 + [1] * 47]), **said())
    with pytest.raises(ArgumentError, match=r"seq_idx: expected \[1, 50\]"):
        model(x, seq_idx=torch.zeros(1, 49, dtype=torch.int32))
    whole = model(x, attention_mask=torch.ones_like(x), **said()).logits
    torch.testing.assert_close(whole, model(x, **said()).logits)
