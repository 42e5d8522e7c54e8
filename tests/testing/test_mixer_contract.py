"""Each check of the mixer contract finds the fault that it is there for: planted in Gated DeltaNet, which passes without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported

from gdn.mixers.base import MixerState
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.testing.mixer_contract import MixerContract

Outcome = tuple[Tensor, MixerState | None]
Forward = Callable[..., Outcome]
RIGHT: Forward = GatedDeltaNet.forward


class Contract(MixerContract):
    __test__ = False  # the mixer's own tests run it
    config = GatedDeltaNet.Config(heads=2, head_dim=8, expand_v=1.0)


def looks_ahead(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    y, state = RIGHT(self, x, **options)
    return y + 1e-6 * x.roll(-1, dims=1), state


def forgets_the_convolution(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    y, state = RIGHT(self, x, **options)
    return y, None if state is None else state.update(conv=torch.zeros_like(state["conv"]))


def steps_differently(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    y, state = RIGHT(self, x, **options)
    return y * (1 + 1e-6 * (x.shape[1] == 1)), state


def ignores(*names: str) -> Forward:
    def forward(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
        return RIGHT(self, x, **{name: value for name, value in options.items() if name not in names})

    return forward


def begins_anew_behind_padding(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    if options.get("mask") is not None and options.get("state") is not None:
        options["state"]["conv"].zero_()
    return RIGHT(self, x, **options)


def returns_a_new_state(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    y, state = RIGHT(self, x, **options)
    return y, None if state is None else state.clone()


def remembers_outside_of_the_state(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    y, state = RIGHT(self, x, **options)
    shift = getattr(self, "shift", 0.0)
    self.shift = float(y.detach().mean())
    return y + shift, state


def leaves_a_parameter_out(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    self.A_log.requires_grad_(False)
    return RIGHT(self, x, **options)


def stops_the_gradient_of_the_state(self: GatedDeltaNet, x: Tensor, state: MixerState | None = None, **options: Any) -> Outcome:
    return RIGHT(self, x, state=None if state is None else state._map(Tensor.detach), **options)


def rounds_coarsely(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    y, state = RIGHT(self, x, **options)
    return y * (1.1 if y.dtype == torch.bfloat16 else 1), state


def breaks_the_graph(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    torch._dynamo.graph_break()
    return RIGHT(self, x, **options)


def has_weights_that_are_not_saved(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    if not hasattr(self, "hidden"):
        self.hidden = nn.functional.normalize(torch.randn(x.shape[-1], dtype=x.dtype), dim=0)
    y, state = RIGHT(self, x, **options)
    return y * self.hidden, state


def says_nothing(self: GatedDeltaNet, x: Tensor, **options: Any) -> Outcome:
    y, state = RIGHT(self, x, **options)
    return 0 * y, state


FORWARDS: dict[str, Forward] = {
    "is_causal": looks_ahead,
    "any_split_of_the_sequence_gives_the_same_outputs_and_state": forgets_the_convolution,
    "stepping_equals_the_parallel_form": steps_differently,
    "packed_documents_equal_separate_ones": ignores("packing"),
    "padding_on_the_left_leaves_no_trace": ignores("mask"),
    "padding_before_further_tokens_leaves_no_trace": begins_anew_behind_padding,
    "state_has_the_declared_size_which_is_fixed_unless_it_says_that_it_grows": returns_a_new_state,
    "snapshots_roll_back_and_sequences_reorder_exactly": remembers_outside_of_the_state,
    "every_parameter_gets_a_finite_gradient_that_is_not_zero": leaves_a_parameter_out,
    "gradients_flow_through_the_state": stops_the_gradient_of_the_state,
    "bf16_stays_near_float64": rounds_coarsely,
    "compiles_as_one_graph": breaks_the_graph,
    "config_and_weights_round_trip": has_weights_that_are_not_saved,
    "learns_to_recall_a_token": says_nothing,
}
NUMBERS = {
    "builds_without_memory_and_declares_its_parameters": "num_parameters",
    "state_has_the_declared_size_which_is_fixed_unless_it_says_that_it_grows": "state_bytes",
    "declares_its_operations": "flops_per_token",
}


@pytest.mark.parametrize("check", FORWARDS)
def test_a_wrong_forward_fails_its_check(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatedDeltaNet, "forward", FORWARDS[check])
    with pytest.raises((AssertionError, Unsupported)):
        getattr(Contract(), f"test_{check}")()


@pytest.mark.parametrize("check", NUMBERS)
def test_a_wrong_number_fails_its_check(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GatedDeltaNet.Config, NUMBERS[check], lambda *_: 1)
    with pytest.raises(AssertionError):
        getattr(Contract(), f"test_{check}")()


def test_every_check_has_a_fault() -> None:
    assert {f"test_{check}" for check in FORWARDS | NUMBERS} == {name for name in dir(MixerContract) if name.startswith("test_")}
