"""What a checkpoint family is, and the lines its tables are made of.

Every difference between two formats is here a renaming, a stacking of rows, an order of rows, a dimension of size one, or a constant that
norm weights are stored around. All but the last move bytes and change none, so a checkpoint that was read and written back is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gdn.core.errors import CheckpointError, ConfigError
from gdn.mixers.base import MixerConfig
from gdn.models.lm import LM

Order = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Line:
    """One line of a name table: the rows of our tensors, stacked, are those of theirs, stacked and put in order."""

    ours: str
    """Names, separated by blanks."""
    theirs: Mapping[str, str] | str
    """Names, and for several the letter of the number of rows of each (`Family.sizes`)."""
    order: Order | None = None
    """From a mixer's configuration to integers: row i of ours is row `order[i]` of theirs."""
    taps: bool = False
    """Theirs are convolution filters `[channels, 1, taps]`."""
    norm: bool = False
    """A norm's weight, stored around the family's offset."""
    flat: bool = False
    """Theirs is one matrix with a row for each of our vectors."""


@dataclass(frozen=True)
class Rule:
    """A line for one block of one model, with full names."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    rows: tuple[int, ...]
    order: Tensor | None = None
    taps: bool = False
    shift: float = 0.0
    """Theirs minus ours."""
    flat: bool = False

    def read(self, theirs: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """Our tensors, of so many rows each, from theirs."""
        stack = _stack([t.squeeze(1) if self.taps else t.flatten() if self.flat else t for t in theirs])
        if len(rows) > 1 and len(stack) != sum(rows):
            shapes = ", ".join(str(list(t.shape)) for t in theirs)
            raise CheckpointError(f"{' '.join(self.theirs)}: expected {sum(rows)} rows, got {len(stack)}: {shapes}")
        if self.order is not None:
            stack = stack[self.order]
        parts = [p.contiguous() for p in stack.split(list(rows))] if len(rows) > 1 else [stack]
        return [p - self.shift for p in parts] if self.shift else parts

    def write(self, ours: Sequence[Tensor]) -> list[Tensor]:
        """Their tensors from ours."""
        stack = _stack(ours)
        if self.order is not None:
            stack = stack[self.order.argsort()]
        parts = [p.contiguous() for p in stack.split(list(self.rows))] if len(self.theirs) > 1 else [stack]
        parts = [p + self.shift for p in parts] if self.shift else parts
        parts = [p.view(len(self.ours), -1) for p in parts] if self.flat else parts
        return [p.unsqueeze(1) for p in parts] if self.taps else parts


@dataclass(frozen=True)
class Table:
    """The names of a family, with `{i}` for the number of the block."""

    model: tuple[Line, ...]
    """Outside the blocks."""
    head: str
    """Their name of an untied head."""
    ours: str = "blocks.{i}."
    theirs: str = "model.layers.{i}."
    block: tuple[Line, ...] = ()
    mixers: Mapping[str, tuple[Line, ...]] = field(default_factory=dict)
    """By the tag of the mixer."""
    blocks: Mapping[str, tuple[Line, ...]] = field(default_factory=dict)
    """By the tag of the mixer, where blocks differ in more than their mixer."""


@dataclass(frozen=True)
class Family:
    """A checkpoint format."""

    name: str
    owns: Callable[[Mapping[str, Any]], bool]
    """Whether a `config.json` is of this family."""
    read_config: Callable[[Mapping[str, Any]], LM.Config]
    write_config: Callable[[LM.Config], dict[str, Any]]
    """Raises `ConfigError` naming what this family cannot express."""
    table: Callable[[LM.Config], Table]
    offset: float = 0.0
    """What norm weights are stored around, given to `LM.Config.norm_offset`."""
    ignored: tuple[str, ...] = ()
    """Patterns of tensors that are not part of the language model."""
    constant: Callable[[LM.Config], dict[str, Tensor]] = lambda config: {}
    """Tensors that are always the same, and that the family's code expects."""
    canonical: Callable[[str], str] = lambda name: name
    """The name of a tensor as the table has it, from one in a file."""
    aliases: tuple[tuple[str, str], ...] = ()
    """(ending, another ending): names that some files have instead."""
    writes_tied_head: bool = False
    """Whether a tied head is written a second time under its own name."""

    def rules(self, config: LM.Config) -> Iterator[Rule]:
        """Every tensor of a model."""
        table, shift = self.table(config), config.norm_offset - self.offset
        for line in table.model:
            yield _rule(line, "", "", {}, None, shift)
        if not config.tie_embeddings:
            yield Rule(("head.weight",), (table.head,), ())
        for i, mixer in enumerate(config.mixers):
            ours, theirs, sizes = table.ours.format(i=i), table.theirs.format(i=i), {"m": config.mlp, **_sizes(mixer, config.width)}
            for line in table.blocks.get(mixer.tag(), table.block):
                yield _rule(line, ours, theirs, sizes, mixer, shift)
            for line in table.mixers[mixer.tag()]:
                inner = getattr(mixer, "norm_offset", 0.0) - self.offset if line.norm else 0.0
                yield _rule(line, f"{ours}mixer.", theirs, sizes, mixer, inner)


def _rule(line: Line, ours: str, theirs: str, sizes: Mapping[str, int], mixer: MixerConfig | None, shift: float) -> Rule:
    parts = {line.theirs: ""} if isinstance(line.theirs, str) else line.theirs
    return Rule(
        ours=tuple(ours + name for name in line.ours.split()),
        theirs=tuple(theirs + name for name in parts),
        rows=tuple(sizes[letter] for letter in parts.values()) if len(parts) > 1 else (),
        order=None if line.order is None else line.order(mixer),
        taps=line.taps,
        shift=shift if line.norm else 0.0,
        flat=line.flat,
    )


def _sizes(mixer: Any, width: int) -> dict[str, int]:
    """Rows of a mixer's matrices by letter: queries, keys, values."""
    tag = mixer.tag()
    if tag in ("gated_deltanet", "deltanet", "kimi_delta"):
        keys = mixer.heads * mixer.head_dim
        return {"q": keys, "k": keys, "v": mixer.qkv_width - 2 * keys}
    if tag == "deltaproduct":
        return dict(zip("qkv", mixer.widths))
    if tag in ("gla", "gsa", "retnet"):
        keys, values = mixer.widths(width)
        return {"q": keys, "k": keys, "v": values}
    if tag == "hgrn2":
        return {"q": width, "f": width, "i": width}
    if tag == "attention":
        q, kv = mixer.heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim
        return {"q": q, "2q": 2 * q, "k": kv, "v": kv}
    return {}


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors)) if len(tensors) > 1 else tensors[0]


MLP = (
    Line("mlp.gate_up.weight", {"mlp.gate_proj.weight": "m", "mlp.up_proj.weight": "m"}),
    Line("mlp.down.weight", "mlp.down_proj.weight"),
)
"""The SwiGLU of transformers and flash-linear-attention."""


def no_mlp_without_width(lines: tuple[Line, ...], config: LM.Config) -> tuple[Line, ...]:
    """A block's lines, without those of its MLP where it has none."""
    return tuple(line for line in lines if config.mlp or not line.ours.startswith("mlp"))


class Wishes:
    """What a family can express, checked one by one; each failure names the field, its value and what there is."""

    def __init__(self, family: str) -> None:
        self.family = family

    def fixed(self, config: Any, where: str, **expected: Any) -> None:
        """Fields that must have these values."""
        for name, value in expected.items():
            if getattr(config, name) != value:
                self.refuse(f"{where}{name}={getattr(config, name)!r}", repr(value))

    def refuse(self, what: str, expected: str) -> None:
        raise ConfigError(f"{self.family}: cannot express {what}; expected {expected}")

    def one_of_each(self, config: LM.Config, *tags: str, several: Sequence[str] = ()) -> dict[str, Any]:
        """The mixer of each kind; all of a kind must be the same, except of kinds that may be `several`: there it is the first."""
        found: dict[str, Any] = {}
        for i, mixer in enumerate(config.mixers):
            tag = mixer.tag()
            if tag not in tags:
                self.refuse(f"the mixer {tag} of block {i}", " or ".join(tags))
            if found.setdefault(tag, mixer) != mixer and tag not in several:
                self.refuse(f"two different {tag} mixers", "all of a kind alike")
        return found

    def same(self, what: str, values: Mapping[str, Any]) -> Any:
        """One value for fields that the family has in common."""
        if len(set(values.values())) != 1:
            self.refuse(", ".join(f"{k}={v}" for k, v in values.items()), f"one {what} for all of them")
        return next(iter(values.values()))


class Fields:
    """A configuration that is read field by field. One that nobody asked for must be off, or it is refused: nothing is passed over."""

    def __init__(self, config: Mapping[str, Any], family: str, where: str = "") -> None:
        self.config, self.family, self.where = config, family, where
        self.seen: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.seen.add(name)
        if name not in self.config:
            raise ConfigError(f"{self.family}: config.json has no {self.where}{name}")
        return self.config[name]

    def get(self, name: str, default: Any) -> Any:
        """A field that has a default."""
        return self[name] if name in self.config else default

    def only(self, name: str, *allowed: Any) -> None:
        """A field of which only these values are supported here."""
        self.seen.add(name)
        if name in self.config and self.config[name] not in allowed:
            what = f"{self.where}{name}={self.config[name]!r}"
            raise ConfigError(f"{self.family}: {what} is not supported; expected {' or '.join(map(repr, allowed))}")

    def free(self, *names: str) -> None:
        """Fields that may say what they like: the model computes the same."""
        self.seen.update(names)

    def finish(self) -> None:
        """Refuse what is left, unless it is off."""
        for name, value in self.config.items():
            if name not in self.seen and value is not None and value is not False:
                raise ConfigError(f"{self.family}: {self.where}{name}={value!r} is not supported; expected no such field")


def supported(config: Mapping[str, Any], family: str, **expected: Any) -> None:
    """Fields of their configuration that only these values of are supported here; a tuple lists several."""
    for name, value in expected.items():
        allowed = value if isinstance(value, tuple) else (value,)
        if name in config and config[name] not in allowed:
            raise ConfigError(f"{family}: {name}={config[name]!r} is not supported; expected {' or '.join(map(repr, allowed))}")


def rope_of(config: Mapping[str, Any], family: str, **defaults: Any) -> dict[str, Any]:
    """The parameters of rotary positions as transformers reads them: from `rope_scaling`, their old name, or else `rope_parameters`, then
    from the configuration itself. Any but plain ones are refused."""
    inside: dict[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    supported({"rope_type": inside.get("rope_type", inside.get("type", "default"))}, family, rope_type="default")
    return {"rope_theta": 10000.0, **defaults, **config, **inside}
