from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from gdn.core.errors import ConfigError, DataError, NonFiniteError
from gdn.data import Batch
from gdn.models.lm import LM, LMOutput
from gdn.train.distributed import World
from gdn.train.step import autocast, check_precision, gradient_norm, train_step

WORLD = World(device=torch.device("cpu"))


class Bigram(nn.Module):
    """The next token from this one, in float64; called as LM is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(10, 10, dtype=torch.float64))

    def forward(self, tokens: torch.Tensor, *, targets: torch.Tensor, packing: None = None) -> LMOutput:
        return LMOutput(loss=nn.functional.cross_entropy(self.table[tokens].flatten(0, 1), targets.flatten(), ignore_index=-100))


def of(tokens: torch.Tensor, targets: torch.Tensor) -> Batch:
    count = int((targets != -100).sum())
    return Batch(tokens=tokens, targets=targets, packing=None, num_targets=count, num_bytes=count)


def batch(seed: int, *, hidden: int = 0) -> Batch:
    """Two rows of eight random tokens below 9; the first `hidden` targets are -100."""
    tokens = torch.randint(0, 9, (2, 9), generator=torch.Generator().manual_seed(seed))
    targets = tokens[:, 1:].contiguous()
    targets.view(-1)[:hidden] = -100
    return of(tokens[:, :-1], targets)


def joined(*batches: Batch) -> Batch:
    return of(torch.cat([b.tokens for b in batches]), torch.cat([b.targets for b in batches]))


def step(model: nn.Module, batches: list[Batch], **options: object):
    return train_step(model, torch.optim.SGD(model.parameters(), lr=1.0), batches, world=WORLD, **options)


def test_micro_batches_are_one_batch_of_their_size_whatever_their_numbers_of_targets() -> None:
    parts = [batch(1), batch(2, hidden=13), batch(3, hidden=16)]
    several, one = Bigram(), Bigram()
    a, b = step(several, parts), step(one, [joined(*parts)])
    assert a.tokens == b.tokens == 16 + 3
    assert a.loss == pytest.approx(b.loss, rel=1e-14)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-14)
    torch.testing.assert_close(several.table, one.table, rtol=1e-14, atol=1e-14)


def test_two_micro_batches_of_the_language_model(lm: LM) -> None:
    tokens = torch.randint(0, 257, (4, 17), generator=torch.Generator().manual_seed(0))
    whole = of(tokens[:, :-1], tokens[:, 1:].contiguous())
    halves = [of(whole.tokens[i : i + 2], whole.targets[i : i + 2]) for i in (0, 2)]
    results = [step(copy.deepcopy(lm), batches) for batches in ([whole], halves)]
    assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    assert results[0].grad_norm == pytest.approx(results[1].grad_norm, rel=1e-5)


def test_gradients_are_clipped_to_a_global_norm_and_the_norm_before_is_reported() -> None:
    plain, clipped, start = Bigram(), Bigram(), Bigram()
    norm = step(plain, [batch(1)]).grad_norm
    assert step(clipped, [batch(1)], clip=norm / 4).grad_norm == norm
    torch.testing.assert_close(start.table - clipped.table, (start.table - plain.table) / 4, rtol=1e-5, atol=1e-8)
    wide = Bigram()
    step(wide, [batch(1)], clip=norm * 2)
    assert torch.equal(wide.table, plain.table)


def test_no_gradient_is_left_behind() -> None:
    model = Bigram()
    step(model, [batch(1)])
    assert model.table.grad is None
    model.table.grad = torch.full_like(model.table, 2.0)
    assert float(gradient_norm(model, None)) == pytest.approx(20.0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_updates_nothing(value: float) -> None:
    model, good, bad = Bigram(), batch(1), batch(2)
    bad.tokens[0, 0] = 9
    with torch.no_grad():
        model.table[9] = value
    before = model.table.detach().clone()
    with pytest.raises(NonFiniteError, match="loss of micro-batch 1 is nan"):
        step(model, [good, bad])
    assert torch.equal(model.table[:9], before[:9])
    assert model.table.grad is None


def test_a_gradient_that_is_not_finite_updates_nothing() -> None:
    model = Bigram()
    model.table.register_hook(lambda gradient: gradient * math.inf)
    before = model.table.detach().clone()
    with pytest.raises(NonFiniteError, match="every loss is finite, the norm of the gradient is"):
        step(model, [batch(1)], clip=1.0)
    assert torch.equal(model.table, before)


def test_nothing_to_predict_is_an_error() -> None:
    with pytest.raises(DataError, match="at least one token to predict"):
        step(Bigram(), [batch(1, hidden=16)])


def test_a_model_cast_to_bfloat16_is_refused_and_its_gates_named_first(lm: LM) -> None:
    check_precision(lm)
    with pytest.raises(ConfigError, match=r"embedding.weight: expected float32 to train, got torch.bfloat16"):
        check_precision(lm.to(torch.bfloat16))  # which leaves the gates in float32
    gate = next(parameter for name, parameter in lm.named_parameters() if name.endswith("A_log"))
    gate.data = gate.data.to(torch.bfloat16)
    with pytest.raises(ConfigError, match=r"A_log: expected float32 to train, got torch.bfloat16"):
        check_precision(lm)


def test_bf16_trains_float32_parameters(lm: LM) -> None:
    tokens = torch.randint(0, 257, (2, 17))
    products = []
    lm.blocks[0].mixer.qkv_proj.register_forward_hook(lambda module, given, result: products.append(result.dtype))
    result = step(lm, [of(tokens[:, :-1], tokens[:, 1:].contiguous())], precision="bf16")
    assert products == [torch.bfloat16]
    assert math.isfinite(result.loss)
    check_precision(lm)
    with autocast(torch.device("cpu"), "fp32"):
        assert torch.ones(2, 2).matmul(torch.ones(2, 2)).dtype == torch.float32
