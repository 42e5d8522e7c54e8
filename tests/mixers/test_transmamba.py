"""TransMamba passes the mixer contract at several transpoints, equals a literal transcription, and its converter loses nothing."""

from __future__ import annotations

import math

import pytest
import torch

from gdn.core.errors import ArgumentError, ConfigError
from gdn.core.packing import Packing
from gdn.mixers.transmamba import PUBLISHED_SCHEDULE, TransMamba, convert, schedule
from gdn.models.lm import LM
from gdn.ops import linear_attention
from gdn.testing.mixer_contract import MixerContract

Config = TransMamba.Config


class TestSwitching(MixerContract):
    config = Config(heads=3, head_dim=6, transpoint=20)


class TestPureMamba(MixerContract):
    config = Config(heads=2, head_dim=8, transpoint=0, conv_bias=False)


class TestSwitchingLate(MixerContract):
    """The last pieces of the contract's splits cross the transpoint."""

    config = Config(heads=2, head_dim=8, transpoint=71, rope_fraction=0.5)


def literal_layer(mixer: TransMamba, u: torch.Tensor) -> torch.Tensor:
    """Token by token: softmax attention up to the transpoint; then Mamba2 from a memory that is the converter's sum as it is printed."""
    c, weights = mixer.config, dict(mixer.named_parameters())
    batch, length, _ = u.shape
    width, inner = c.head_dim, c.inner
    z = u @ weights["qkv_proj.weight"].T
    mixed = torch.zeros_like(z) + weights["conv.bias"]
    for t in range(length):
        for tap in range(min(t + 1, c.conv_size)):
            mixed[:, t] += weights["conv.weight"][:, -1 - tap] * z[:, t - tap]
    c_, b_, x_ = (mixed * torch.sigmoid(mixed)).split(inner, dim=-1)
    dt = torch.log1p(torch.exp(u @ weights["dt_proj.weight"].T + weights["dt_bias"]))
    decay = torch.exp(-torch.exp(weights["A_log"]) * dt)
    gate = u @ weights["z_proj.weight"].T
    y = torch.zeros(batch, length, inner, dtype=u.dtype)

    def turned(vector: torch.Tensor, position: int) -> torch.Tensor:
        out = vector.clone()
        for i in range(width // 2):
            angle = position * c.rope_base ** (-2 * i / width)
            out[i] = vector[i] * math.cos(angle) - vector[i + width // 2] * math.sin(angle)
            out[i + width // 2] = vector[i + width // 2] * math.cos(angle) + vector[i] * math.sin(angle)
        return out

    for n in range(batch):
        for h in range(c.heads):
            here = slice(h * width, (h + 1) * width)
            q, k, v = c_[n, :, here], b_[n, :, here], x_[n, :, here]
            for t in range(min(c.transpoint, length)):
                query = turned(q[t], t)
                weight = torch.stack([query @ turned(k[s], s) / math.sqrt(width) for s in range(t + 1)]).softmax(0)
                y[n, t, here] = weight @ v[: t + 1]
            memory = torch.zeros(width, width, dtype=u.dtype)
            for t in range(min(c.transpoint, length)):
                later = decay[n, t + 1 : c.transpoint, h].prod()
                memory += later * torch.outer(dt[n, t, h] * v[t], k[t])
            for t in range(c.transpoint, length):
                memory = decay[n, t, h] * memory + torch.outer(dt[n, t, h] * v[t], k[t])
                y[n, t, here] = memory @ q[t] + weights["D"][h] * v[t]
    after = y[:, c.transpoint :] * gate[:, c.transpoint :] * torch.sigmoid(gate[:, c.transpoint :])
    y[:, c.transpoint :] = after / torch.sqrt((after * after).mean(-1, keepdim=True) + c.norm_eps) * weights["norm.weight"]
    return y @ weights["o_proj.weight"].T


@pytest.mark.parametrize("transpoint", [0, 4, 30])
def test_equals_a_literal_transcription_of_the_paper(transpoint: int) -> None:
    torch.manual_seed(0)
    mixer = Config(heads=2, head_dim=4, transpoint=transpoint).build(12).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        x = torch.randn(2, 9, 12, dtype=torch.float64)
        torch.testing.assert_close(mixer(x)[0], literal_layer(mixer, x), rtol=1e-10, atol=1e-12)


def test_the_converter_makes_the_memory_of_mamba2() -> None:
    torch.manual_seed(0)
    k, v = (torch.randn(2, 300, 3, 5, dtype=torch.float64) for _ in range(2))
    g, start = -torch.rand(2, 300, 3, dtype=torch.float64), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    expected = linear_attention(k, k, v, g, initial_state=start)[1]
    torch.testing.assert_close(convert(k, v, g, start), expected, rtol=1e-14, atol=1e-14)
    with torch.autocast("cpu", torch.bfloat16):
        single = convert(k.float(), v.float(), g.float(), start.float())
    assert (single - expected).norm() / expected.norm() < 1e-6


def test_the_converter_keeps_what_comes_after_strong_forgetting() -> None:
    """In float32 a running sum from the front would be near -60 000 here, where neighbours are 0.004 apart."""
    torch.manual_seed(0)
    g = torch.full((1, 1000, 1), -60.0)
    g[:, -50:] = -0.01 * torch.rand(1, 50, 1)
    k, v = torch.randn(1, 1000, 1, 4), torch.randn(1, 1000, 1, 4)
    exact = convert(k.double(), v.double(), g.double())
    assert (convert(k, v, g) - exact).norm() / exact.norm() < 1e-6


def test_the_cache_goes_when_the_shortest_sequence_switches() -> None:
    mixer = Config(heads=2, head_dim=4, transpoint=6).build(8).double()
    x, y = torch.randn(1, 9, 8, dtype=torch.float64), torch.randn(1, 9, 8, dtype=torch.float64)
    mask = torch.arange(5) >= torch.tensor([[0], [3]])
    with torch.no_grad():
        expected = torch.cat([mixer(x)[0], mixer(y)[0][:, :6]], 1)
        state = mixer.init_state(2)
        first = mixer(torch.cat([x[:, :5], torch.cat([x[:, :3] + 9, y[:, :2]], 1)]), state=state, mask=mask)[0]
        steps = []
        for t in range(4):
            assert state["keys"].shape[1] == 6
            steps.append(mixer(torch.cat([x[:, 5 + t : 6 + t], y[:, 2 + t : 3 + t]]), state=state)[0])
        assert state["seen"].tolist() == [9, 6]
        assert state["keys"].shape == state["values"].shape == (2, 0, 2, 4)
    torch.testing.assert_close(torch.cat([first[:1], *(s[:1] for s in steps), first[1:, 3:], *(s[1:] for s in steps)], 1), expected)


def test_has_the_parameters_of_the_papers_equations_counted_by_hand() -> None:
    """Width 10, three heads of 4 channels, so 12 channels of each of C, B and x, which attention reads as Q, K and V; its own are none."""
    c, b, x = 10 * 12, 10 * 12, 10 * 12  # C = silu(conv(H W_C)), and so B and x
    conv = 36 * (4 + 1)  # four taps and a bias for each of their channels
    time_step = 10 * 3 + 3  # one for each head: softplus(H W + bias)
    a, d = 3, 3  # one for each head
    gate, norm, out = 10 * 12, 12, 12 * 10  # silu(H W_z), the scale of the norm after it, and back to the width
    assert c + b + x + conv + time_step + a + d + gate + norm + out == 831
    for transpoint in (0, 20, 1 << 20):  # all Mamba2, switching, all attention: one set of parameters
        config = Config(heads=3, head_dim=4, transpoint=transpoint)
        assert sum(p.numel() for p in config.build(10).parameters()) == config.num_parameters(10) == 831


def test_a_schedule_is_a_pattern_of_layers() -> None:
    assert [c.transpoint for c in schedule(PUBLISHED_SCHEDULE)] == [0, 128, 256, 512, 1024, 2048, 4096, 8192]
    model = LM(LM.Config(vocab=11, width=16, layers=4, mlp=16, pattern=schedule((0, 9, 40), Config(heads=2, head_dim=8)))).double()
    assert [block.mixer.config.transpoint for block in model.blocks] == [0, 9, 40, 0]
    tokens = torch.randint(11, (2, 30))
    with torch.no_grad():
        whole, state = model(tokens).logits, model.init_state(2)
        pieces = [model(piece, state=state).logits for piece in tokens.split([7, 1, 1, 1, 20], dim=1)]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-8, atol=1e-9)


def test_initial_gates_are_mamba2s() -> None:
    torch.manual_seed(0)
    mixer = Config(heads=512, head_dim=2).build(4)
    assert mixer.A_log.exp().min() >= 1
    assert 8 < mixer.A_log.exp().mean() < 9
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert dt.min() >= 0.99e-3
    assert dt.max() <= 0.101
    assert torch.equal(mixer.D, torch.ones(512))
    assert all(p._no_weight_decay for p in (mixer.A_log, mixer.dt_bias, mixer.D))


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="transpoint: expected at least 0, got -1"):
        Config(transpoint=-1)
    with pytest.raises(ConfigError, match=r"dt_range: expected 0 < low < high, got \(0.1, 0.01\)"):
        Config(dt_range=(0.1, 0.01))
    mixer, x = Config(heads=2, head_dim=8).build(16), torch.randn(1, 4, 16)
    with pytest.raises(ArgumentError, match="state: cannot be given together with packing"):
        mixer(x, state=mixer.init_state(1), packing=Packing.from_lengths([4]))
