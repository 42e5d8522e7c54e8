"""HGRN2 passes the mixer contract, and equals a literal transcription of the paper's layer in a stack that shares lower bounds."""

from __future__ import annotations

import copy

import pytest
import torch

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.base import Mixer
from gdn.mixers.hgrn2 import HGRN2
from gdn.models.lm import LM
from gdn.models.store import load_model, save_model
from gdn.testing.mixer_contract import MixerContract

Config = HGRN2.Config


class TestWithoutLowerBound(MixerContract):
    config = Config(head_dim=8, lower_bound=False)


class TestLowerBound(MixerContract):
    """The second of three layers: the first has no bound, so its own row means nothing to it."""

    config = Config(head_dim=6)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Mixer:
        mixer = super().build(dtype, seed)
        layers = [self.config.build(self.width).to(dtype), mixer, self.config.build(self.width).to(dtype)]
        mixer.join(layers)
        return mixer

    def test_config_and_weights_round_trip(self) -> None:
        """Bounds depend on other layers' weights: see `test_a_stored_model_is_the_same`."""


def literal_layer(mixer: HGRN2, x: torch.Tensor, bound: torch.Tensor) -> torch.Tensor:
    """The paper's layer for one sequence `[T, width]`, token by token, written without any of the library's operators."""
    weights, heads = dict(mixer.named_parameters()), mixer.heads
    q, f, i = (x @ weights["qfi_proj.weight"].T).chunk(3, dim=-1)
    q, f = q * torch.sigmoid(q), bound + (1 - bound) * torch.sigmoid(f)
    q, f, i = (t.unflatten(-1, (heads, -1)) for t in (q, f, i))
    state = torch.zeros(heads, i.shape[-1], f.shape[-1], dtype=x.dtype)  # value x key
    rows = []
    for t in range(len(x)):
        state = state * f[t][:, None, :] + i[t][:, :, None] * (1 - f[t])[:, None, :]
        rows.append(((state * q[t][:, None, :]).sum(-1) / f.shape[-1] ** 0.5).flatten())
    o = torch.stack(rows)
    return (o / torch.sqrt((o * o).mean(-1, keepdim=True) + mixer.config.norm_eps) * weights["o_norm.weight"]) @ weights["o_proj.weight"].T


def stack(layers: int = 3) -> LM:
    torch.manual_seed(0)
    model = LM(LM.Config(vocab=11, width=16, layers=layers, mlp=0, pattern=(Config(head_dim=8),)))
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.bound.normal_()
    return model


def test_equals_a_literal_transcription_of_the_paper() -> None:
    model = stack().double()
    mixers = [block.mixer for block in model.blocks]
    shares = torch.stack([m.bound for m in mixers]).softmax(0)
    bounds = shares.cumsum(0) - shares[0]
    x = torch.randn(40, 16, dtype=torch.float64)
    with torch.no_grad():
        for mixer, bound in zip(mixers, bounds):
            torch.testing.assert_close(mixer(x.unsqueeze(0))[0][0], literal_layer(mixer, x, bound), rtol=1e-9, atol=1e-11)


def test_lower_bounds_rise_evenly_at_the_start_and_are_learned() -> None:
    model = LM(LM.Config(vocab=11, width=16, layers=4, mlp=0, pattern=(Config(head_dim=8),)))
    mixers = [block.mixer for block in model.blocks]
    assert mixers[0].lower_bounds() is None
    for depth in (1, 2, 3):
        torch.testing.assert_close(mixers[depth].lower_bounds(), torch.full((16,), depth / 4))
    tokens = torch.randint(11, (2, 20))
    model(tokens, targets=tokens).loss.backward()
    assert all(bool(m.bound.grad.any()) for m in mixers)


def test_layers_of_other_kinds_do_not_count() -> None:
    pattern = (Config(head_dim=8), Config(head_dim=8, lower_bound=False))
    model = LM(LM.Config(vocab=11, width=16, layers=4, mlp=0, pattern=pattern))
    bounds = [block.mixer.lower_bounds() for block in model.blocks]
    assert bounds[0] is bounds[1] is bounds[3] is None
    torch.testing.assert_close(bounds[2], torch.full((16,), 0.5))


def test_a_stored_model_is_the_same(tmp_path) -> None:
    model, tokens = stack(), torch.randint(11, (2, 20))
    expected = model(tokens).logits
    save_model(model, tmp_path)
    assert torch.equal(load_model(tmp_path)(tokens).logits, expected)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(tokens).logits, expected)
    with torch.no_grad():
        model.blocks[0].mixer.bound.add_(torch.randn(16))
    assert not torch.equal(model(tokens).logits, expected), "a later layer does not see the first one's row"
    assert torch.equal(twin(tokens).logits, expected), "a copy shares rows with the original"


def test_has_the_published_size() -> None:
    d = 2048
    assert Config().num_parameters(d) == 4 * d * d + d + d
    assert Config().state_bytes(d, 1) == 4 * 128 * d


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="head_dim: expected a divisor of the width 200, got 128"):
        Config().build(200)
    mixer = Config(head_dim=8).build(16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(torch.randn(1, 4, 16), state=mixer.init_state(1), packing=Packing.from_lengths([4]))
