"""FLA's functions on our operators: signatures as published, each flag honoured or refused by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn import Packing, ops
from gdn.compat import fla
from gdn.core.errors import ArgumentError

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}
BOTH = pytest.mark.parametrize("name", ["chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"])

SIGNATURES = {
    "chunk_gated_delta_rule": "q k v g beta scale initial_state output_final_state use_qk_l2norm_in_kernel use_beta_sigmoid_in_kernel "
    "allow_neg_eigval state_v_first cu_seqlens cu_seqlens_cpu chunk_indices cp_context kwargs",
    "fused_recurrent_gated_delta_rule": "q k v g gk gv beta scale initial_state output_final_state use_qk_l2norm_in_kernel "
    "use_gate_in_kernel A_log dt_bias use_beta_sigmoid_in_kernel allow_neg_eigval state_v_first cu_seqlens kwargs",
    "naive_recurrent_gated_delta_rule": "q k v beta g scale initial_state output_final_state",
    "naive_chunk_gated_delta_rule": "q k v g beta chunk_size scale initial_state output_final_state",
}
"""Of flash-linear-attention 0.6.0 (fla/ops/gated_delta_rule)."""


def problem(batch: int = 2, length: int = 70, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = random(batch, length, 2, 8), random(batch, length, 2, 8), random(batch, length, 4, 6)
    return {"q": q, "k": k, "v": v, "g": random(batch, length, 4), "beta": random(batch, length, 4)}


def gates() -> tuple[Tensor, Tensor]:
    return torch.tensor([0.5, -1.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([0.1, 0.2, -0.3, 0.0], dtype=torch.float64)


def expected(x: dict[str, Tensor], start: Tensor, *, top: float = 1.0, packing: Packing | None = None) -> tuple[Tensor, Tensor]:
    A_log, dt_bias = gates()
    g, beta = ops.decay_gate(x["g"], A_log, dt_bias), ops.write_gate(x["beta"], top=top)
    return ops.gated_delta_rule(ops.l2norm(x["q"]), ops.l2norm(x["k"]), x["v"], g, beta, scale=0.3, initial_state=start, packing=packing)


def raw(**more: Any) -> dict[str, Any]:
    """The flags under which q, k, g and beta are raw."""
    A_log, dt_bias = gates()
    flags = {"use_qk_l2norm_in_kernel": True, "use_beta_sigmoid_in_kernel": True, "use_gate_in_kernel": True}
    return {**flags, "A_log": A_log, "dt_bias": dt_bias, "scale": 0.3, "output_final_state": True, **more}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_fla(name: str) -> None:
    parameters = inspect.signature(getattr(fla, name)).parameters
    assert list(parameters) == SIGNATURES[name].split()
    assert all(p.default in (None, False, 64, inspect.Parameter.empty) for p in parameters.values())


@BOTH
@pytest.mark.parametrize("top", [1.0, 2.0])
@pytest.mark.parametrize("length", [5, 70])
def test_raw_inputs_and_states_of_either_layout(name: str, top: float, length: int) -> None:
    x, start = problem(length=length), torch.randn(2, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    o, state = expected(x, start, top=top)
    rule, flags = getattr(fla, name), raw(allow_neg_eigval=top == 2)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = start.clone()
            mine, end = rule(**x, **flags, initial_state=start)
            torch.testing.assert_close((mine, end), (o, state), **EXACT)
            mine, end = rule(**x, **flags, initial_state=start.mT, state_v_first=True)
            torch.testing.assert_close((mine, end), (o, state.mT), **EXACT)
            assert end.is_contiguous()
            assert torch.equal(start, before), "the initial state was written to"
            assert rule(**x, **{**flags, "output_final_state": False})[1] is None


@BOTH
def test_packed_documents(name: str) -> None:
    x, bounds = problem(1), torch.tensor([0, 30, 30, 31, 70])
    start = torch.randn(4, 4, 8, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    truth = expected(x, start, packing=Packing.from_cu_seqlens(bounds))
    host = {"cu_seqlens_cpu": bounds} if name.startswith("chunk") else {}
    for extra in ({}, host):
        torch.testing.assert_close(getattr(fla, name)(**x, **raw(), initial_state=start, cu_seqlens=bounds.int(), **extra), truth, **EXACT)


def test_the_recurrent_function_has_gradients() -> None:
    """Those of the reference, for every argument that FLA's takes."""
    x, (A_log, dt_bias) = problem(length=20), gates()
    start = torch.zeros(2, 4, 8, 6, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*x.values(), A_log, dt_bias, start)]
    o, state = fla.fused_recurrent_gated_delta_rule(**x, **raw(A_log=A_log, dt_bias=dt_bias), initial_state=start)
    ours = torch.autograd.grad(o.square().sum() + state.sum(), leaves)
    with ops.use(gated_delta_rule="reference"):
        g, beta = ops.decay_gate(x["g"], A_log, dt_bias), ops.write_gate(x["beta"])
        o, state = ops.gated_delta_rule(ops.l2norm(x["q"]), ops.l2norm(x["k"]), x["v"], g, beta, scale=0.3, initial_state=start)
    torch.testing.assert_close(ours, torch.autograd.grad(o.square().sum() + state.sum(), leaves), **EXACT)


def test_defaults_and_positional_order() -> None:
    x = problem(length=12)
    q, k, v, g, beta = ops.l2norm(x["q"]), ops.l2norm(x["k"]), x["v"], -x["g"].abs(), x["beta"].sigmoid()
    truth = ops.gated_delta_rule(q, k, v, g, beta)[0]
    assert torch.equal(fla.chunk_gdn(q, k, v, g, beta)[0], truth)
    torch.testing.assert_close(fla.fused_recurrent_gdn(q, k, v, g, None, None, beta)[0], truth, **EXACT)
    still, one = torch.zeros_like(g), torch.ones_like(beta)
    torch.testing.assert_close(fla.fused_recurrent_gdn(q, k, v)[0], ops.gated_delta_rule(q, k, v, still, one)[0], **EXACT)
    ungated = fla.chunk_gdn(q, k, v, x["g"], beta, use_gate_in_kernel=True, A_log=gates()[0])[0]
    torch.testing.assert_close(ungated, ops.gated_delta_rule(q, k, v, ops.decay_gate(x["g"], gates()[0], 0 * gates()[0]), beta)[0], **EXACT)
    for size in (16, 32, 64):
        assert torch.equal(fla.chunk_gdn(q, k, v, g, beta, chunk_size=size)[0], truth)


def test_the_naive_functions() -> None:
    x = problem(length=70)
    q, k, v, g, beta = ops.l2norm(x["q"]), ops.l2norm(x["k"]), x["v"][:, :, :2], -x["g"][:, :, :2].abs(), x["beta"][:, :, :2].sigmoid()
    o, state = ops.gated_delta_rule(q, k, v, g, beta)
    for mine, end in (
        fla.naive_recurrent_gated_delta_rule(q, k, v, beta, g, output_final_state=True),
        fla.naive_chunk_gated_delta_rule(q, k, v, g, beta, 48, output_final_state=True),
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close((mine.double(), end.double()), (o, state), rtol=1e-4, atol=1e-5)
    assert fla.naive_recurrent_gated_delta_rule(q, k, v, beta, g)[1] is None


def test_bf16_with_any_dtype_of_state() -> None:
    x = problem(dtype=torch.bfloat16)
    start = torch.zeros(2, 4, 8, 6, dtype=torch.bfloat16)
    o, state = fla.chunk_gated_delta_rule(**x, **raw(A_log=gates()[0].float(), dt_bias=None), initial_state=start)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("chunk_gated_delta_rule", {"cp_context": object()}, "cp_context: context parallelism is not supported"),
        ("chunk_gated_delta_rule", {"chunk_size": 128}, "chunk_size: expected 16, 32 or 64, got 128"),
        ("chunk_gated_delta_rule", {"use_gates": True}, "use_gates: gdn.compat.fla knows no such argument"),
        ("chunk_gated_delta_rule", {"allow_neg_eigval": True}, "allow_neg_eigval: expected only together with"),
        ("chunk_gated_delta_rule", {"use_gate_in_kernel": True}, "A_log: expected"),
        ("chunk_gated_delta_rule", {"cu_seqlens": torch.tensor([0, 140])}, "cu_seqlens: expected a batch of one row, got 2"),
        ("fused_recurrent_gated_delta_rule", {"gk": torch.zeros(1)}, "gk: a decay for each key channel is not supported"),
        ("fused_recurrent_gated_delta_rule", {"gv": torch.zeros(1)}, "gv: a decay for each value channel"),
        ("fused_recurrent_gated_delta_rule", {"beta": torch.ones(2, 70, 4, 6)}, r"beta: expected \[B, T, HV\]"),
        ("fused_recurrent_gated_delta_rule", {"g": None, "use_gate_in_kernel": True}, "g: expected the raw input"),
        ("fused_recurrent_gated_delta_rule", {"head_first": True}, "head_first: gdn.compat.fla knows no such argument"),
        ("naive_chunk_gated_delta_rule", {"chunk_size": 0}, "chunk_size: expected at least 1"),
    ],
)
def test_refusals_name_the_argument(name: str, arguments: dict[str, Any], message: str) -> None:
    x = problem()
    x["g"] = -x["g"].abs()
    with pytest.raises(ArgumentError, match=message):
        getattr(fla, name)(**{**x, **arguments})


@BOTH
def test_old_names(name: str) -> None:
    x, rule = problem(), getattr(fla, name)
    truth = rule(**x, **raw(), state_v_first=True)
    with pytest.warns(DeprecationWarning, match="now called state_v_first"):
        torch.testing.assert_close(rule(**x, **raw(), transpose_state_layout=True), truth, **EXACT)
    with pytest.raises(ArgumentError, match="transpose_state_layout: cannot be given together"):
        rule(**x, **raw(), transpose_state_layout=True, state_v_first=True)
    with pytest.raises(DeprecationWarning, match="head_first: removed"):
        fla.chunk_gdn(**x, head_first=False)
