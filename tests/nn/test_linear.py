"""What modules do with linear layers that are but matrices, and that adapters and hooks are not passed by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gdn.nn import GatedRMSNorm, SwiGLU
from gdn.nn.linear import is_affine, is_matrix, side_by_side


class Adapted(nn.Module):
    """A layer and something that is added to its output, as LoRA does."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1


def test_what_is_more_than_a_matrix() -> None:
    hooked, normed = nn.Linear(4, 2, bias=False), parametrizations.weight_norm(nn.Linear(4, 2, bias=False))
    hooked.register_forward_hook(lambda module, inputs, output: output)
    assert is_matrix(nn.Linear(4, 2, bias=False))
    assert is_affine(nn.Linear(4, 2))
    for more in (nn.Linear(4, 2), hooked, normed, Adapted(nn.Linear(4, 2, bias=False))):
        assert not is_matrix(more)


def through_mlp(adapt: Callable[[nn.Linear], nn.Module]) -> Tensor:
    torch.manual_seed(0)
    mlp = SwiGLU(8, 12)
    mlp.down = adapt(mlp.down)  # type: ignore[assignment]
    return mlp(torch.randn(2, 3, 8))


def through_norm(adapt: Callable[[nn.Linear], nn.Module]) -> Tensor:
    torch.manual_seed(0)
    norm, layer = GatedRMSNorm(4), nn.Linear(8, 6, bias=False)
    return norm.project(torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4), adapt(layer))


@pytest.mark.parametrize("through", [through_mlp, through_norm])
def test_an_adapter_is_not_passed_by(through: Callable[..., Tensor]) -> None:
    torch.testing.assert_close(through(Adapted), through(lambda layer: layer) + 1)


@pytest.mark.parametrize("through", [through_mlp, through_norm])
def test_a_hook_is_not_passed_by(through: Callable[..., Tensor]) -> None:
    seen: list[Tensor] = []

    def listen(layer: nn.Linear) -> nn.Linear:
        layer.register_forward_hook(lambda module, inputs, output: seen.append(output))
        return layer

    torch.testing.assert_close(through(listen), through(lambda layer: layer))
    assert len(seen) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_side_by_side_is_each_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 3).to(dtype), nn.Linear(6, 2, bias=False).to(dtype)
    x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    leaves = [x, *first.parameters(), *second.parameters()]
    weights = [torch.randn(2, 5, n, dtype=dtype) for n in (3, 2)]
    near = 2e-2 if dtype == torch.bfloat16 else 1e-12
    together, alone = side_by_side(x, first, second), (first(x), second(x))
    torch.testing.assert_close(together, alone, rtol=near, atol=near)
    gradients = [torch.autograd.grad(outputs, leaves, weights) for outputs in (together, alone)]
    torch.testing.assert_close(*gradients, rtol=near, atol=near)


def test_side_by_side_does_not_pass_an_adapter_by() -> None:
    first, second = nn.Linear(6, 3), nn.Linear(6, 2)
    x = torch.randn(5, 6)
    adapted: nn.Linear = Adapted(second)  # type: ignore[assignment]
    torch.testing.assert_close(side_by_side(x, first, adapted), (first(x), second(x) + 1))
