"""The Triton rows against their references: on a GPU where there is one, in Triton's interpreter on the CPU otherwise.

Fresh memory is poisoned with NaN and so is what surrounds each argument: a row that reads where nobody wrote, or beside a tensor, shows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from printed import printed
from torch import Tensor

from gdn import Packing, ops
from gdn.core import checks, portable_launch
from gdn.core.dispatch import use
from gdn.ops import (
    add_rms_norm,
    causal_conv1d,
    causal_conv1d_step,
    decay_gate,
    delta_core,
    gated_delta_step,
    gated_rms_norm,
    gated_rms_norm_linear,
    l2norm,
    linear_cross_entropy,
    rms_norm,
    skip_gated_rms_norm,
    swiglu_linear,
    write_gate,
)
from gdn.ops.delta_fused import problems as cores
from gdn.ops.delta_step import problems as steps
from gdn.ops.gates import problems as gates
from gdn.ops.loss import portable as loss_row
from gdn.ops.loss import problems as losses
from gdn.ops.norm import problems as norms
from gdn.ops.short_conv import portable as conv_row
from gdn.ops.short_conv import problems as convs

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Check = Callable[..., None]


def cases(*problems: Any, narrow: int = 2) -> Any:
    """Problems and data types: all on a GPU; in the slow interpreter float32 for all but the large ones, and the first few in 16 bits."""
    if DEVICE == "cuda":
        chosen = [(p, dtype) for p in problems for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    else:
        chosen = [(p, torch.float32) for p in problems if not p.name.startswith(("large", "long"))]
        chosen += [(p, dtype) for p in problems[:narrow] for dtype in (torch.bfloat16, torch.float16)]
    return pytest.mark.parametrize(("problem", "dtype"), chosen, ids=lambda x: getattr(x, "name", str(x).removeprefix("torch.")))


def build(problem: Any, dtype: torch.dtype, make: str = "build") -> dict[str, Any]:
    return getattr(problem, make)(dtype=dtype, device=DEVICE)


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(5, device=DEVICE).isnan().all()
    assert torch.empty_like(torch.zeros(5, device=DEVICE)).isnan().all()


def test_the_compiler_takes_every_kernel() -> None:
    translated = printed("translate_portable.py")
    packages = ("attention", "delta_channel", "delta_fused", "delta_step", "gates", "linear_recurrence", "loss", "norm")
    folders = [Path(ops.__path__[0]) / package for package in (*packages, "projection", "qkv", "rotary", "short_conv", "state_space")]
    files = [file for folder in folders for file in folder.glob("portable*.py")]
    names = [(file, name) for file in files for name in re.findall(r"def (\w+_kernel)\(", file.read_text())]
    kernels = {f"gdn.ops.{file.parent.name}.{file.stem}.{name}" for file, name in names}
    assert {name for (name,) in translated} == kernels


# --- steps; more of those of memories is in test_step_portable.py


def apart(x: Tensor) -> Tensor:
    """The same numbers as every second one of others."""
    return torch.stack([x, torch.full_like(x, 1)], -1)[..., 0]


@pytest.mark.parametrize("name", ["slots", "bias"])
def test_steps_take_slots_and_a_bias_that_are_columns_of_a_table(name: str, as_good_as_the_reference: Check) -> None:
    arguments = build(steps.Problem(name="", B=3, T=2, H=1, HV=2, K=8, V=8, slots=(4, -1, 2), pool=6), torch.float32)
    slots = arguments["slots"]
    if name == "slots":
        as_good_as_the_reference(gated_delta_step, "portable", {**arguments, "slots": apart(slots)})
    tensors = {"x": (3, 2, 6), "weight": (6, 4), "state": (6, 3, 6), "bias": (6,)}
    arguments = {n: torch.randn(shape, device=DEVICE) for n, shape in tensors.items()} | {"slots": slots}
    as_good_as_the_reference(causal_conv1d_step, "portable", {**arguments, name: apart(arguments[name])})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_convolution_step_leaves_what_lies_behind_the_pool_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slot too large, which nobody looks at on a GPU: the inputs there are another tensor's."""
    monkeypatch.setattr(checks, "slots", lambda *arguments: None)
    x, weight = torch.randn(3, 2, 6, device=DEVICE, dtype=dtype), torch.randn(6, 4, device=DEVICE)
    inputs, slots = torch.randn(5, 3, 6, device=DEVICE), torch.tensor([3, -1, 1], device=DEVICE)
    before = inputs.clone()
    with use(causal_conv1d_step="portable"):
        y = causal_conv1d_step(x, weight, inputs[:3], slots=slots)
    assert y[0].isnan().all() and not y[1].any() and y[2].isfinite().all()
    assert [bool((a == b).all()) for a, b in zip(inputs, before)] == [True, False, True, True, True]


def test_step_clears_at_minus_infinity_and_lets_nan_through() -> None:
    arguments = build(steps.Problem(name="", B=1, H=1, HV=2, K=4, V=4), torch.float32)
    arguments["k"].zero_()
    arguments["g"][0, 0, 0] = -float("inf")
    with use(gated_delta_step="portable"):
        gated_delta_step(**arguments)
        assert not arguments["state"][0, 0].any()
        arguments["beta"][0, 0, 1] = float("nan")
        assert gated_delta_step(**arguments)[0, 0, 1].isnan().all()


# --- the convolution


@cases(*convs.PROBLEMS, narrow=3)
def test_convolution(problem: convs.Problem, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(causal_conv1d, "portable", build(problem, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_convolution_of_pieces_of_full_length(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, as_good_as_the_reference: Check) -> None:
    """Pieces stay long where there are many, and then the forward pass has half the warps; these are cut to 16 tokens."""
    warps = []

    def launch(kernel: Any, *arguments: Any, **options: Any) -> Any:
        warps.append((kernel.fn.__name__, options["warps"]))
        return portable_launch.launch(kernel, *arguments, **options)

    monkeypatch.setattr(conv_row, "launch", launch)
    for longest, forward in ((16, 2), (32, 4)):
        monkeypatch.setattr(conv_row, "LONG", longest)
        warps.clear()
        for lengths in (None, (7, 0, 25, 8)):
            problem = convs.Problem(name="", T=40, D=300, state=True, lengths=lengths)
            as_good_as_the_reference(causal_conv1d, "portable", build(problem, dtype))
        assert set(warps) & {("forward_kernel", 2), ("forward_kernel", 4)} == {("forward_kernel", forward)}
        assert ("backward_kernel", 4) in warps


def test_convolution_reads_strided_views(as_good_as_the_reference: Check) -> None:
    for problem in (convs.PROBLEMS[1], convs.PROBLEMS[9]):
        arguments = build(problem, torch.float32)
        wide = torch.cat([arguments["x"]] * 2, dim=2)[:, :, : problem.D]
        assert not wide.is_contiguous()
        as_good_as_the_reference(causal_conv1d, "portable", {**arguments, "x": wide})


def test_convolution_reads_a_bias_that_is_a_column(as_good_as_the_reference: Check) -> None:
    tensors = {"x": (2, 9, 6), "weight": (6, 4), "bias": (6,)}
    arguments = {name: torch.randn(shape, device=DEVICE) for name, shape in tensors.items()}
    as_good_as_the_reference(causal_conv1d, "portable", {**arguments, "bias": apart(arguments["bias"]), "activation": "silu"})


def test_convolution_of_packed_rows_of_one_token_each() -> None:
    """Contiguous whatever its stride over tokens is, which then is not that of the flattened rows."""
    x, weight = torch.randn(1, 4, 6, device=DEVICE).transpose(0, 1), torch.randn(6, 4, device=DEVICE)
    assert x.is_contiguous() and x.stride(1) != 6
    y, _ = causal_conv1d(x, weight, packing=Packing.from_lengths([1] * 4, device=DEVICE))
    with use(causal_conv1d="portable"):
        found, _ = causal_conv1d(x, weight, packing=Packing.from_lengths([1] * 4, device=DEVICE))
    torch.testing.assert_close(found, y)


def test_convolution_compiles_as_one_graph(as_good_as_the_reference: Check) -> None:
    compiled = torch.compile(causal_conv1d, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(causal_conv1d, "portable", build(convs.PROBLEMS[8], torch.float32), run=compiled)


@pytest.mark.parametrize("slots", [None, [4, 0, 2], [3, -1, 0]], ids=str)
@pytest.mark.parametrize(("tokens", "taps"), [(0, 4), (1, 4), (2, 4), (5, 4), (3, 1)])
def test_convolution_step(slots: list[int] | None, tokens: int, taps: int, as_good_as_the_reference: Check) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    arguments: dict[str, Any] = {
        "x": normal(3, tokens, 6),
        "weight": normal(6, taps),
        "state": normal(3 if slots is None else 5, taps - 1, 6),
        "bias": normal(6),
        "activation": "silu",
        "slots": None if slots is None else torch.tensor(slots, device=DEVICE),
    }
    as_good_as_the_reference(causal_conv1d_step, "portable", arguments)
    narrow = {name: arguments[name].bfloat16() for name in ("x", "weight", "state")}
    as_good_as_the_reference(causal_conv1d_step, "portable", {**arguments, **narrow})


# --- the norms

NORMS = {l2norm: ("x",), rms_norm: ("x", "weight"), add_rms_norm: ("x", "residual", "weight"), gated_rms_norm: ("x", "gate", "weight")}
every_norm = pytest.mark.parametrize("norm", NORMS, ids=lambda f: f.__name__)


def arguments_of(norm: Callable[..., Any], problem: norms.Problem, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    built = build(problem, dtype, "build_add" if norm is add_rms_norm else "build")
    return {name: value for name, value in built.items() if name in NORMS[norm]}


@every_norm
@cases(*norms.PROBLEMS)
def test_norm(norm: Callable[..., Any], problem: norms.Problem, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(norm, "portable", arguments_of(norm, problem, dtype))


@cases(norms.PROBLEMS[0])
def test_norm_with_a_gate_through_a_sigmoid(problem: norms.Problem, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(gated_rms_norm, "portable", {**build(problem, dtype), "activation": "sigmoid"})


FAR = (-300.0, -80.0, -60.0, -9.0, 0.0, 9.0, 60.0, 300.0)


def silu_alone(name: str, z: Tensor) -> Any:
    """Calls whose result is silu(z) or, of the last, in proportion to it."""
    one = torch.ones_like(z)
    unit, square = one[0], torch.eye(8, dtype=z.dtype, device=z.device)
    return {
        "gated_rms_norm": lambda: gated_rms_norm(one, z, unit, eps=1e-12),
        "gated_rms_norm_linear": lambda: gated_rms_norm_linear(one[:, None], z[:, None], unit, square, eps=1e-12),
        "swiglu_linear": lambda: swiglu_linear(torch.cat([z, one], 1), square),
        "causal_conv1d": lambda: causal_conv1d(z[None], torch.nn.functional.pad(unit[:, None], (3, 0)), activation="silu")[0],
        "skip_gated_rms_norm": lambda: skip_gated_rms_norm(
            one[None, :, None], one[None, :, None], torch.zeros_like(unit[:1]), z[None], unit, eps=1e-12
        ),
    }[name]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["gated_rms_norm", "gated_rms_norm_linear", "swiglu_linear", "causal_conv1d", "skip_gated_rms_norm"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_gates_far_out_of_what_is_multiplied(name: str, tokens: int, dtype: torch.dtype) -> None:
    """In float32 a plain exponential is wrong by 4e-6 at -80 and -60. What is rounded to 16 bits is as near as they come."""
    narrow = torch.tensor([FAR] * tokens, dtype=dtype, device=DEVICE).requires_grad_()
    exact = narrow.detach().double().requires_grad_()
    found, expected = [], []
    for impl, z, kept in (("portable", narrow, found), ("reference", exact, expected)):
        with use(**{name: impl}):
            y = silu_alone(name, z)
            with torch.no_grad():
                kept.extend([y, silu_alone(name, z)])
        if name != "skip_gated_rms_norm":  # whose gradients are differences
            kept.extend(torch.autograd.grad(y.sum(), z))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=1e-40)


@every_norm
def test_norm_of_views_and_of_mixed_types(norm: Callable[..., Any], as_good_as_the_reference: Check) -> None:
    arguments = arguments_of(norm, norms.PROBLEMS[0])
    narrow = {name: arguments[name].bfloat16() for name in ("x", "residual") if name in arguments}
    as_good_as_the_reference(norm, "portable", {**arguments, **narrow})
    x = arguments["x"]
    for view in (torch.cat([x, x], dim=2)[:, :, :3], torch.cat([x, x], dim=3)[..., :40], x.transpose(0, 1)):
        assert not view.is_contiguous()
        other = {name: value.transpose(0, 1) for name, value in arguments.items() if name in ("gate", "residual") and view.shape != x.shape}
        as_good_as_the_reference(norm, "portable", {**arguments, "x": view, **other})


@every_norm
def test_norm_compiles_as_one_graph(norm: Callable[..., Any], as_good_as_the_reference: Check) -> None:
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(norm, "portable", arguments_of(norm, norms.PROBLEMS[0]), run=compiled)


# --- the gates


def test_sums_over_several_blocks_and_programs(monkeypatch: pytest.MonkeyPatch, as_good_as_the_reference: Check) -> None:
    from gdn.ops.gates import portable as gate_row
    from gdn.ops.norm import portable as norm_row

    for module, name, value in ((gate_row, "PARTS", 2), (gate_row, "BLOCK", 16), (norm_row, "PARTS", 2), (norm_row, "TILE", 64)):
        monkeypatch.setattr(module, name, value)
    assert gate_row.parts_of(50, 3)[2:] == (4, 7, 2)
    as_good_as_the_reference(decay_gate, "portable", build(gates.Problem(name="", T=50, HV=3), torch.float32, "build_decay"))
    for norm in (gated_rms_norm, add_rms_norm):
        as_good_as_the_reference(norm, "portable", arguments_of(norm, norms.Problem(name="", shape=(50, 6))))


@cases(*gates.PROBLEMS)
def test_gates(problem: gates.Problem, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(decay_gate, "portable", build(problem, dtype, "build_decay"))
    as_good_as_the_reference(write_gate, "portable", build(problem, dtype, "build_write"))


def test_gates_far_out() -> None:
    """Padding gives exact zeros with finite gradients; small decays keep their relative precision."""
    values = torch.tensor([-float("inf"), -20.0, -9.0, 0.0, 9.0, 300.0], dtype=torch.float64)
    a = values.reshape(1, -1, 1).to(DEVICE)
    bias = torch.zeros(1, dtype=torch.float64, device=DEVICE)
    narrow = [t.float().requires_grad_() for t in (a, bias, bias)]
    with use(decay_gate="portable", write_gate="portable"):
        g, beta = decay_gate(*narrow), write_gate(narrow[0], top=2.0)
    gradients = torch.autograd.grad(g.sum() + beta.sum(), narrow)
    assert g[0, 0, 0] == beta[0, 0, 0] == gradients[0][0, 0, 0] == 0
    assert all(x.isfinite().all() for x in gradients)
    torch.testing.assert_close(g[:, 1:], -torch.log1p(a[:, 1:].exp()).clamp(max=300).float(), rtol=1e-6, atol=0)
    torch.testing.assert_close(beta, 2 * a.sigmoid().float(), rtol=1e-6, atol=0)


def test_gates_compile_as_one_graph(as_good_as_the_reference: Check) -> None:
    for gate, make in ((decay_gate, "build_decay"), (write_gate, "build_write")):
        compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
        as_good_as_the_reference(gate, "portable", build(gates.PROBLEMS[0], torch.float32, make), run=compiled)


# --- the loss


@cases(*losses.PROBLEMS[1:], losses.PROBLEMS[0], narrow=1)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss(problem: losses.Problem, dtype: torch.dtype, reduction: str, as_good_as_the_reference: Check) -> None:
    as_good_as_the_reference(linear_cross_entropy, "portable", {**build(problem, dtype), "reduction": reduction})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_in_small_chunks_and_blocks(
    dtype: torch.dtype, reduction: str, monkeypatch: pytest.MonkeyPatch, as_good_as_the_reference: Check
) -> None:
    monkeypatch.setattr(loss_row, "CHUNK_LOGITS", 60)
    monkeypatch.setattr(loss_row, "BLOCK", 4)
    problem = losses.Problem(name="", tokens=(11,), D=8, vocab=13, ignored=0.3)
    as_good_as_the_reference(linear_cross_entropy, "portable", {**build(problem, dtype), "reduction": reduction})


def test_large_gpus_make_more_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {0: 80 << 30, 1: 24 << 30}
    monkeypatch.setattr(loss_row, "memory_bytes", lambda index: sizes[index])
    found = [loss_row.chunk_logits(torch.device(name)) for name in ("cuda:0", "cuda:1", "cpu")]
    assert found == [2 * loss_row.CHUNK_LOGITS, loss_row.CHUNK_LOGITS, loss_row.CHUNK_LOGITS]


def test_loss_under_autocast_multiplies_bfloat16_and_keeps_float32_gradients() -> None:
    arguments = build(losses.PROBLEMS[1], torch.float32)
    targets = arguments.pop("targets")
    found = []
    for narrow in (False, True):
        leaves = [t.bfloat16() if narrow else t.bfloat16().float().requires_grad_() for t in arguments.values()]
        leaves = [t.detach().requires_grad_() for t in leaves]
        with use(linear_cross_entropy="portable"), torch.autocast(DEVICE, torch.bfloat16):
            loss = linear_cross_entropy(*leaves, targets)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    assert [t.dtype for t in found[0]] == [torch.float32] * 3
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(found[0][1:], found[1][1:]))


def test_loss_under_autocast_to_float16_multiplies_as_without() -> None:
    """Its products would overflow; bfloat16 is what is asked for (the contract says so)."""
    arguments = build(losses.PROBLEMS[1], torch.float32)
    with use(linear_cross_entropy="portable"), torch.autocast(DEVICE, torch.float16):
        narrowed = linear_cross_entropy(**arguments)
    with use(linear_cross_entropy="portable"):
        assert torch.equal(narrowed, linear_cross_entropy(**arguments))


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_of_targets_and_slopes_with_gaps(reduction: str, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    """Every second target, and a slope that is one number for all, as the gradient of a sum is."""
    arguments = build(losses.PROBLEMS[1], dtype)
    targets = arguments["targets"]
    arguments["targets"] = torch.stack([targets, targets * 0 + 5], -1)[..., 0]

    def summed(**given: Any) -> Tensor:
        return linear_cross_entropy(**given, reduction=reduction).sum()

    summed.__name__ = linear_cross_entropy.__name__
    as_good_as_the_reference(summed, "portable", arguments)


def test_loss_of_a_target_out_of_range_is_not_a_number() -> None:
    arguments = build(losses.PROBLEMS[1], torch.float32)
    targets = arguments["targets"].clone()
    targets[3] = 7
    values = loss_row.linear_cross_entropy(arguments["x"], arguments["weight"], targets, -100, "none")
    assert values.isnan().nonzero().tolist() == [[3]]


def test_loss_compiles_as_one_graph(as_good_as_the_reference: Check) -> None:
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(linear_cross_entropy, "portable", build(losses.PROBLEMS[1], torch.float32), run=compiled)


# --- the core


def its_parts() -> dict[str, str] | None:
    """What the core is measured beside on a GPU: the rule's row there, which has tests of its own, has products of 16 bits, or of three
    times TF32, which gradients of A_log, sums that cancel, show."""
    return None if DEVICE == "cpu" else {"delta_core": "composed", "gated_delta_rule": "portable"}


@cases(*cores.PROBLEMS, narrow=1)
def test_core(problem: cores.Problem, dtype: torch.dtype, as_good_as_the_reference: Check) -> None:
    arguments, beside = build(problem, dtype), its_parts()
    as_good_as_the_reference(delta_core, "portable", arguments, beside=beside)
    if problem is cores.PROBLEMS[0]:
        wide = {name: torch.cat([arguments[name]] * 2, dim=2)[:, :, : problem.H] for name in ("q", "k")}
        as_good_as_the_reference(delta_core, "portable", {**arguments, **wide}, beside=beside)


def test_core_compiles_as_one_graph(as_good_as_the_reference: Check) -> None:
    def call(gates: Any, **arguments: Any) -> Any:
        return delta_core(gates=cores.GateParameters(gates.A_log, gates.dt_bias, gates.top), **arguments)

    call.__name__ = "delta_core"
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    as_good_as_the_reference(delta_core, "portable", build(cores.PROBLEMS[0], torch.float32), run=compiled, beside=its_parts())
