"""Generation through transformers: every decoding mode agrees with the whole text read at once, and rollback leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from small import MIXERS, causal, tokens
from torch.nn import functional as F
from transformers import DynamicCache

from gdn.core.errors import ArgumentError
from gdn.hf import GdnCache, GdnForCausalLM, GdnStaticCache
from gdn.hf.names import CACHE

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def greedy(model: GdnForCausalLM, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """The likeliest token after the whole text, read anew each time."""
    text = prompt
    with torch.no_grad():
        for _ in range(new):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return text


@pytest.mark.parametrize("mixers", MIXERS)
def test_any_split_into_prefills_and_steps_gives_the_same_logits(mixers: str) -> None:
    model, x = causal(mixers).double(), tokens(2, 40)
    with torch.no_grad():
        whole = model(x, use_cache=False).logits
        for pieces in ([40], [1] * 40, [10, 20, 10], [33, 1, 1, 1, 4], [9, 8, 1, 22]):
            cache, logits = GdnCache(), []
            for piece in x.split(pieces, dim=1):
                logits.append(model(piece, past_key_values=cache).logits)
            torch.testing.assert_close(torch.cat(logits, 1), whole, **EXACT)
            assert cache.get_seq_length() == 40


@pytest.mark.parametrize("mixers", MIXERS)
def test_greedy_sampling_and_padded_prompts(mixers: str) -> None:
    model = causal(mixers).double()
    prompts = [tokens(1, n, seed=n) for n in (3, 8)]
    expected = [greedy(model, p, 8)[0, -8:] for p in prompts]
    x = torch.cat([F.pad(p, (8 - p.shape[1], 0)) for p in prompts])
    mask = torch.cat([F.pad(torch.ones_like(p), (8 - p.shape[1], 0)) for p in prompts])
    for cached in (True, False):
        got = model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=False, use_cache=cached)
        assert torch.equal(got[:, -8:], torch.stack(expected))
    drawn = []
    for cached in (True, False):
        torch.manual_seed(0)
        drawn.append(model.generate(x, attention_mask=mask, max_new_tokens=8, do_sample=True, top_k=5, use_cache=cached))
    assert torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("mixers", MIXERS)
def test_beams_are_those_found_without_a_cache(mixers: str) -> None:
    model, x = causal(mixers).double(), tokens(2, 6)
    beams = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 3, "do_sample": False, "output_scores": True}
    cached, without = (
        model.generate(x, return_dict_in_generate=True, use_cache=use, **beams)  # type: ignore[arg-type]
        for use in (True, False)
    )
    assert torch.equal(cached.sequences, without.sequences)
    torch.testing.assert_close(cached.sequences_scores, without.sequences_scores)
    assert len({tuple(s.tolist()) for s in cached.sequences}) > 2


@torch.no_grad()
def contrastive(model: GdnForCausalLM, ids: torch.Tensor, *, cached: bool, **kwargs: Any) -> torch.Tensor:
    """Contrastive search (arXiv 2202.06417): of the likeliest tokens the one whose hidden state is least like those before it."""
    out, candidates, alpha = model(ids, use_cache=True, output_hidden_states=True), 4, 0.6
    cache, seen, logits = out[CACHE], out.hidden_states[-1], out.logits[:, -1]
    for _ in range(kwargs["generation_config"].max_new_tokens):
        chance, tried = logits.softmax(-1).topk(candidates, -1)
        token = tried.reshape(-1, 1)
        if cached:
            cache.batch_repeat_interleave(candidates)
            out = model(token, past_key_values=cache, output_hidden_states=True)
        else:
            out = model(torch.cat([ids.repeat_interleave(candidates, 0), token], 1), use_cache=False, output_hidden_states=True)
        hidden, after = out.hidden_states[-1][:, -1:], out.logits[:, -1]
        alike = F.cosine_similarity(seen.repeat_interleave(candidates, 0), hidden, dim=-1).amax(1).view_as(chance)
        chosen = torch.arange(len(ids)) * candidates + ((1 - alpha) * chance - alpha * alike).argmax(-1)
        if cached:
            cache.batch_select_indices(chosen)
        ids, seen, logits = torch.cat([ids, token[chosen]], 1), torch.cat([seen, hidden[chosen]], 1), after[chosen]
    return ids


@pytest.mark.parametrize("mixers", ["gated_deltanet", "hybrid"])
def test_contrastive_search_tries_tokens_on_copies_of_a_cache(mixers: str) -> None:
    model, x = causal(mixers).double(), tokens(2, 6)
    found = [model.generate(x, custom_generate=contrastive, cached=cached, max_new_tokens=12) for cached in (True, False)]
    assert torch.equal(*found)
    assert not torch.equal(found[0], model.generate(x, max_new_tokens=12, do_sample=False))


def near(model: GdnForCausalLM, noise: float, seed: int) -> GdnForCausalLM:
    """A model that often, not always, agrees."""
    other = GdnForCausalLM(model.config).to(model.dtype).eval()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(noise * parameter.abs().mean() * torch.randn_like(parameter))
    return other


def test_assisted_decoding_gives_exactly_the_tokens_of_greedy_decoding_in_200_cases() -> None:
    new, cases, accepted, rejected = 6, 0, 0, 0
    for mixers, layers, seeds in (("gated_deltanet", 1, 4), ("hybrid", 3, 1)):
        for seed in range(seeds):
            model = causal(mixers, seed=seed, num_hidden_layers=layers).double()
            with torch.no_grad():
                model.lm.embedding.weight.mul_(8)  # so that the text does not fall into a loop of one token
            helper = near(model, 0.4, seed)
            helper.generation_config.num_assistant_tokens = 2 + seed
            helper.generation_config.assistant_confidence_threshold = 0.0
            for length in (1, 4, 9, 17):
                prompts = tokens(10, length, seed=100 * seed + length)
                expected = model.generate(prompts, max_new_tokens=new, do_sample=False)
                for prompt, text in zip(prompts, expected):
                    cache, crops = Counting(), []
                    cache.crops = crops
                    got = model.generate(
                        prompt[None], max_new_tokens=new, do_sample=False, assistant_model=helper, use_cache=True, **{CACHE: cache}
                    )
                    assert torch.equal(got[0], text), (mixers, seed, length)
                    assert cache.get_seq_length() == length + new - 1
                    cases += 1
                    rejected += sum(n < 0 for n in crops)
                    accepted += new - len(crops)
    assert cases >= 200
    assert rejected > 50, "hardly ever was something taken back"
    assert accepted > 50, "hardly ever was something accepted"


class Counting(GdnCache):
    """Notes what is taken back."""

    crops: list[int]

    def crop(self, tokens_to_remove: int) -> None:
        self.crops.append(tokens_to_remove)
        super().crop(tokens_to_remove)


@pytest.mark.parametrize("mixers", MIXERS)
def test_what_was_taken_back_leaves_no_trace(mixers: str) -> None:
    model, x = causal(mixers).double(), tokens(2, 40)
    with torch.no_grad():
        for before, after, back in ((20, 7, 3), (1, 12, 12), (9, 20, 1), (20, 20, 19)):
            fresh, cache = GdnCache(), GdnCache()
            for c in (fresh, cache):
                model(x[:, :before], past_key_values=c)
            cache.activate_past_recording()
            model(x[:, before : before + after], past_key_values=cache)
            cache.crop(-back)
            if after > back:
                model(x[:, before : before + after - back], past_key_values=fresh)
            assert cache.get_seq_length() == fresh.get_seq_length() == before + after - back
            for mine, theirs in zip(cache.state.layers, fresh.state.layers):
                for name in mine:
                    torch.testing.assert_close(mine[name], theirs[name], **EXACT)
    prompt = torch.cat([x[:1, :8]] * 3, dim=1)
    expected = model.generate(prompt, max_new_tokens=10, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=10, do_sample=False, prompt_lookup_num_tokens=4), expected)


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")  # by transformers 5.24; it works
def test_a_cache_goes_on_between_calls_and_sequences_can_be_chosen() -> None:
    model, x = causal().double(), tokens(2, 10)
    expected = model.generate(x, max_new_tokens=10, do_sample=False)
    first = model.generate(x, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    assert first[CACHE].get_seq_length() == 13
    rest = model.generate(first.sequences, max_new_tokens=6, do_sample=False, **{CACHE: first[CACHE]})
    assert torch.equal(rest, expected)
    for name in ("past_key_values", "cache"):
        warmed = GdnCache()
        with torch.no_grad():
            model(x[:, :-1], **{name: warmed})
        assert torch.equal(model.generate(x, max_new_tokens=10, do_sample=False, **{name: warmed}), expected)
        assert warmed.get_seq_length() == 19
    cache = GdnCache()
    with torch.no_grad():
        model(x, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        cache.batch_select_indices(torch.tensor([3]))
        got = model(x[1:, :3], past_key_values=cache).logits
        torch.testing.assert_close(got, model(torch.cat([x[1:], x[1:, :3]], 1)).logits[:, -3:], **EXACT)
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("mixers", ["gated_deltanet", "hybrid"])
def test_static_decoding_gives_the_same_tokens_from_padded_prompts_too(mixers: str) -> None:
    model, x = causal(mixers).double(), tokens(3, 9)
    mask = torch.ones_like(x)
    mask[0, :4] = mask[2, :1] = 0
    masks: list[torch.Tensor | None] = []
    for given in ({}, {"attention_mask": mask}):
        expected = model.generate(x, max_new_tokens=9, do_sample=False, **given)
        heard = model.register_forward_pre_hook(lambda module, inputs, named: masks.append(named.get("attention_mask")), with_kwargs=True)
        assert torch.equal(model.generate(x, max_new_tokens=9, do_sample=False, cache_implementation="static", **given), expected)
        heard.remove()
    assert len(masks) == 18 and all(said is None for said in masks[1:9] + masks[10:])  # one that grows would make each step another graph


@pytest.mark.parametrize("mixers", ["gated_deltanet", "hybrid"])
def test_one_compiled_graph_serves_every_step_at_addresses_that_stay(mixers: str) -> None:
    model, x, cache = causal(mixers), tokens(2, 20), GdnStaticCache(20)
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
        model(x[:, :5], past_key_values=cache)
        pieces = [model(x[:, 5:12], past_key_values=cache).logits]  # more tokens at once, of a text already begun
        addresses = [t.data_ptr() for layer in cache.state.layers for t in layer.tensors.values()]
        torch.compiler.reset()
        graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        run = torch.compile(model.forward, fullgraph=True, backend=graphs)
        pieces += [run(token, past_key_values=cache).logits for token in x[:, 12:].split(1, dim=1)]
        assert graphs.frame_count == 1
        torch.testing.assert_close(torch.cat(pieces, 1), expected[:, 5:])
        assert addresses == [t.data_ptr() for layer in cache.state.layers for t in layer.tensors.values()]
        assert int(cache.get_seq_length()) == cache.state.length == 20
        if mixers == "hybrid":
            for more in (1, 2):
                with pytest.raises(ArgumentError, match="room for 20 tokens"):
                    model(x[:, :more], past_key_values=cache)


def test_what_cannot_be_is_refused() -> None:
    model, x = causal(), tokens(1, 10)
    cache = GdnCache()
    model(x, past_key_values=cache)
    with pytest.raises(ArgumentError, match=r"record\(\)"):
        cache.crop(-1)
    with pytest.raises(ArgumentError, match="minus the number"):
        cache.crop(1)
    cache.activate_past_recording()
    model(x[:, :2], past_key_values=cache)
    with pytest.raises(ArgumentError, match="expected 0 to 2"):
        cache.crop(-3)
    with pytest.raises(ArgumentError, match="another model"):
        causal(seed=1)(x, past_key_values=cache)
    with pytest.raises(ArgumentError, match="cache_implementation"):
        model.generate(x, max_new_tokens=2, cache_implementation="offloaded")
    with pytest.raises(ArgumentError, match="room: expected None, TransMamba"):
        causal("others").generate(x, max_new_tokens=2, cache_implementation="static")
    static = GdnStaticCache(12)
    with pytest.raises(ArgumentError, match="no_grad"):
        model(x, past_key_values=static)
    with torch.no_grad(), pytest.raises(ArgumentError, match="room for 12 tokens"):
        causal("hybrid")(tokens(1, 13), past_key_values=static)
    with pytest.raises(ArgumentError, match="expected a GdnCache, got DynamicCache"):
        model(x, past_key_values=DynamicCache())
