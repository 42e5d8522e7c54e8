from __future__ import annotations

import pytest
import torch
from torch import nn

from gdn.core.errors import ConfigError
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.train.optim import AdamW, groups


def model(**changes: object) -> LM:
    return LM(LM.Config(vocab=16, width=8, layers=2, mlp=16, pattern=(GatedDeltaNet.Config(heads=1, head_dim=4),)).with_(**changes))


def names(lm: nn.Module, config: AdamW) -> dict[str, set[str]]:
    by_id = {id(p): name for name, p in lm.named_parameters()}
    return {group["name"]: {by_id[id(p)] for p in group["params"]} for group in groups(lm, config)}


def test_every_parameter_is_in_exactly_one_group() -> None:
    lm = model(tie_embeddings=False)
    found = [p for group in groups(lm, AdamW()) for p in group["params"]]
    assert len(found) == len({id(p) for p in found}) == len(list(lm.parameters()))


def test_gates_norms_and_biases_do_not_decay_and_matrices_and_filters_do() -> None:
    split = names(model(), AdamW())
    endings = {name.removeprefix("blocks.0.").removeprefix("blocks.1.") for name in split["no_decay"]}
    assert endings == {
        *("mixer_norm.weight", "mlp_norm.weight", "norm.weight"),
        *("mixer.A_log", "mixer.dt_bias", "mixer.b_proj.bias", "mixer.o_norm.weight"),
    }
    assert {"embedding.weight", "blocks.0.mixer.conv.weight", "blocks.1.mixer.qkv_proj.weight"} <= split["decay"]
    assert {group["name"]: group["weight_decay"] for group in groups(model(), AdamW(weight_decay=0.3))} == {"decay": 0.3, "no_decay": 0.0}


def test_embeddings_are_a_choice_and_an_untied_head_is_no_embedding() -> None:
    split = names(model(tie_embeddings=False), AdamW(decay_embeddings=False))
    assert "embedding.weight" in split["no_decay"]
    assert "head.weight" in split["decay"]


def test_a_flagged_matrix_does_not_decay_and_a_frozen_one_is_left_out() -> None:
    lm = model()
    lm.blocks[0].mixer.g_proj.weight._no_weight_decay = True
    lm.blocks[1].mixer.g_proj.weight.requires_grad_(False)
    split = names(lm, AdamW())
    assert "blocks.0.mixer.g_proj.weight" in split["no_decay"]
    assert "blocks.1.mixer.g_proj.weight" not in split["no_decay"] | split["decay"]


def test_weight_decay_moves_only_what_decays() -> None:
    lm = model()
    before = {name: p.detach().clone() for name, p in lm.named_parameters()}
    optimizer = AdamW(lr=0.5, weight_decay=0.5).build(lm)
    for p in lm.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    split = names(lm, AdamW())
    for name, p in lm.named_parameters():
        expected = before[name] * (0.75 if name in split["decay"] else 1.0)
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"betas": (0.9, 1.0)}, {"eps": 0.0}, {"weight_decay": -0.1}])
def test_values_that_cannot_work_are_named(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AdamW(**wrong)
