"""`gdn doctor`: which implementations can run here, why others cannot, and the error of each against float64.

Every operator is called on one small problem through each of its rows; `gdn.testing.compare` says what an error is and how large it may be.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gdn import ops
from gdn.core import device as hardware
from gdn.core.dispatch import Op, use
from gdn.core.dispatch import ops as tables
from gdn.core.errors import ArgumentError, GdnError
from gdn.core.packing import Packing
from gdn.ops.delta_fused import GateParameters
from gdn.ops.linear_recurrence import problems as linear_recurrence
from gdn.ops.linear_recurrence.problems import Gates
from gdn.ops.linear_step import problems as linear_step
from gdn.testing import compare


@dataclass(frozen=True)
class Finding:
    """One row of one operator."""

    op: str
    impl: str
    chosen: bool
    """Whether this row serves such a call when nothing is forced."""
    reason: str | None = None
    """Why it cannot run here."""
    error: float | None = None
    allowed: float | None = None
    milliseconds: float | None = None

    @property
    def ok(self) -> bool:
        return self.reason is not None or (self.error is not None and self.allowed is not None and self.error <= self.allowed)


def examine(device: str = "auto") -> int:
    """Print the machine and the findings; the exit status is 1 when a row that runs is wrong."""
    if device not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f'device: expected "auto", "cpu" or "cuda", got "{device}"')
    chosen = hardware.default_device() if device == "auto" else torch.device(device)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ArgumentError("device: cuda was asked for, but torch finds no CUDA device here")
    console = Console()
    machine = hardware.machine()
    console.print(
        f"{machine.name}, {machine.memory_bytes / 2**30:.0f} GiB, {machine.threads} threads; "
        f"torch {machine.torch}, triton {machine.triton or 'not installed'}; examining {chosen.type}"
    )
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    findings = [finding for op in tables().values() if op.name in EXAMPLES for finding in examine_op(op, chosen, dtype)]
    console.print(_table(findings, dtype))
    wrong = [f for f in findings if not f.ok]
    for finding in wrong:
        console.print(
            f"[red]{finding.op}: {finding.impl} is wrong here[/]: error {finding.error:.2g}, at most {finding.allowed:.2g} expected"
        )
    console.print("[green]every implementation that runs here agrees with float64[/]" if not wrong else f"[red]{len(wrong)} wrong[/]")
    return 1 if wrong else 0


def examine_op(op: Op, device: torch.device, dtype: torch.dtype) -> list[Finding]:
    """One finding per row of a table."""
    make = EXAMPLES[op.name]
    truth = compare.run(op, "reference", make(torch.device("cpu"), torch.float64, torch.float64))
    allowed = compare.allowed(compare.distance(compare.run(op, "reference", make(device, dtype, torch.float32)), truth), dtype)
    dims = {"K": 64, "V": 64, "D": 64, "W": 4}
    verdicts = op.explain(device.type, dtype, index=device.index or 0, **dims)
    first = next(v.name for v in verdicts if v.reason is None)
    findings = []
    for verdict in verdicts:
        finding = Finding(op.name, verdict.name, verdict.name == first, verdict.reason)
        if verdict.reason is None:
            try:
                error = compare.distance(compare.run(op, verdict.name, make(device, dtype, torch.float32)), truth)
                elapsed = _time(op, verdict.name, make(device, dtype, torch.float32), device)
                finding = dataclasses.replace(finding, error=error, allowed=allowed, milliseconds=elapsed)
            except (GdnError, RuntimeError) as failure:
                finding = dataclasses.replace(finding, error=float("inf"), allowed=allowed, reason=None)
                Console(stderr=True).print(f"[red]{op.name}: {verdict.name} failed[/]: {failure}")
        findings.append(finding)
    return findings


Arguments = dict[str, Any]


def _time(op: Op, impl: str, arguments: Arguments, device: torch.device) -> float:
    """Median milliseconds of a call without gradients, five calls."""
    arguments = {name: v.detach() if isinstance(v, Tensor) else v for name, v in arguments.items()}
    samples = []
    with use(**{op.name: impl}), torch.no_grad():
        for _ in range(6):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            getattr(ops, op.name)(**arguments)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples[1:])


def _table(findings: list[Finding], dtype: torch.dtype) -> Table:
    table = Table(title=f"operators in {str(dtype).removeprefix('torch.')}; the arrow is what a call gets", title_justify="left")
    for column in ("operator", "implementation", "error", "allowed", "ms", ""):
        table.add_column(column, justify="right" if column in ("error", "allowed", "ms") else "left")
    last = ""
    for f in findings:
        name, last = (f.op if f.op != last else ""), f.op
        if f.reason is not None:
            table.add_row(name, f"  {f.impl}", "", "", "", f"[dim]{f.reason}[/]")
            continue
        verdict = "[green]ok[/]" if f.ok else "[red]wrong[/]"
        row = f"{'→' if f.chosen else ' '} {f.impl}"
        table.add_row(name, row, f"{f.error:.1e}", f"{f.allowed:.1e}", f"{f.milliseconds or 0:.2f}", verdict)
    return table


def _random(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Callable[..., Tensor]:
    """Normal tensors that are the same for every device and dtype, rounded once to bfloat16 so that all dtypes start from the same."""
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int, gradient: bool = True, precise: bool = False) -> Tensor:
        values = torch.randn(*shape, generator=generator).bfloat16()
        return values.to(device, wide if precise else dtype).requires_grad_(gradient)

    return make


def _delta_rule(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    q, k, v = random(1, 150, 2, 64), random(1, 150, 2, 64), random(1, 150, 4, 64)
    unit = torch.nn.functional.normalize(k.detach().double(), dim=-1).bfloat16().to(dtype).requires_grad_()
    g = (-random(1, 150, 4, precise=True).detach().abs() / 8).requires_grad_()
    beta = random(1, 150, 4, precise=True).detach().sigmoid().mul(2).bfloat16().to(wide).requires_grad_()
    start = random(2, 4, 64, 64, precise=True)
    packing = Packing.from_lengths([83, 67], device=device)
    return {"q": q, "k": unit, "v": v, "g": g, "beta": beta, "initial_state": start, "packing": packing}


def _delta_core(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    q, k, v = random(2, 100, 2, 64), random(2, 100, 2, 64), random(2, 100, 4, 64)
    gates = GateParameters(random(4, precise=True), random(4, precise=True))
    return {"q": q, "k": k, "v": v, "a": random(2, 100, 4), "b": random(2, 100, 4), "gates": gates}


def _linear(gates: Gates) -> Callable[[torch.device, torch.dtype, torch.dtype], Arguments]:
    problem = linear_recurrence.Problem(name="", T=150, H=2, HV=4, K=64, V=64, lengths=(83, 67), initial=True)
    return lambda device, dtype, wide: problem.build(gates, dtype=dtype, device=str(device))


def _linear_step(gates: Gates) -> Callable[[torch.device, torch.dtype, torch.dtype], Arguments]:
    problem = linear_step.Problem(name="", B=2, T=3, H=2, HV=4, K=64, V=64)
    return lambda device, dtype, wide: problem.build(gates, dtype=dtype, device=device)


def _delta_step(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    arguments = {name: v.detach() for name, v in _delta_rule(device, dtype, wide).items() if isinstance(v, Tensor)}
    state = arguments.pop("initial_state").clone()
    arguments = {name: v[:, :6].reshape(2, 3, *v.shape[2:]) for name, v in arguments.items()}
    return {**arguments, "state": state}


def _conv(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    packing = Packing.from_lengths([40, 2, 58], device=device)
    return {
        "x": random(1, 100, 64),
        "weight": random(64, 4),
        "bias": random(64),
        "activation": "silu",
        "initial_state": random(3, 3, 64),
        "packing": packing,
    }


def _conv_step(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    tensors = {"x": (2, 2, 64), "weight": (64, 4), "state": (2, 3, 64), "bias": (64,)}
    return {name: random(*shape, gradient=False) for name, shape in tensors.items()} | {"activation": "silu"}


def _simple(**shapes: tuple[int, ...]) -> Callable[[torch.device, torch.dtype, torch.dtype], Arguments]:
    def make(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
        random = _random(device, dtype, wide)
        return {name: random(*shape, precise=name in ("A_log", "dt_bias")) for name, shape in shapes.items()}

    return make


def _attention(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    packing = Packing.from_lengths([83, 67], device=device)
    return {"q": random(1, 150, 4, 64), "k": random(1, 150, 2, 64), "v": random(1, 150, 2, 64), "window": 50, "packing": packing}


def _sigmoid_attention(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    slopes = (0.5 ** torch.arange(1.0, 5.0)).to(device, wide).requires_grad_()
    return {**_attention(device, dtype, wide), "slopes": slopes}


def _loss(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    targets = torch.arange(70, device=device) * 3 % 97
    targets[5] = -100
    return {"x": random(70, 64), "weight": random(97, 64), "targets": targets}


EXAMPLES: dict[str, Callable[[torch.device, torch.dtype, torch.dtype], Arguments]] = {
    "gated_delta_rule": _delta_rule,
    "gated_delta_step": _delta_step,
    "delta_core": _delta_core,
    "causal_conv1d": _conv,
    "causal_conv1d_step": _conv_step,
    "l2norm": _simple(x=(50, 64)),
    "rms_norm": _simple(x=(50, 64), weight=(64,)),
    "gated_rms_norm": _simple(x=(50, 64), gate=(50, 64), weight=(64,)),
    "decay_gate": _simple(a=(2, 50, 4), A_log=(4,), dt_bias=(4,)),
    "write_gate": _simple(b=(2, 50, 4)),
    "linear_cross_entropy": _loss,
    "causal_attention": _attention,
    "windowed_sigmoid_attention": _sigmoid_attention,
    "linear_attention": _linear("head"),
    "gated_linear_attention": _linear("key"),
    "value_gated_linear_attention": _linear("value"),
    "linear_attention_step": _linear_step("head"),
    "gated_linear_attention_step": _linear_step("key"),
    "value_gated_linear_attention_step": _linear_step("value"),
}
"""A small problem for each operator: (device, dtype of activations, dtype of gates and states) -> arguments of its contract."""
