"""What modules do with linear layers that are but matrices, and that adapters and hooks are not passed by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gdn.nn import GatedRMSNorm, RMSNorm, SwiGLU
from gdn.nn.linear import is_affine, is_matrix, projections
from gdn.nn.norm import add_and_norm, norm_and_project


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


def test_a_frozen_layer_is_less_in_training() -> None:
    frozen = nn.Linear(4, 2, bias=False).requires_grad_(False)
    assert not is_matrix(frozen)
    with torch.no_grad():
        assert is_matrix(frozen)


def through_mlp(adapt: Callable[[nn.Linear], nn.Module]) -> Tensor:
    torch.manual_seed(0)
    mlp = SwiGLU(8, 12)
    mlp.register_module("down", adapt(mlp.down))
    return mlp(torch.randn(2, 3, 8))


def through_norm(adapt: Callable[[nn.Linear], nn.Module]) -> Tensor:
    torch.manual_seed(0)
    norm, layer = GatedRMSNorm(4), nn.Linear(8, 6, bias=False)
    return norm_and_project(norm, torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4), adapt(layer))


@pytest.mark.parametrize("through", [through_mlp, through_norm])
def test_an_adapter_is_not_passed_by(through: Callable[..., Tensor]) -> None:
    torch.testing.assert_close(through(Adapted), through(lambda layer: layer) + 1)


@pytest.mark.parametrize("through", [through_mlp, through_norm])
def test_a_hook_is_not_passed_by(through: Callable[..., Tensor]) -> None:
    seen: list[Tensor] = []

    def listen(layer: nn.Linear) -> nn.Linear:
        layer.register_forward_hook(lambda *call: seen.append(call[2]))
        return layer

    torch.testing.assert_close(through(listen), through(lambda layer: layer))
    assert len(seen) == 1


@pytest.fixture
def layers() -> list[nn.Linear]:
    """Two and two thin ones, with and without a bias."""
    torch.manual_seed(0)
    return [nn.Linear(6, rows, bias=bias) for rows, bias in ((13, False), (12, True), (3, True), (2, False))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("wide", "end"), [(2, 4), (2, 3), (1, 2), (0, 2)])
def test_projections_are_each_alone(wide: int, end: int, dtype: torch.dtype, layers: list[nn.Linear]) -> None:
    layers = [layer.to(dtype) for layer in layers[:end]]
    x = torch.randn(2, 5, 6, dtype=dtype, requires_grad=True)
    leaves = [x, *[p for layer in layers for p in layer.parameters()]]
    weights = [torch.randn(2, 5, layer.out_features, dtype=dtype) for layer in layers]
    near = 3e-2 if dtype == torch.bfloat16 else 1e-12
    together, alone = projections(x, layers[:wide], layers[wide:]), [layer(x) for layer in layers]
    torch.testing.assert_close(together, alone, rtol=near, atol=near)
    gradients = [torch.autograd.grad(outputs, leaves, weights) for outputs in (together, alone)]
    torch.testing.assert_close(*gradients, rtol=near, atol=10 * near)


def test_projections_add_up_one_gradient(layers: list[nn.Linear]) -> None:
    """Sums of gradients are what reads and writes `[B, T, width]` once more for each layer."""
    outputs = projections(torch.randn(5, 6, requires_grad=True), layers[:2], layers[2:])
    sources = set()
    for output in outputs:
        node = output.grad_fn
        while node is not None and "_Function" not in node.name():
            node = node.next_functions[0][0]
        sources.add(node)
    assert len(sources) == 1 and None not in sources


def test_projections_under_autocast(layers: list[nn.Linear]) -> None:
    x = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        together, alone = projections(x, layers[:2], layers[2:]), [layer(x) for layer in layers]
    assert all(y.dtype == torch.bfloat16 for y in together)
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=2e-2)


def test_projections_do_not_pass_an_adapter_by(layers: list[nn.Linear]) -> None:
    x = torch.randn(5, 6)
    adapted: Any = Adapted(layers[1])
    torch.testing.assert_close(projections(x, layers[:1], [adapted]), [layers[0](x), layers[1](x) + 1])


def test_a_norm_that_is_wrapped_is_called() -> None:
    class Wrapped(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.norm = norm

        def forward(self, x: Tensor, gate: Tensor) -> Tensor:
            return 2 * self.norm(x, gate)

    norm, layer, x, gate = GatedRMSNorm(4), nn.Linear(8, 6, bias=False), torch.randn(2, 3, 2, 4), torch.randn(2, 3, 2, 4)
    torch.testing.assert_close(norm_and_project(Wrapped(norm), x, gate, layer), 2 * norm_and_project(norm, x, gate, layer))


@pytest.mark.parametrize("casts", [False, True], ids=["plain", "autocast"])
def test_projections_of_other_dtypes_are_left_to_the_layers(casts: bool) -> None:
    layers = [nn.Linear(6, 4, bias=False).double() for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16, enabled=casts):
        assert {y.dtype for y in projections(torch.randn(5, 6, dtype=torch.float64), layers[:2], layers[2:])} == {torch.float64}
        if not casts:
            with pytest.raises(RuntimeError, match="dtype"):
                projections(torch.randn(5, 6), layers[:2], layers[2:])


def test_what_a_block_adds_keeps_its_dtype_from_the_residual_stream() -> None:
    """Under autocast a matrix gives bfloat16, and the stream stays float32."""
    norm, x, added = RMSNorm(4), torch.randn(2, 4), torch.randn(2, 4).bfloat16()
    normed, total = add_and_norm(norm, x, added)
    assert total.dtype == normed.dtype == torch.float32
    assert torch.equal(total, x + added) and torch.equal(normed, norm(x + added))


def test_functions_of_torch_func_reach_the_input() -> None:
    mlp = SwiGLU(8, 12)
    x = torch.randn(3, 8)
    through = torch.func.grad(lambda x: mlp(x).sum())(x)
    torch.testing.assert_close(through, torch.autograd.grad(mlp(x.requires_grad_()).sum(), x)[0])
