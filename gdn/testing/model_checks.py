"""`gdn check`: properties that every language model with a state should have, measured on one that is given.

    packed documents         do not see each other
    left padding             changes nothing, neither logits nor what is read afterwards
    split prefill            a prompt read in pieces gives what it gives as a whole
    single steps             tokens read one by one give what they give in parallel
    rollback                 after going back, tokens that were taken back might as well never have been read
    bf16                     differs from float32 by rounding, and not more with every token

Each is one number: over all tokens the largest relative difference of the logits (for bf16 the mean). What rounding may do to it is
measured on the same model: every linear map and embedding is disturbed by one rounding of its output, at random. Works on our models
and on those of transformers, stock or accelerated.
"""

from __future__ import annotations

import copy
import importlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gdn.core.errors import ArgumentError
from gdn.core.packing import Packing
from gdn.models import store
from gdn.models.lm import LM

ROUNDINGS = 4
"""An error of at most this many times what one rounding of every output does is rounding."""


class Subject(ABC):
    """A model as the checks see it. States are updated in place or not; what a method returns counts."""

    model: Any
    vocab: int

    @abstractmethod
    def read(self, tokens: Tensor, state: Any = None, mask: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Any]:
        """Logits of tokens `[B, T]` after a state; the state after them, given one or `keep`. `mask [B, all tokens]`: 0 at padding."""

    @abstractmethod
    def packed(self) -> dict[str, Callable[[Tensor, list[int]], Tensor]]:
        """By how they are told apart: logits of documents of the given lengths in one row."""

    @abstractmethod
    def rollbacks(self) -> dict[str, Callable[[Any], Callable[[Any, int], Any]]]:
        """By name: prepare a state for going back; the function returned goes n tokens back from the state after them."""


class OwnModel(Subject):
    """A `gdn.models.LM`."""

    def __init__(self, model: LM) -> None:
        self.model, self.vocab = model, model.config.vocab

    def read(self, tokens: Tensor, state: Any = None, mask: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Any]:
        if state is None and keep:
            state = self.model.init_state(tokens.shape[0])
        local = None if mask is None else mask[:, -tokens.shape[1] :].bool()
        out = self.model(tokens, state=state, mask=local)
        return out.logits, out.state

    def packed(self) -> dict[str, Callable[[Tensor, list[int]], Tensor]]:
        return {"packing": lambda tokens, lengths: self.model(tokens, packing=Packing.from_lengths(lengths, device=tokens.device)).logits}

    def rollbacks(self) -> dict[str, Callable[[Any], Callable[[Any, int], Any]]]:
        def snapshot(state: Any) -> Callable[[Any, int], Any]:
            saved = state.clone()

            def back(after: Any, count: int) -> Any:
                after.copy_(saved)
                return after

            return back

        return {"a snapshot": snapshot}


class TransformersModel(Subject):
    """A causal language model of transformers."""

    def __init__(self, model: Any) -> None:
        self.model, self.vocab = model, model.get_input_embeddings().weight.shape[0]

    def read(self, tokens: Tensor, state: Any = None, mask: Tensor | None = None, keep: bool = False) -> tuple[Tensor, Any]:
        from gdn.hf.names import CACHE

        said: dict[str, Any] = {"use_cache": keep or state is not None, CACHE: state}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            said |= {"attention_mask": mask, "position_ids": positions}
        out = self.model(tokens, **said)
        return out.logits, getattr(out, CACHE)

    def packed(self) -> dict[str, Callable[[Tensor, list[int]], Tensor]]:
        def by_positions(tokens: Tensor, lengths: list[int]) -> Tensor:
            return self.model(tokens, position_ids=_positions(lengths, tokens), use_cache=False).logits

        def by_bounds(tokens: Tensor, lengths: list[int]) -> Tensor:
            bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=tokens.device)
            said = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": max(lengths), "max_length_k": max(lengths)}
            return self.model(tokens, position_ids=_positions(lengths, tokens), use_cache=False, **said).logits

        return {"position_ids": by_positions, "cu_seq_lens": by_bounds}

    def rollbacks(self) -> dict[str, Callable[[Any], Callable[[Any, int], Any]]]:
        def crop(cache: Any) -> Callable[[Any, int], Any]:
            cache.activate_past_recording()

            def back(after: Any, count: int) -> Any:
                after.crop(-count)
                return after

            return back

        def duplicate(cache: Any) -> Callable[[Any, int], Any]:
            saved = copy.deepcopy(cache)
            return lambda after, count: saved

        return {"cache.crop": crop, "a copy": duplicate}


def _positions(lengths: list[int], tokens: Tensor) -> Tensor:
    return torch.cat([torch.arange(n, device=tokens.device) for n in lengths]).unsqueeze(0)


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    name: str
    error: float | None = None
    """Relative difference of the logits of a token, the largest of all; None when the model refused."""
    allowed: float = 0.0
    """What rounding explains."""
    token: int | None = None
    """The first token beyond that."""
    note: str = ""

    @property
    def leaks(self) -> bool:
        return self.error is not None and not self.error <= self.allowed

    @property
    def verdict(self) -> str:
        if self.error is None:
            return "refused"
        return "LEAKS" if self.leaks else "ok"


def wrap(model: Any) -> Subject:
    """One of our models, or one of transformers, for the checks."""
    if isinstance(model, Subject):
        return model
    if isinstance(model, LM):
        return OwnModel(model)
    if isinstance(model, nn.Module) and hasattr(model, "get_input_embeddings") and hasattr(model, "generate"):
        return TransformersModel(model)
    raise ArgumentError(f"model: expected a gdn.models.LM or a causal language model of transformers, got {type(model).__name__}")


@torch.no_grad()
def check_model(model: Any, *, length: int = 96, seed: int = 0) -> list[Finding]:
    """Run all checks on a loaded model, in its dtype and on its device, in eval mode; the model is left as it was.

    Args:
        model: a `gdn.models.LM` or a causal language model of transformers.
        length: tokens of a row, at least 24.
        seed: of the random tokens.
    """
    if length < 24:
        raise ArgumentError(f"length: expected at least 24 tokens, got {length}")
    subject = wrap(model)
    training = subject.model.training
    subject.model.eval()
    try:
        return list(_findings(subject, length, seed))
    finally:
        subject.model.train(training)


def _findings(subject: Subject, length: int, seed: int) -> Iterator[Finding]:
    generator = torch.Generator().manual_seed(seed)
    weight = next(subject.model.parameters())
    tokens = torch.randint(1, subject.vocab, (1, length), generator=generator).to(weight.device)
    whole = subject.read(tokens)[0]
    allowed = ROUNDINGS * float(rounding(subject, tokens, torch.finfo(weight.dtype).eps, seed).max())
    third = length // 3
    lengths = [third, 1, third, length - 2 * third - 1]
    separate = torch.cat([subject.read(piece)[0] for piece in tokens.split(lengths, 1)], 1)
    for way, run in subject.packed().items():
        yield _judge(f"packed documents, told by {way}", allowed, lambda run=run: run(tokens, lengths), separate)
    yield _judge("left padding", allowed, lambda: _padded(subject, tokens), whole)
    for name, cuts in {"thirds": [third, 2 * third], "an odd cut": [length // 2 - 1], "all but 2": [length - 2]}.items():
        yield _judge(f"split prefill, {name}", allowed, lambda cuts=cuts: _pieces(subject, tokens.tensor_split(cuts, 1)), whole)
    steps = [tokens[:, :third], *tokens[:, third:].split(1, 1)]
    yield _judge("single steps", allowed, lambda: _pieces(subject, steps), whole)
    for way, prepare in subject.rollbacks().items():
        yield _judge(f"rollback by {way}", allowed, lambda prepare=prepare: _rolled_back(subject, tokens, prepare), whole)
    if weight.dtype == torch.float32:
        yield _bf16(subject, tokens, whole, seed)


def _judge(name: str, allowed: float, run: Callable[[], Tensor], truth: Tensor) -> Finding:
    try:
        errors = token_errors(run(), truth)
    except (ValueError, RuntimeError, NotImplementedError) as refusal:
        return Finding(name, note=(str(refusal).splitlines() or [type(refusal).__name__])[0])
    wrong = (~(errors <= allowed)).nonzero()
    return Finding(name, float(errors.max()), allowed, int(wrong[0, -1]) if len(wrong) else None)


def token_errors(logits: Tensor, truth: Tensor) -> Tensor:
    """For each token: the norm of the difference over the norm of the truth; infinite where it is not finite."""
    difference = (logits.double() - truth.double()).norm(dim=-1) / truth.double().norm(dim=-1).clamp(min=1e-30)
    return difference.nan_to_num(nan=torch.inf)


def rounding(subject: Subject, tokens: Tensor, eps: float, seed: int) -> Tensor:
    """The relative change of each token's logits when each output of a linear map or embedding is rounded once more, at random."""
    truth = subject.read(tokens)[0]
    generator = torch.Generator().manual_seed(seed + 1)

    def disturb(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        sign = torch.randint(0, 2, output.shape, generator=generator).to(output.device, output.dtype) * 2 - 1
        return output * (1 + eps * sign) if output.dtype == torch.float64 else (output.float() * (1 + eps * sign.float())).to(output.dtype)

    kinds = (nn.Linear, nn.Embedding)
    hooks = [m.register_forward_hook(disturb) for m in subject.model.modules() if isinstance(m, kinds)]
    try:
        return token_errors(subject.read(tokens)[0], truth)
    finally:
        for hook in hooks:
            hook.remove()


def _padded(subject: Subject, tokens: Tensor) -> Tensor:
    """In a batch beside a longer row, then two more tokens from the state."""
    pads, length = 7, tokens.shape[1]
    other = tokens.roll(3, 1)
    rows = torch.cat([torch.cat([tokens[:, :1].expand(1, pads), tokens], 1), torch.cat([other[:, :pads], other], 1)])
    mask = torch.ones_like(rows)
    mask[0, :pads] = 0
    first, state = subject.read(rows[:, :-2], mask=mask[:, :-2], keep=True)
    outputs = [first[:1, pads:]]
    for place in (-2, -1):
        step, state = subject.read(rows[:, [place]], state, mask=mask[:, : pads + length + place + 1])
        outputs.append(step[:1])
    return torch.cat(outputs, 1)


def _pieces(subject: Subject, pieces: Any) -> Tensor:
    state, outputs = None, []
    for piece in pieces:
        logits, state = subject.read(piece, state, keep=True)
        outputs.append(logits)
    return torch.cat(outputs, 1)


def _rolled_back(subject: Subject, tokens: Tensor, prepare: Callable[[Any], Callable[[Any, int], Any]]) -> Tensor:
    half, count = tokens.shape[1] // 2, 5
    first, state = subject.read(tokens[:, :half], keep=True)
    back = prepare(state)
    _, state = subject.read(tokens.flip(1)[:, :count], state)
    second, _ = subject.read(tokens[:, half:], back(state, count))
    return torch.cat([first, second], 1)


def _bf16(subject: Subject, tokens: Tensor, truth: Tensor, seed: int) -> Finding:
    """The model's weights and activations in bfloat16, as people load it: the mean over all tokens, which drift would raise."""
    narrow = copy.copy(subject)
    narrow.model = copy.deepcopy(subject.model)
    if isinstance(narrow.model, LM):
        store.cast(narrow.model, torch.bfloat16)  # A_log and dt_bias stay float32
    else:
        narrow.model.to(torch.bfloat16)
    allowed = ROUNDINGS * rounding(subject, tokens, torch.finfo(torch.bfloat16).eps, seed).mean()
    errors = token_errors(narrow.read(tokens)[0], truth).flatten()
    quarter = len(errors) // 4
    note = f"mean over tokens; {float(errors[:quarter].mean()):.1e} in the first quarter, {float(errors[-quarter:].mean()):.1e} in the last"
    return Finding("bf16 against float32", float(errors.mean()), float(allowed), note=note)


def report(model: Any, *, title: str, length: int = 96, seed: int = 0, console: Console | None = None) -> int:
    """Print the findings as a table; the exit status is 1 when something leaks."""
    findings = check_model(model, length=length, seed=seed)
    console = console or Console()
    table = Table(title=title, title_justify="left")
    for column in ("check", "error", "allowed", "", ""):
        table.add_column(column, justify="right" if column in ("error", "allowed") else "left", overflow="fold")
    for f in findings:
        color = {"ok": "green", "LEAKS": "red", "refused": "yellow"}[f.verdict]
        error = ("", "") if f.error is None else (f"{f.error:.1e}", f"{f.allowed:.1e}")
        where = f"from token {f.token} on" if f.token is not None else ""
        table.add_row(f.name, *error, f"[{color}]{f.verdict}[/]", "; ".join(x for x in (where, f.note) if x))
    console.print(table)
    leaking = [f.name for f in findings if f.leaks]
    refused = [f.name for f in findings if f.verdict == "refused"]
    if leaking:
        console.print(f"[red]{len(leaking)} of {len(findings)} leak[/]: {'; '.join(leaking)}")
    elif refused:
        console.print(f"of the {len(findings) - len(refused)} checks that the model took none leaks")
    else:
        console.print("[green]nothing leaks[/]")
    if refused:
        console.print(f"[yellow]{len(refused)} of {len(findings)} say nothing, the model refused[/]: {'; '.join(refused)}")
    return 1 if leaking else 0


def load_any(path: str, device: torch.device) -> Any:
    """Our saved run or model folder, or a folder or name that transformers can load, in float32."""
    from gdn.core.errors import CheckpointError, require

    config = Path(path) / "config.json"
    if not Path(path).exists() and _looks_local(path):
        raise CheckpointError(f"{path}: no such folder")
    kind = store.read_json(config).get("model_type") if config.is_file() else None
    if Path(path).exists() and kind is None:
        return store.load_model(store.model_folder(path), device=device)
    transformers = require("transformers", "test", f'"{path}" is no run of gdn, and loading it')
    from safetensors import SafetensorError

    if kind == "gdn":
        importlib.import_module("gdn.hf")  # knows the class, so the code in the folder is not asked for
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: neither a run of gdn nor a model of transformers: {str(error).splitlines()[0]}") from error


def _looks_local(path: str) -> bool:
    """Whether a path can be no OWNER/NAME of the hub, or is in a folder that is here: then the hub is not asked, nor waited for."""
    return path.startswith(("/", ".")) or path.count("/") > 1 or ("/" in path and Path(path).parent.is_dir())
