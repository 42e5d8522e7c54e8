"""Tensors of more than 2^31 numbers: the last of them, by every Triton row, against the same numbers alone.

All but one corner of each huge argument is 0, and so is the gradient of each huge result. On a GPU kernels run whole. On the CPU most of
the memory is promised and never touched, and of each launch only the programs run that own the corner; there the interpreter fails where
an int32 overflows.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import gpu
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from gdn import ops
from gdn.core.device import interprets_triton
from gdn.core.dispatch import use
from gdn.core.packing import Packing
from gdn.core.replay import _ALLOCATIONS
from gdn.ops.delta_fused import portable as fused
from gdn.ops.delta_rule import portable as rule
from gdn.ops.gates import portable as gates
from gdn.ops.linear_recurrence import portable_plan as plans
from gdn.ops.loss import portable as loss
from gdn.ops.projection import portable as projection
from gdn.ops.projection import portable_few as few

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LEAST = 2**31
COPIES = 6
"""Memory that suffices, by that of the huge arguments: themselves, results, the gradients of both, and what kernels put down between."""
MAP_NORESERVE = 0x4000
"""Of Linux; Python 3.11 does not name it."""

Shape = tuple[int, ...]
Shapes = dict[str, Shape]


def last_two(programs: int) -> Iterable[int]:
    return range(programs - 2, programs)


def last_four(programs: int) -> Iterable[int]:
    """Those of a head of 64 columns, of which a step of several writes gives each program 16."""
    return range(programs - 4, programs)


@dataclass(frozen=True)
class Case:
    call: Callable[..., Any]
    corner: Shapes
    """Of the arguments that are compared."""
    whole: Shapes
    """Of the huge ones, in whose last corner the same numbers stand."""
    wide: str = ""
    """Names of arguments in float32."""
    fixed: str = ""
    """Of those without a gradient; all if "*"."""
    rest: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = ()
    """Of documents; only the last is compared."""
    slices: bool = False
    """Whether huge arguments of heads are slices of rows twice as wide."""
    programs: Callable[[int], Iterable[int]] = last_two
    """Those that own the corner, where others are left out; of a launch of up to 8 all run."""
    patches: tuple[tuple[Any, str, Any], ...] = ()
    """What to change there: module, name, value."""

    def arguments(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Alone, and as the corner of something huge."""
        alone, huge = dict(self.rest), dict(self.rest)
        for i, (name, shape) in enumerate(self.corner.items()):
            whole, trained = self.whole.get(name, shape), self.trains and name not in self.fixed.split()
            x = numbers(name, shape, torch.float32 if name in self.wide.split() else torch.bfloat16, i)
            huge[name] = around(x, whole, self.slices).requires_grad_(trained)
            alone[name] = x.requires_grad_(trained)
        if self.lengths:
            alone["packing"] = Packing.from_lengths(self.lengths[-1:], device=DEVICE)
            huge["packing"] = Packing.from_lengths(self.lengths, device=DEVICE)
        if "state" in self.whole:
            (count, _, *_), (batch, *_) = self.whole["state"], next(iter(self.whole.values()))
            alone["slots"] = torch.zeros(1, dtype=torch.int32, device=DEVICE)
            huge["slots"] = torch.tensor([-1] * (batch - 1) + [count - 1], dtype=torch.int32, device=DEVICE)
        return alone, huge

    @property
    def trains(self) -> bool:
        return self.fixed != "*"

    @property
    def memory(self) -> int:
        """Bytes of a GPU that suffice."""
        arguments = sum(math.prod(shape) * (4 if name in self.wide.split() else 2) for name, shape in self.whole.items())
        return (COPIES + self.slices) * arguments


def numbers(name: str, shape: Shape, dtype: torch.dtype, seed: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if name in ("g", "A_log"):
        x = -x.abs()
    elif name in ("beta", "cos", "sin"):
        x = x.sigmoid()
    elif name == "k":
        x = torch.nn.functional.normalize(x, dim=-1)
    return x.to(DEVICE, dtype)


def around(corner: Tensor, whole: Shape, slices: bool = False) -> Tensor:
    """Zeros in whose last corner these numbers stand."""
    if slices and len(whole) == 4:
        x = zeros((*whole[:2], 2 * whole[2], whole[3]), corner.dtype)[:, :, whole[2] :]
    else:
        x = zeros(whole, corner.dtype)
    last(x, corner.shape).copy_(corner)
    return x


def last(x: Tensor, shape: Shape) -> Tensor:
    return x[tuple(slice(full - size, full) for full, size in zip(x.shape, shape, strict=True))]


def zeros(shape: Shape, dtype: torch.dtype) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE) if DEVICE == "cuda" else promised(shape, dtype)


def promised(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are written."""
    size = max(1, math.prod(shape)) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return torch.frombuffer(memory, dtype=dtype)[: math.prod(shape)].view(shape)


class Promises(TorchDispatchMode):
    """What rows allocate is promised too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        if func.overloadpacket in _ALLOCATIONS:
            like = func(*args, **{**named, "device": "meta"})
            assert like.is_contiguous()
            return promised(like.shape, like.dtype)
        return func(*args, **named)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Case], None]]:
    """From then on the interpreter runs those programs alone that a case names."""
    if DEVICE == "cuda":
        yield lambda case: None
        return
    if not interprets_triton():
        pytest.skip("needs a CUDA device or Triton's interpreter")
    from triton.runtime import interpreter

    chosen: list[Case] = []
    run, builder = interpreter.GridExecutor.__call__, interpreter.interpreter_builder
    begin, place = builder.set_grid_dim, builder.set_grid_idx

    def some(self: Any, *args: Any, **named: Any) -> Any:
        if not chosen:
            return run(self, *args, **named)
        (whole,) = self.grid
        ids = sorted({i for i in chosen[0].programs(whole) if 0 <= i < whole}) if whole > 8 else range(whole)
        self.grid = (len(ids),)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(builder, "set_grid_dim", lambda x, y, z: begin(whole, y, z))
            patch.setattr(builder, "set_grid_idx", lambda x, y, z: place(ids[x], y, z))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", RuntimeWarning)  # of programs that find nothing where others did not run
                return run(self, *args, **named)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", some)
    monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda self, args, named: (args, named))  # else all is copied
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *args: None)

    def choose(case: Case) -> None:
        chosen.append(case)
        for patch in case.patches:
            monkeypatch.setattr(*patch)
        forget_plans()

    with Promises():
        yield choose
    forget_plans()


def forget_plans() -> None:
    for cached in (rule.plan, plans.plan):
        cached.cache_clear()


def outcome(case: Case, arguments: dict[str, Any], slopes: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients (or a memory that was moved on), and the gradients of the results: random numbers, or those given in zeros."""
    name = getattr(case.call, "__name__", "")
    with use(**({name: "portable"} if name in ops.__all__ else {})):
        found = case.call(**arguments)
        results = [found] if isinstance(found, Tensor) else list(found)
        if not case.trains:
            return [*results, *[arguments[each] for each in ("state",) if each in arguments]], []
        if slopes is None:
            slopes = [numbers("", x.shape, x.dtype, 100 + i) for i, x in enumerate(results)]
        else:
            slopes = [around(d, tuple(x.shape)) for d, x in zip(slopes, results, strict=True)]
        leaves = [x for x in arguments.values() if isinstance(x, Tensor) and x.requires_grad]
        return [*results, *torch.autograd.grad(results, leaves, slopes)], slopes


def same(actual: Tensor, expected: Tensor) -> bool:
    """Up to the order of sums. Numbers from elsewhere are wrong by their own size."""
    assert expected.any() and expected.isfinite().all()
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm()) <= torch.finfo(torch.bfloat16).eps


HEADS, WIDTH = 32, 64
LENGTHS = (2048,) * 512 + (50,)
ROWS, LONGER, MANY, PAIRS = (9216, 64 + 50), (1000, 16 * 64 + 50), (16400, 16), (18432, 32 + 25)
"""Rows, and tokens of a row. Of many their states alone are huge; of pairs each token has two writes."""


def recurrence(
    call: Callable[..., Any],
    *decays: int,
    more: tuple[str, ...] = (),
    wide: str = "g",
    rows: tuple[int, int] | None = None,
    writes: tuple[int, ...] = (),
) -> Case:
    """Decays are those of heads or of channels. Packed unless there are rows."""

    def shapes(B: int, T: int, H: int, N: int) -> Shapes:
        tokens = {"q": (B, T, H, WIDTH), **dict.fromkeys(("k", "v"), (B, T, *writes, H, WIDTH))}
        others = {"g": (B, T, H, *decays), **dict.fromkeys(more, (B, T, *writes, H))}
        return tokens | others | ({} if rows in (ROWS, LONGER, PAIRS) else {"initial_state": (N, H, WIDTH, WIDTH)})

    def programs(count: int) -> Iterable[int]:
        """Of the last chunk and, where rows have two, of the one before: two a chunk, or one or two a head."""
        return [count - i for i in (1, 2, *((3, 4, HEADS + 1, HEADS + 2) if rows in (ROWS, PAIRS) else ()))]

    (B, T), lengths = rows or (1, sum(LENGTHS)), () if rows else LENGTHS
    return Case(
        call,
        shapes(1, min(T, 50 // math.prod(writes)), 1, 1),
        shapes(B, T, HEADS, len(lengths) or B),
        wide=f"beta initial_state {wide}",
        lengths=lengths,
        programs=programs,
        patches=((rule, "segment_chunks", whole_documents), (plans, "segment_chunks", whole_documents)),
    )


def whole_documents(*sizes: Any) -> int:
    """No segments."""
    return 0


def attention(rows: tuple[int, int] = (1, sum(LENGTHS)), **more: Any) -> Case:
    def shapes(B: int, T: int, H: int) -> Shapes:
        return dict.fromkeys(("q", "k", "v"), (B, T, H, WIDTH)) | {"slopes": (H,)}

    return Case(ops.windowed_sigmoid_attention, shapes(1, 50, 1), shapes(*rows, HEADS), rest={"window": 64}, **more)


def conv(rows: tuple[int, int] = (1, sum(LENGTHS)), lengths: tuple[int, ...] = ()) -> Case:
    """With a state, whose gradient needs the first tokens of a row, where rows are compared from the first on."""
    T = 50 if rows[0] == 1 else rows[1]

    def shapes(B: int, T: int, D: int, N: int) -> Shapes:
        return {"x": (B, T, D), "weight": (D, 4), "bias": (D,), **({"initial_state": (N, 3, D)} if lengths or B * N > 1 else {})}

    whole = shapes(*rows, 2048, len(lengths) or rows[0])
    corner = shapes(1, T, 512, 1) | ({"initial_state": (1, 3, 512)} if "initial_state" in whole else {})
    return Case(ops.causal_conv1d, corner, whole, rest={"activation": "silu"}, lengths=lengths)


def norm(call: Callable[..., Any], *names: str) -> Case:
    def shapes(count: int) -> Shapes:
        return {"x": (count, 16384), **{name: (16384,) if name == "weight" else (count, 16384) for name in names}}

    return Case(call, shapes(2), shapes(2**17 + 2))


def of_heads(call: Callable[..., Any], more: Callable[[int], Shapes] = lambda T: {}, **rest: Any) -> Case:
    """With vectors of heads of tokens, 64 of which a program has at the least."""

    def shapes(T: int) -> Shapes:
        return {"x": (1, T, HEADS, WIDTH), **more(T)}

    return Case(call, shapes(2), shapes(2**20 + 2), **rest)


def skip_norm() -> Case:
    def shapes(T: int) -> Shapes:
        return {"y": (1, T, 128, 64), "x": (1, T, 128, 64), "D": (128,), "gate": (1, T, 8192), "weight": (8192,)}

    return Case(ops.skip_gated_rms_norm, shapes(2), shapes(2**18 + 2))


def decay_gate() -> Case:
    def shapes(T: int) -> Shapes:
        return {"a": (1, T, 1024), "A_log": (1024,), "dt_bias": (1024,)}

    return Case(ops.decay_gate, shapes(1), shapes(2**21 + 2), wide="A_log dt_bias", patches=((gates, "PARTS", 1 << 15),))


def prepared(q: Tensor, k: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, ...]:
    """What stands before the rule in `delta_core`."""
    return fused._PREPARE(q, k, a, b, A_log, dt_bias, 2.0)


def core() -> Case:
    """Programs have a token of q, one of k, or gates: these come last forward and first backward."""

    def shapes(T: int) -> Shapes:
        vectors: Shapes = dict.fromkeys(("q", "k"), (1, T, HEADS, WIDTH))
        return {**vectors, "a": (1, T, HEADS), "b": (1, T, HEADS), "A_log": (HEADS,), "dt_bias": (HEADS,)}

    T = 2**20 + 2

    def programs(count: int) -> Iterable[int]:
        others = count - 2 * T
        before = others if others <= gates.PARTS else 0
        ends = (before + T, before + 2 * T)
        return (before - 1, *[end - i for end in ends for i in (1, 2)], count - 1)

    return Case(prepared, shapes(2), shapes(T), wide="A_log dt_bias", programs=programs)


def qkv(rows: int) -> Case:
    """A piece is four programs. Half of the channels are values."""

    def shapes(B: int, T: int) -> Shapes:
        return {"x": (B, T, 2048), "weight": (2048, 4)}

    whole = shapes(1, 2**21 + 50) if rows == 1 else shapes(rows, 50)
    rest = {"heads": 8, "head_dim": 64}
    return Case(ops.convolved_qkv, shapes(1, 50), whole, rest=rest, programs=lambda count: range(count - 4, count))


def conv_step() -> Case:
    def shapes(B: int, D: int, N: int) -> Shapes:
        return {"x": (B, 2, D), "weight": (D, 4), "state": (N, 3, D)}

    return Case(ops.causal_conv1d_step, shapes(1, 256, 1), shapes(2**19 + 1, 2048, 350000), fixed="*")


def delta_step() -> Case:
    def shapes(B: int, H: int, N: int) -> Shapes:
        tokens = dict.fromkeys(("q", "k", "v"), (B, 2, H, WIDTH))
        return tokens | dict.fromkeys(("g", "beta"), (B, 2, H)) | {"state": (N, H, WIDTH, WIDTH)}

    return Case(ops.gated_delta_step, shapes(1, 1, 1), shapes(2**19 + 1, HEADS, 16400), wide="g beta state", fixed="*", programs=last_four)


def linear_step(call: Callable[..., Any], *decays: int) -> Case:
    """The pool is huge, and where a channel has a decay of its own they are too."""

    def shapes(B: int, H: int, N: int) -> Shapes:
        tokens = dict.fromkeys(("q", "k", "v"), (B, 2, H, WIDTH))
        return tokens | {"g": (B, 2, H, *decays), "state": (N, H, WIDTH, WIDTH)}

    return Case(call, shapes(1, 1, 1), shapes(2**19 + 1, HEADS, 16400), fixed="*", programs=last_four)


def channel_step() -> Case:
    case = linear_step(ops.channel_delta_step, WIDTH)
    corner, whole = ({**shapes, "beta": shapes["v"][:3]} for shapes in (case.corner, case.whole))
    return Case(case.call, corner, whole, fixed="*", programs=case.programs)


def product_step() -> Case:
    """The keys and values of all writes are huge."""

    def shapes(B: int, H: int, N: int) -> Shapes:
        writes = dict.fromkeys(("k", "v"), (B, 2, 2, H, WIDTH))
        gates = {"g": (B, 2, H), "beta": (B, 2, 2, H)}
        return {"q": (B, 2, H, WIDTH), **writes, **gates, "state": (N, H, WIDTH, WIDTH)}

    whole = shapes(2**18 + 1, HEADS, 16400)
    return Case(ops.gated_delta_product_step, shapes(1, 1, 1), whole, wide="g beta", fixed="*", programs=last_four)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """How the loss scales its gradients."""
    return loss._scaled(x, factor, factor.new_ones(()), torch.bfloat16)


def angles(T: int) -> Shapes:
    return dict.fromkeys(("cos", "sin"), (T, WIDTH // 2))


FEW, HUGE = {"weight": (16, 1024)}, {"weight": (2**21 + 16, 1024)}
TURNED = {"more": angles, "wide": "cos sin", "fixed": "cos sin"}
CASES = {
    "sigmoid attention": attention(),
    "sigmoid attention, rows": attention(ROWS),
    "sigmoid attention, slices": attention(slices=True),
    "sigmoid attention, packed": attention(lengths=LENGTHS),
    "gated delta rule": recurrence(ops.gated_delta_rule, more=("beta",), rows=ROWS),
    "gated delta rule, many": recurrence(ops.gated_delta_rule, more=("beta",), rows=MANY),
    "gated delta rule, packed": recurrence(ops.gated_delta_rule, more=("beta",)),
    "gated delta product": recurrence(ops.gated_delta_product, more=("beta",), rows=PAIRS, writes=(2,)),
    "channel delta rule": recurrence(ops.channel_delta_rule, WIDTH, more=("beta",), wide="", rows=ROWS),
    "channel delta rule, many": recurrence(ops.channel_delta_rule, WIDTH, more=("beta",), wide="", rows=MANY),
    "channel delta rule, packed": recurrence(ops.channel_delta_rule, WIDTH, more=("beta",), wide=""),
    "linear attention": recurrence(ops.linear_attention, rows=LONGER),
    "linear attention, many": recurrence(ops.linear_attention, rows=MANY),
    "linear attention, packed": recurrence(ops.linear_attention),
    "gated linear attention": recurrence(ops.gated_linear_attention, WIDTH, wide="", rows=LONGER),
    "gated linear attention, many": recurrence(ops.gated_linear_attention, WIDTH, wide="", rows=MANY),
    "gated linear attention, packed": recurrence(ops.gated_linear_attention, WIDTH, wide=""),
    "value gated linear attention": recurrence(ops.value_gated_linear_attention, WIDTH, wide="", rows=LONGER),
    "value gated linear attention, packed": recurrence(ops.value_gated_linear_attention, WIDTH, wide=""),
    "short convolution": conv(),
    "short convolution, rows": conv((10500, 100)),
    "short convolution, packed": conv(lengths=LENGTHS),
    "short convolution, step": conv_step(),
    "convolved q, k, v": qkv(1),
    "convolved q, k, v, rows": qkv(42000),
    "core": core(),
    "delta step": delta_step(),
    "channel step": channel_step(),
    "product step": product_step(),
    "linear step": linear_step(ops.linear_attention_step),
    "gated linear step": linear_step(ops.gated_linear_attention_step, WIDTH),
    "value gated linear step": linear_step(ops.value_gated_linear_attention_step, WIDTH),
    "l2norm": of_heads(ops.l2norm),
    "l2norm, slices": of_heads(ops.l2norm, slices=True),
    "rms norm": norm(ops.rms_norm, "weight"),
    "add rms norm": norm(ops.add_rms_norm, "residual", "weight"),
    "gated rms norm": norm(ops.gated_rms_norm, "gate", "weight"),
    "rotary embedding": of_heads(ops.rotary_embedding, **TURNED),
    "rotary embedding, slices": of_heads(ops.rotary_embedding, slices=True, **TURNED),
    "scaled heads": of_heads(ops.scale_heads, lambda T: {"factor": (1, T, HEADS)}, wide="factor"),
    "skip and norm": skip_norm(),
    "decay gate": decay_gate(),
    "write gate": Case(ops.write_gate, {"b": (1, 2, HEADS)}, {"b": (1, 2**26 + 2, HEADS)}),
    "swiglu": Case(projection._product, {"x": (2, 2048)}, {"x": (2**21 + 2, 2048)}, fixed="*"),
    "swiglu, backward": Case(
        projection._product_backward,
        {"x": (2, 2048), "slope": (2, 1024)},
        {"x": (2**21 + 2, 2048), "slope": (2**21 + 2, 1024)},
        fixed="*",
    ),
    "few tokens, swiglu": Case(few.swiglu_linear, {"x": (2, 2048), **FEW}, HUGE, fixed="*"),
    "few tokens, gated norm": Case(
        lambda **given: few.gated_rms_norm_linear(**given, eps=1e-5, silu=True),
        {"x": (2, 8, 128), "gate": (2, 8, 128), "norm_weight": (128,), **FEW},
        HUGE,
        fixed="*",
    ),
    "few tokens": Case(few.linear, {"h": (3, 1024), **FEW}, HUGE, fixed="*"),
    "scaled gradients of the loss": Case(scaled, {"x": (100,), "factor": ()}, {"x": (2**31 + 100,)}, wide="x factor", fixed="*"),
}


def needs_memory(wanted: int) -> None:
    if DEVICE == "cuda" and torch.cuda.mem_get_info()[0] < wanted:
        pytest.skip(f"needs {wanted / 2**30:.0f} GiB of GPU memory")


@pytest.fixture(autouse=True)
def one_at_a_time() -> Iterator[None]:
    """Of all processes with tests on this GPU one has such tensors."""
    if DEVICE != "cuda":
        yield
        return
    device = torch.cuda.get_device_properties(0).uuid
    with (Path(tempfile.gettempdir()) / f"gdn-tests-{os.getuid()}-{device}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


@pytest.mark.parametrize("name", CASES)
def test_the_last_numbers_are_those_of_the_same_alone(name: str, only: Callable[[Case], None]) -> None:
    case = CASES[name]
    needs_memory(case.memory)
    alone, huge = case.arguments()
    expected, slopes = outcome(case, alone, None)
    only(case)
    found, _ = outcome(case, huge, slopes)
    assert max(x.numel() for x in (*found, *huge.values()) if isinstance(x, Tensor)) > LEAST
    for i, (actual, result) in enumerate(zip(found, expected, strict=True)):
        assert same(last(actual, tuple(result.shape)), result), f"result {i}"


@gpu
def test_the_loss_of_the_last_tokens() -> None:
    """Products are torch's, and so it takes a GPU."""
    T, vocab = 2**20, 64
    needs_memory(COPIES * T * 2048 * 2)
    x, weight = numbers("", (50, 2048), torch.bfloat16, 0), numbers("", (vocab, 2048), torch.bfloat16, 1).requires_grad_()
    huge = around(x, (T + 50, 2048))
    targets = torch.arange(50, device=DEVICE)
    many = torch.cat([targets.new_full((T,), -100), targets])
    found = []
    for each, wanted in ((x.requires_grad_(), targets), (huge.requires_grad_(), many)):
        with use(linear_cross_entropy="portable"):
            value = ops.linear_cross_entropy(each, weight, wanted)
        found.append([value.detach(), *torch.autograd.grad(value, [each, weight])])
    for result, actual in zip(*found, strict=True):
        assert same(last(actual, tuple(result.shape)), result)
