"""The rotary embedding: against complex numbers, relative, exact far away."""

from __future__ import annotations

import pytest
import torch

from gdn.core.errors import ConfigError
from gdn.nn import Rotary


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_turns_complex_numbers(fraction: float) -> None:
    x = torch.randn(2, 7, 3, 8, dtype=torch.float64)
    (y,) = Rotary(8, base=100.0, fraction=fraction)(torch.arange(7), x)
    half = int(4 * fraction)
    for i in range(half):
        z = torch.complex(x[..., i], x[..., i + half])
        angle = torch.arange(7, dtype=torch.float64) * 100.0 ** (-i / half)
        z = z * torch.polar(torch.ones_like(angle), angle)[:, None]
        torch.testing.assert_close(y[..., i], z.real, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(y[..., i + half], z.imag, rtol=1e-12, atol=1e-12)
    assert torch.equal(y[..., 2 * half :], x[..., 2 * half :])


def test_scores_depend_on_distances_only_a_million_tokens_away_too() -> None:
    q, k = torch.randn(1, 5, 2, 16), torch.randn(1, 5, 1, 16)
    near = list(Rotary(16)(torch.arange(5), q, k))
    far = list(Rotary(16)(10**6 + torch.arange(5), q, k))
    scores = [torch.einsum("bthk,bsgk->bhts", *pair) for pair in (near, far)]
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-5, atol=1e-5)


def test_positions_of_each_row() -> None:
    x = torch.randn(2, 3, 1, 4)
    (both,) = Rotary(4)(torch.tensor([[0, 1, 2], [5, 6, 7]]), x)
    for row, positions in enumerate(([0, 1, 2], [5, 6, 7])):
        assert torch.equal(both[row : row + 1], Rotary(4)(torch.tensor(positions), x[row : row + 1])[0])


def test_turns_in_float32_whatever_the_dtype_and_nothing_at_fraction_zero() -> None:
    x = torch.randn(1, 4, 1, 8).bfloat16()
    (y,) = Rotary(8)(torch.arange(4), x)
    assert torch.equal(y, Rotary(8)(torch.arange(4), x.float())[0].bfloat16())
    assert Rotary(8, fraction=0.0)(torch.arange(4), x)[0] is x


@pytest.mark.parametrize("fraction", [1.5, 0.3, 0.125])
def test_fractions_that_do_not_fit_are_named(fraction: float) -> None:
    with pytest.raises(ConfigError, match=f"rope_fraction: expected an even part of head_dim=8 .*got {fraction}"):
        Rotary(8, fraction=fraction)


@pytest.mark.parametrize("base", [0.0, -1.0])
def test_a_base_that_gives_no_angles_is_refused(base: float) -> None:
    with pytest.raises(ConfigError, match="rope_base: expected above 0, got"):
        Rotary(16, base=base)
