"""The language model: published sizes, modes that agree, losses, compilation, storage."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from gdn.core.errors import ArgumentError, CheckpointError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.attention import Attention
from gdn.mixers.base import MixerConfig
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.mixers.hgrn2 import HGRN2
from gdn.models import block
from gdn.models.lm import LM
from gdn.models.sampling import Sampling, draw, generate, prefill
from gdn.models.sizes import size
from gdn.models.store import load_model, save_model
from gdn.nn import norm as nn_norm
from gdn.ops import add_rms_norm

TINY = LM.Config(vocab=17, width=24, layers=3, mlp=32, pattern=(GatedDeltaNet.Config(heads=2, head_dim=8),))


def tiny(seed: int = 0, config: LM.Config = TINY) -> LM:
    torch.manual_seed(seed)
    return LM(config)


def tokens(batch: int = 2, length: int = 50, vocab: int = 17) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    ("name", "official", "unused"),
    # NVlabs/GatedDeltaNet (lit_gpt/gated_delta_net.py) creates a parameter `D` of one scalar a head in each layer and reads it only with
    # `use_residual`, which no published configuration sets: 9 heads, 11 and 16 layers. Nothing but these scalars is left out here.
    [("gdn_0.4b", 516_838_028, 9 * 11), ("gdn_1.3b", 1_309_295_776, 9 * 16)],
)
def test_published_sizes_have_the_official_number_of_parameters(name: str, official: int, unused: int) -> None:
    config = size(name)
    with torch.device("meta"):
        model = LM(config)
    assert unused == sum(mixer.heads for mixer in config.mixers if isinstance(mixer, GatedDeltaNet.Config))
    assert sum(p.numel() for p in model.parameters()) == config.num_parameters() == official - unused


@pytest.mark.parametrize("asked", ["loss", "logits"])
def test_torch_finds_the_tensor_of_an_output(asked: str) -> None:
    """As FSDP looks for what its hooks go on."""
    output = tiny()(tokens(), targets=tokens() if asked == "loss" else None)
    assert [leaf for leaf in tree_leaves(output) if leaf is not None] == [getattr(output, asked)]


def test_declared_parameters_equal_those_built() -> None:
    for config in (TINY, TINY.with_(tie_embeddings=False), TINY.with_(mlp=0), size("gdn_d4"), size("gdn_d9"), size("gdn_d17")):
        with torch.device("meta"):
            model = LM(config)
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters()
        embeddings = config.vocab * config.width * (1 if config.tie_embeddings else 2)
        assert config.num_parameters(embeddings=False) == config.num_parameters() - embeddings


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r'Did you mean "gdn_1.3b"'):
        size("gdn_1.4b")


def test_config_round_trips_through_json() -> None:
    for config in (TINY, size("gdn_0.4b")):
        assert LM.Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    broken = TINY.to_dict()
    broken["pattern"][0]["head_dims"] = 4
    with pytest.raises(ConfigError, match=r'pattern.0.head_dims: unknown field.*Did you mean "head_dim"'):
        LM.Config.from_dict(broken)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, x = tiny(), tokens()
    targets = x.roll(-1, 1)
    targets[:, -1] = -100
    loss = model(x, targets=targets).loss
    torch.testing.assert_close(loss, F.cross_entropy(model(x).logits.flatten(0, 1), targets.flatten(), ignore_index=-100))
    assert abs(float(loss.detach()) - math.log(17)) < 0.2


def test_prefill_in_pieces_and_decoding_equal_the_whole() -> None:
    model, x = tiny().double(), tokens()
    whole = model(x).logits
    for a, b in ((1, 30), (30, 31), (0, 50)):
        state, parts = model.init_state(2), []
        with torch.no_grad():
            for piece in (x[:, :a], x[:, a:b], *x[:, b:].split(1, dim=1)):
                if piece.shape[1]:
                    out = model(piece, state=state)
                    state, _ = out.state, parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-8, atol=1e-9)
        assert state.length == 50


def test_packed_rows_equal_separate_documents() -> None:
    model, x = tiny().double(), tokens(1, 60)
    packed = model(x, packing=Packing.from_lengths([7, 33, 20])).logits
    separate = torch.cat([model(piece).logits for piece in x.split([7, 33, 20], dim=1)], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-8, atol=1e-9)


def test_left_padding_changes_nothing() -> None:
    model, x = tiny().double(), tokens(1, 20)
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.int64), x], 1)
    mask = torch.arange(29).unsqueeze(0) >= 9
    torch.testing.assert_close(model(padded, mask=mask).logits[:, 9:], model(x).logits, rtol=1e-8, atol=1e-9)


def test_recomputing_blocks_changes_no_gradient() -> None:
    grads = []
    for recompute in ("none", "block"):
        model, x = tiny(), tokens()
        model.recompute = recompute
        model(x, targets=x).loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


HOOKED = {"nothing": (), "a block": ("blocks.1",), "norms": ("blocks.0.mlp_norm", "blocks.2.mixer_norm", "norm")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hooked", HOOKED)
def test_additions_go_with_the_norms_after_them(hooked: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first norm of three blocks and the last one; where somebody listens to a block or a norm, it is called with the sum."""
    model, x = tiny().to(dtype), tokens()
    plain, norms = model.embedding(x), []  # with gradients as below: torch multiplies in another way where nothing needs one
    for each in model._blocks():
        plain = each(plain)[0]
        norms.append(plain)
    expected = model.norm(plain)
    joined: list[torch.Tensor] = []
    monkeypatch.setattr(nn_norm, "add_rms_norm", lambda *args, **named: (joined.append(args[0]), add_rms_norm(*args, **named))[1])
    heard: dict[str, torch.Tensor] = {}
    for name in HOOKED[hooked]:
        model.get_submodule(name).register_forward_hook(lambda module, given, result, name=name: heard.update({name: (given[0], result)}))
    assert torch.equal(model.hidden(x)[0], expected)
    assert len(joined) == {"nothing": 6, "a block": 4, "norms": 3}[hooked]
    assert set(heard) == set(HOOKED[hooked])
    if hooked == "a block":
        assert torch.equal(heard["blocks.1"][0], norms[0]) and torch.equal(heard["blocks.1"][1][0], norms[1])
    if hooked == "norms":
        assert torch.equal(heard["norm"][0], norms[2]) and torch.equal(heard["norm"][1], expected)


@pytest.mark.parametrize(("packed", "way"), [(False, "whole"), (True, "whole"), (True, "blocks")])
def test_compiled_training_step_has_the_loss_of_eager(packed: bool, way: str) -> None:
    """One whole graph, forward and backward, or one for each block, through the default compiler."""
    x = tokens()
    packing = Packing.from_lengths([30, 20, 50]) if packed else None
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = tiny()
        step = torch.compile(model, fullgraph=True) if compiled and way == "whole" else model
        if compiled and way == "blocks":
            model.compile_blocks()
        loss = step(x, targets=x, packing=packing).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-5, atol=1e-6)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The number of MLPs in each graph that the compiler makes."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        made.append(sum("swiglu" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    block._compiled_terms.cache_clear()
    torch._dynamo.reset()
    yield made
    block._compiled_terms.cache_clear()


def test_equal_blocks_are_compiled_once(graphs: list[int]) -> None:
    """The first block, which has one term, as the others; where they are of several kinds or layers know each other, the whole model."""
    one, other = (GatedDeltaNet.Config(heads=heads, head_dim=8) for heads in (1, 2))
    hgrn2 = HGRN2.Config(head_dim=16)
    after = (one.tag(),)
    for pattern, layers, norm_after, expected in (
        ((one,), 5, (), [1]),
        ((one,), 5, after, [1]),
        ((one, other), 4, (), [4]),
        ((hgrn2,), 3, (), [3]),
    ):
        torch._dynamo.reset()
        graphs.clear()
        model = LM(LM.Config(vocab=13, width=32, layers=layers, mlp=16, pattern=pattern, norm_after=norm_after))
        x = torch.randint(13, (2, 20))
        expected_loss = model(x, targets=x).loss
        model.compile_blocks()
        torch.testing.assert_close(model(x, targets=x).loss, expected_loss)
        assert graphs == expected


def test_a_run_of_packed_batches_stays_compiled(graphs: list[int]) -> None:
    """Other documents, one document, and both without gradients: the compiler gives up past eight versions, here with an error."""
    model, plain = tiny(), tiny()
    model.compile_blocks()
    for lengths in ([30, 20, 50], [40, 60], [100], [33, 67], [10, 10, 20, 60]):
        x, packing = tokens(1, sum(lengths)), Packing.from_lengths(lengths)
        torch.testing.assert_close(model(x, targets=x, packing=packing).loss, plain(x, targets=x, packing=packing).loss)
        with torch.no_grad():
            model(x, targets=x, packing=packing)
    assert 0 < len(graphs) <= 8


@pytest.mark.parametrize("part", ["mlp", "mixer_norm", "mixer.o_proj"])
def test_blocks_compiled_alike_are_not_where_somebody_listens_to_a_part(part: str, graphs: list[int]) -> None:
    """The compiler does not look for hooks of a later block when it takes what was compiled for the first."""
    model, x = tiny(), tokens()
    model.blocks[1].get_submodule(part).register_forward_hook(lambda module, given, result: 3 * result)
    expected = model(x, targets=x).loss
    model.compile_blocks()
    torch.testing.assert_close(model(x, targets=x).loss, expected)
    assert graphs == [3]


def test_compiled_blocks_in_a_compiled_model_are_one_graph(graphs: list[int]) -> None:
    model, x = tiny(), tokens()
    expected = model(x, targets=x).loss
    model.compile_blocks()
    torch.testing.assert_close(torch.compile(model)(x, targets=x).loss, expected)
    assert graphs == [3]


def test_state_does_not_grow_and_is_as_declared() -> None:
    model = tiny()
    state = model.init_state(2)
    before = state.nbytes
    assert before == 2 * TINY.state_bytes(1)
    addresses = [t.data_ptr() for layer in state.layers for t in layer.tensors.values()]
    with torch.no_grad():
        for piece in tokens().split(1, dim=1):
            state = model(piece, state=state).state
    assert state.nbytes == before
    assert addresses == [t.data_ptr() for layer in state.layers for t in layer.tensors.values()]


def test_greedy_generation_is_the_argmax_of_the_whole_text() -> None:
    model, prompt = tiny().double().eval(), tokens(1, 5)
    stream = generate(model, prompt, Sampling(temperature=0))
    text = prompt
    for _ in range(12):
        expected = model(text).logits[:, -1].argmax(-1)
        got = next(stream)
        assert torch.equal(got, expected)
        text = torch.cat([text, got.unsqueeze(1)], 1)


def test_a_long_prompt_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompt = tiny().double(), tokens(1, 50)
    whole = prefill(model, prompt, model.init_state(1))
    monkeypatch.setattr("gdn.models.sampling.PREFILL", 16)
    state = model.init_state(1)
    torch.testing.assert_close(prefill(model, prompt, state), whole, rtol=1e-9, atol=1e-9)
    assert state.length == 50


def test_draws_obey_top_k_top_p_and_seed() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log().expand(4000, 4)
    for sampling, allowed in ((Sampling(temperature=1, top_p=1, top_k=2), {0, 1}), (Sampling(temperature=1, top_p=0.8), {0, 1, 2})):
        drawn = draw(logits, sampling, torch.Generator().manual_seed(0))
        assert set(drawn.tolist()) == allowed
    free = Sampling(temperature=1, top_p=1)
    drawn = draw(logits, free, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 4000
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.25, 0.15, 0.1]), rtol=0, atol=0.03)
    assert torch.equal(drawn, draw(logits, free, torch.Generator().manual_seed(0)))
    assert not torch.equal(drawn, draw(logits, free, torch.Generator().manual_seed(1)))
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(temperature=-1)
    with pytest.raises(ArgumentError, match="prompt"):
        next(generate(tiny(), torch.zeros(1, 0, dtype=torch.int64)))


def test_a_stored_model_is_the_same_and_damage_is_named(tmp_path) -> None:
    model = tiny()
    save_model(model, tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert again.config == model.config
    assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    half = load_model(tmp_path / "m", dtype=torch.bfloat16)
    assert half.blocks[0].mixer.A_log.dtype == torch.float32
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"width": 32}))
    with pytest.raises(CheckpointError, match="does not fit its config"):
        load_model(tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        load_model(tmp_path)


def test_padding_on_the_right_is_refused() -> None:
    """It would be read as tokens of nothing, and the state would stand behind it."""
    model = LM(LM.Config(vocab=11, width=16, layers=1, mlp=0, pattern=(GatedDeltaNet.Config(heads=2, head_dim=8),)))
    mask = torch.tensor([[False, True, True], [True, True, False]])
    with pytest.raises(ArgumentError, match="mask: expected padding on the left only, row 1 has a token before padding"):
        model(torch.zeros(2, 3, dtype=torch.int64), mask=mask)


@pytest.mark.parametrize("mask", [torch.ones(2, 7, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool)], ids=["numbers", "short"])
@pytest.mark.parametrize("mixer", [Attention.Config(heads=2, head_dim=8), GatedDeltaNet.Config(heads=2, head_dim=8)], ids=lambda m: m.tag())
def test_a_mask_is_bool_and_as_large_as_the_tokens(mixer: MixerConfig, mask: torch.Tensor) -> None:
    """Numbers, as tokenizers give them, would be counted as padding the wrong way round."""
    model = LM(LM.Config(vocab=11, width=16, layers=1, mlp=0, pattern=(mixer,)))
    with pytest.raises(ArgumentError, match=r"mask: expected bool \[2, 7\], got (int64 \[2, 7\]|bool \[2, 6\])"):
        model(torch.zeros(2, 7, dtype=torch.int64), mask=mask)
