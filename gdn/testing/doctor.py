"""`gdn doctor`: which implementations can run here, why others cannot, the error of each against float64, and its time.

Every operator is called on one small problem through each of its rows; `gdn.testing.compare` says what an error is and how large it may be.
The time is that of a forward call as it is made, so on a GPU most of it is the host's.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from gdn import ops
from gdn.core import device as hardware
from gdn.core import portable_plan
from gdn.core.dispatch import Op, use
from gdn.core.dispatch import ops as tables
from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.ops.delta_fused import GateParameters
from gdn.ops.linear_recurrence import problems as linear_recurrence
from gdn.ops.linear_recurrence.problems import Gates
from gdn.ops.linear_step import problems as linear_step
from gdn.testing import compare, compile_ahead

REFERENCE = "reference"
"""The row of every operator that the others are held to."""


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
    examined: bool = True
    """False where the time was up before this operator."""

    @property
    def ok(self) -> bool:
        return self.reason is not None or (self.error is not None and self.allowed is not None and self.error <= self.allowed)


def examine(device: str = "auto", seconds: float = 55) -> int:
    """Print the machine and the findings; the exit status is 1 when a row that runs is wrong or nothing was examined.

    Args:
        device: "auto", "cpu" or "cuda".
        seconds: operators that are not begun by then are listed as not examined; 0 is no limit.
    """
    if seconds < 0:
        raise ArgumentError(f"seconds: expected 0 (no limit) or more, got {seconds}")
    begin = time.monotonic()
    ends = begin + seconds if seconds else float("inf")
    chosen = hardware.named_device(device)
    console = Console()
    machine = hardware.machine()
    console.print(
        f"{machine.name}, {machine.memory_bytes / 2**30:.0f} GiB, {machine.threads} threads; "
        f"torch {machine.torch}, triton {machine.triton or 'not installed'}; examining {chosen.type}"
    )
    if chosen.type == "cuda" and machine.triton:
        _say_how_kernels_are_launched(console)
    dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    names = [name for name in tables() if name in EXAMPLES]
    findings: list[Finding] = []
    with console.status("") as status:
        expected = _prepare(names, chosen, dtype, ends, status.update)
        for name in names:
            status.update(name)
            if time.monotonic() > ends:
                findings.append(Finding(name, "", False, reason=f"not examined: {seconds:g} s are over", examined=False))
            else:
                findings += examine_op(tables()[name], chosen, dtype, expected.get(name))
    console.print(_table(findings, dtype))
    return _verdict(findings, console, time.monotonic() - begin)


def _say_how_kernels_are_launched(console: Console) -> None:
    """If not as fast as they could be."""
    reason = portable_plan.why_not()
    if reason:
        console.print(escape(f"eager calls take the host longer than they need, as each kernel is launched by itself: {reason}"))


class Expected(NamedTuple):
    """What the rows of an operator are held to."""

    truth: compare.Results
    """Of its reference in float64 on the CPU."""
    error: float
    """Of its reference in the dtype and on the device that are examined."""


def _prepare(names: list[str], device: torch.device, dtype: torch.dtype, ends: float, say: Callable[[str], None]) -> dict[str, Expected]:
    """What is expected of operators, of as many as half of the time allows, while other processes compile Triton's kernels."""
    half = time.monotonic() + (ends - time.monotonic()) / 2
    ahead = compile_ahead.start(names, device, dtype)
    found = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of small tensors: on two busy cores two threads take 71 s to wait for each other, one takes 4
    try:
        for name in names:
            if time.monotonic() > half:
                break
            say(f"{name} by its reference")
            found[name] = _expected(tables()[name], device, dtype)
    finally:
        torch.set_num_threads(threads)
    if ahead is not None:
        say("compiling Triton kernels")
        ahead.join(half)
    return found


def _verdict(findings: list[Finding], console: Console, seconds: float) -> int:
    wrong, left = [f for f in findings if not f.ok], [f for f in findings if not f.examined]
    for finding in wrong:
        console.print(
            f"[red]{finding.op}: {finding.impl} is wrong here[/]: error {finding.error:.2g}, at most {finding.allowed:.2g} expected"
        )
    if left:
        console.print(f"[yellow]{len(left)} operators not examined[/]: again, or with --seconds 0; what was compiled is kept")
    if wrong:
        console.print(f"[red]{len(wrong)} wrong[/], after {seconds:.0f} s")
    elif len(left) == len(findings):
        console.print(f"[red]nothing was examined[/], after {seconds:.0f} s")
    else:
        what = "every implementation that was examined" if left else "every implementation that runs here"
        console.print(f"[green]{what} agrees with float64[/], after {seconds:.0f} s")
    return 1 if wrong or len(left) == len(findings) else 0


def _expected(op: Op, device: torch.device, dtype: torch.dtype) -> Expected:
    make = EXAMPLES[op.name]
    truth = compare.run(op, REFERENCE, make(torch.device("cpu"), torch.float64, torch.float64))
    return Expected(truth, compare.distance(compare.run(op, REFERENCE, make(device, dtype, torch.float32)), truth))


def examine_op(op: Op, device: torch.device, dtype: torch.dtype, expected: Expected | None = None) -> list[Finding]:
    """One finding per row of a table."""
    make = EXAMPLES[op.name]
    truth, own = expected or _expected(op, device, dtype)
    allowed = compare.allowed(own, dtype)
    dims = {"K": 64, "V": 64, "D": 64, "W": 4}
    verdicts = op.explain(device.type, dtype, index=device.index or 0, compiled=False, **dims)
    first = next(v.name for v in verdicts if v.reason is None)
    findings = []
    for verdict in verdicts:
        finding = Finding(op.name, verdict.name, verdict.name == first, verdict.reason)
        if verdict.reason is None:
            try:
                error = own
                if verdict.name != REFERENCE:
                    error = compare.distance(compare.run(op, verdict.name, make(device, dtype, torch.float32)), truth)
                with use(**{op.name: verdict.name}):
                    elapsed = milliseconds(without_gradients(op, make(device, dtype, torch.float32)), device)
                finding = dataclasses.replace(finding, error=error, allowed=allowed, milliseconds=elapsed)
            except Exception as failure:  # what a compiler raises has no common ancestor
                finding = dataclasses.replace(finding, error=float("inf"), allowed=allowed, reason=None)
                Console(stderr=True).print(f"[red]{op.name}: {verdict.name} failed[/]: {type(failure).__name__}: {failure}", markup=True)
        findings.append(finding)
    return findings


Arguments = dict[str, Any]


def without_gradients(op: Op, arguments: Arguments) -> Callable[[], Any]:
    """A call of the operator as it is timed, inside `use` of the row: choosing by name costs more than a small operator."""
    arguments = {name: v.detach() if isinstance(v, Tensor) else v for name, v in arguments.items()}

    def call() -> Any:
        with torch.no_grad():
            return getattr(ops, op.name)(**arguments)

    return call


CALLS, FEWEST, SECONDS = 20, 3, 0.3
"""A time is a median of so many calls, or of as many as fit in the seconds; of a single one where fewer than FEWEST fit."""


def milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call after one that does not count: between events of the device where it has them, by the clock otherwise."""
    _clocked(call, device, 1)
    once = _clocked(call, device, 1)[0]
    count = min(CALLS, int(1e3 * SECONDS / max(once, 1e-3)))
    if count < FEWEST:
        return once
    return statistics.median(_between_events(call, count) if device.type == "cuda" else _clocked(call, device, count))


def _between_events(call: Callable[[], Any], count: int) -> list[float]:
    pairs = []
    for _ in range(count):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def _clocked(call: Callable[[], Any], device: torch.device, count: int) -> list[float]:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def _table(findings: list[Finding], dtype: torch.dtype) -> Group:
    """With a number for each reason that something does not run, which are told below."""
    table = Table(title=f"operators in {str(dtype).removeprefix('torch.')}; the arrow is what a call gets", title_justify="left")
    table.add_column("operator", overflow="fold")
    for column in ("error", "allowed", "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    reasons = {reason: f"({i})" for i, reason in enumerate(dict.fromkeys(f.reason for f in findings if f.reason is not None), 1)}
    last = ""
    for f in findings:
        why = "" if f.reason is None else f"[dim]{reasons[f.reason]}[/]"
        if f.op != last:
            table.add_row(f"[bold]{f.op}[/]", "", "", "", "" if f.examined else why)
            last = f.op
        if not f.examined:
            continue
        row = f"{'→' if f.chosen else ' '} {f.impl}"
        if f.reason is not None:
            table.add_row(row, "", "", "", why)
        else:
            elapsed = "" if f.milliseconds is None else f"{f.milliseconds:.2f}"
            table.add_row(row, f"{f.error:.1e}", f"{f.allowed:.1e}", elapsed, "[green]ok[/]" if f.ok else "[red]wrong[/]")
    return Group(table, *(f"[dim]{number} {escape(reason)}[/]" for reason, number in reasons.items()))


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
    return _stepping(_delta_rule(device, dtype, wide))


def _stepping(arguments: Arguments) -> Arguments:
    """From arguments of a rule over one packed row of two documents to those of its step: two sequences of three tokens."""
    arguments = {name: v.detach() for name, v in arguments.items() if isinstance(v, Tensor)}
    state = arguments.pop("initial_state").clone()
    arguments = {name: v[:, :6].reshape(2, 3, *v.shape[2:]) for name, v in arguments.items()}
    return {**arguments, "state": state}


def _delta_product(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    arguments, random = _delta_rule(device, dtype, wide), _random(device, dtype, wide)
    unit = torch.nn.functional.normalize(random(1, 150, 2, 2, 64).detach().double(), dim=-1).bfloat16().to(dtype).requires_grad_()
    beta = random(1, 150, 2, 4, precise=True).detach().sigmoid().mul(2).bfloat16().to(wide).requires_grad_()
    return {**arguments, "k": unit, "v": random(1, 150, 2, 4, 64), "beta": beta}


def _delta_product_step(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    return _stepping(_delta_product(device, dtype, wide))


def _delta_channel(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    g = (-_random(device, dtype, wide)(1, 150, 4, 64, precise=True).detach().abs() / 8).requires_grad_()
    return {**_delta_rule(device, dtype, wide), "g": g}


def _delta_channel_step(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    return _stepping(_delta_channel(device, dtype, wide))


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


def _qkv(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    packing = Packing.from_lengths([83, 67], device=device)
    return {"x": random(1, 150, 192), "weight": random(192, 4), "heads": 2, "head_dim": 32, "packing": packing}


def _simple(**shapes: tuple[int, ...]) -> Callable[[torch.device, torch.dtype, torch.dtype], Arguments]:
    def make(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
        random = _random(device, dtype, wide)
        return {name: random(*shape, precise=name in ("A_log", "dt_bias")) for name, shape in shapes.items()}

    return make


def _rotary(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    angles = random(50, 8, gradient=False, precise=True)
    return {"x": random(2, 50, 3, 20), "cos": angles.cos(), "sin": angles.sin()}


def _scale_heads(device: torch.device, dtype: torch.dtype, wide: torch.dtype) -> Arguments:
    random = _random(device, dtype, wide)
    return {"x": random(2, 50, 4, 16), "factor": random(2, 50, 4, precise=True)}


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
    "gated_delta_product": _delta_product,
    "gated_delta_product_step": _delta_product_step,
    "channel_delta_rule": _delta_channel,
    "channel_delta_step": _delta_channel_step,
    "delta_core": _delta_core,
    "causal_conv1d": _conv,
    "causal_conv1d_step": _conv_step,
    "convolved_qkv": _qkv,
    "l2norm": _simple(x=(50, 64)),
    "rms_norm": _simple(x=(50, 64), weight=(64,)),
    "add_rms_norm": _simple(x=(50, 64), residual=(50, 64), weight=(64,)),
    "gated_rms_norm": _simple(x=(50, 64), gate=(50, 64), weight=(64,)),
    "swiglu_linear": _simple(x=(50, 64), weight=(48, 32)),
    "gated_rms_norm_linear": _simple(x=(50, 2, 64), gate=(50, 2, 64), norm_weight=(64,), weight=(48, 128)),
    "parallel_linear": _simple(x=(50, 64), first=(48, 64), second=(40, 64), third=(8, 64)),
    "decay_gate": _simple(a=(2, 50, 4), A_log=(4,), dt_bias=(4,)),
    "write_gate": _simple(b=(2, 50, 4)),
    "rotary_embedding": _rotary,
    "scale_heads": _scale_heads,
    "skip_gated_rms_norm": _simple(y=(2, 50, 4, 16), x=(2, 50, 4, 16), D=(4,), gate=(2, 50, 64), weight=(64,)),
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
