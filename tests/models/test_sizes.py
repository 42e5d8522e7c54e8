"""Hybrids and baselines have the published number of parameters, and are patterns of mixers."""

from __future__ import annotations

import pytest
import torch

from gdn.mixers.attention import Attention
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.models.sizes import SIZES, size

EMBEDDING = 32000


@pytest.mark.parametrize(
    ("name", "official", "unused"),
    # NVlabs/GatedDeltaNet creates nine unused scalars in each Gated DeltaNet layer, which this library leaves out.
    [("gdn_h1_0.4b", 530_765_016, 9 * 6), ("gdn_h1_1.3b", 1_316_608_452, 9 * 9)],
)
def test_hybrids_have_the_official_number_of_parameters(name: str, official: int, unused: int) -> None:
    assert parameters(size(name)) == official - unused


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("transformer_340m", 341_099_520),
        ("transformer_1.3b", 1_298_761_728),
        ("deltanet_sliding_340m", 374_362_112 - 12 * (4 * 1024 * 3 + 128 + 8 * 1024)),
        ("deltanet_global_340m", 374_362_112 - 2 * (4 * 1024 * 3 + 128 + 8 * 1024)),
    ],
)
def test_baselines_have_the_published_number_of_parameters(name: str, count: int) -> None:
    assert parameters(size(name)) == count


@pytest.mark.parametrize(
    ("budget", "width", "gdn", "others"),
    # Per cent more than Gated DeltaNet: Transformer++, DeltaNet, Mamba2 without and with an MLP.
    [
        ("6m", 256, 5_930_038, (0.6, 1.1, 2.0, 6.8)),
        ("32m", 512, 31_541_832, (-2.7, -2.5, -1.8, 3.5)),
        ("99m", 768, 99_280_236, (-0.2, 0.0, -1.4, 2.6)),
        ("269m", 1024, 269_444_932, (0.1, 0.3, 0.4, 1.9)),
    ],
)
def test_the_ladder_is_matched_in_parameters(budget: str, width: int, gdn: int, others: tuple[float, ...]) -> None:
    assert parameters(size(f"gdn_{budget}")) - EMBEDDING * width == gdn
    for family, more in zip(("transformer", "deltanet", "mamba2", "mamba2_mlp"), others):
        count = parameters(size(f"{family}_{budget}")) - EMBEDDING * width
        assert round(100 * (count / gdn - 1), 1) == more, family


def test_samba_with_mamba2_is_near_sambas_size() -> None:
    config = size("samba_mamba2_0.4b")
    assert [mixer.tag() for mixer in config.mixers] == 6 * ["mamba2", "attention"]
    assert abs(parameters(config) / 421.8e6 - 1) < 0.005


def test_the_unit_of_h2_is_mamba2_gated_deltanet_attention() -> None:
    config = size("gdn_h2_1.3b")
    assert [mixer.tag() for mixer in config.mixers] == 6 * ["mamba2", "gated_deltanet", "attention"]
    assert parameters(config) == 1_352_959_410


def parameters(config: LM.Config) -> int:
    """Of the model as built, which must be as declared."""
    with torch.device("meta"):
        built = sum(p.numel() for p in LM(config).parameters())
    assert built == config.num_parameters()
    return built


def test_attention_stands_where_the_papers_put_it() -> None:
    def places(name: str) -> list[int]:
        return [i for i, mixer in enumerate(size(name).mixers) if isinstance(mixer, Attention.Config)]

    assert places("gdn_h1_0.4b") == [1, 3, 5, 7, 9, 11]
    assert places("gdn_h1_1.3b") == list(range(1, 18, 2))
    assert places("gdn_qwen_0.4b") == [3, 7, 11, 15, 19, 23]
    assert places("deltanet_sliding_340m") == list(range(1, 24, 2))
    assert places("deltanet_global_340m") == [1, 13]
    assert {mixer.window for mixer in size("gdn_h1_1.3b").mixers if isinstance(mixer, Attention.Config)} == {2048}
    assert [name for name, config in SIZES.items() if any(m.state_grows for m in config.mixers)] == [
        "gdn_qwen_0.4b",
        *(f"transformer_{n}" for n in ("6m", "32m", "99m", "269m", "340m", "1.3b")),
        "deltanet_global_340m",
    ]


HYBRID = LM.Config(
    vocab=17,
    width=24,
    layers=3,
    mlp=32,
    pattern=(
        GatedDeltaNet.Config(heads=2, head_dim=8),
        Attention.Config(heads=2, head_dim=12, window=9),
        Attention.Config(heads=2, head_dim=12),
    ),
)


def test_attention_starts_divided_by_depth_and_gated_deltanet_does_not() -> None:
    torch.manual_seed(0)
    recurrent, *attention = (block.mixer.o_proj.weight.detach() for block in LM(HYBRID).blocks)
    assert 0.95 < recurrent.abs().max() * 32**0.5 <= 1
    for weight in attention:
        assert 0.95 < weight.abs().max() * (24 * 2 * 3) ** 0.5 <= 1


def test_a_hybrid_decodes_and_rolls_back() -> None:
    torch.manual_seed(0)
    model, tokens = LM(HYBRID).double(), torch.randint(17, (2, 90))
    with torch.no_grad():
        whole, state = model(tokens).logits, model.init_state(2)
        pieces = [model(tokens[:, :50], state=state).logits]
        snapshot = state.clone()
        pieces += [model(tokens[:, t : t + 1], state=state).logits for t in range(50, 90)]
        torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-8, atol=1e-9)
        state.copy_(snapshot)
        torch.testing.assert_close(model(tokens[:, 50:], state=state).logits, whole[:, 50:], rtol=1e-8, atol=1e-9)
