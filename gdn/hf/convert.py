"""Checkpoints from one family to another, a few tensors in memory at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn.core.errors import CheckpointError, ConfigError
from gdn.data import load_tokenizer
from gdn.data.tokenizer import FILE as TOKENIZER
from gdn.hf.families import family, find
from gdn.hf.families.base import Family
from gdn.hf.remote_code import add_remote_code
from gdn.models.lm import LM
from gdn.models.store import CONFIG, INDEX, ORIGIN, checkpoint_folder, expect_new, read_json

SHARD_BYTES = 4 << 30
"""Largest weights file; one tensor that is larger has a file of its own."""

TOKENS = "tokenizer_config.json"
"""Where transformers reads which tokens end a document and pad."""

COMPANIONS = (
    "tokenizer.json",
    TOKENS,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
)
"""Files that go along as they are."""

PAD = "<|padding|>"
"""How the token of padding is spelled, as in Pythia and OLMo."""


@dataclass(frozen=True)
class Conversion:
    """What `convert` did."""

    source: str
    target: str
    config: LM.Config
    tensors: int
    bytes: int
    unused: tuple[str, ...]
    """Tensors of the source that are no part of the language model and were left out."""


def convert(source: str | Path, target: str | Path, to: str, *, shard_bytes: int = SHARD_BYTES) -> Conversion:
    """Write a checkpoint in another family's names, layout and configuration. Bytes of weights are moved, not computed.

    Where a run's model has a row beyond its tokenizer's, transformers' tokenizer and configuration are told that it is for padding: the end
    of a document, which would have to pad otherwise, would count nothing in a loss.

    Args:
        source: a folder of any known family, or a training run.
        target: a folder to write; it must not hold a checkpoint yet.
        to: the family, a name of `FAMILIES`.

    Raises:
        ConfigError: the family cannot express a field of the model; the message names it.
        CheckpointError: a tensor is missing, of another shape, or has no place in the family.
    """
    source, target = checkpoint_folder(source), Path(target)
    given, theirs, config = _read(source)
    mine = family(to)
    expect_new(target)
    values = _configuration(given, theirs, mine, config)
    target.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        files = Files(source, theirs, stack)
        writer = Writer(target, shard_bytes)
        for name, tensor in _renamed(files, theirs, mine, config):
            writer.add(name, tensor)
        unused = files.finish(theirs)
        writer.finish()
    padding = None
    if mine.name not in _PLAIN:
        if not (values.get("dtype") or values.get("torch_dtype")):
            values["dtype"] = writer.dtype
        if theirs.name == "run":
            values |= _ends(source)
            padding = _padding(source, config.vocab)
            values |= {} if padding is None else {"pad_token_id": padding}
    (target / CONFIG).write_text(json.dumps(values, indent=2) + "\n")
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    if padding is not None:
        (target / TOKENS).write_text(json.dumps({**read_json(source / TOKENS), "pad_token": PAD}, indent=1) + "\n")
    if to == "gdn":
        add_remote_code(target)
    return Conversion(theirs.name, mine.name, config, writer.tensors, writer.bytes, unused)


def load(folder: str | Path) -> LM:
    """The model of a folder of any known family, in memory. Gates are float32."""
    folder = checkpoint_folder(folder)
    _, theirs, config = _read(folder)
    with torch.device("meta"):
        model = LM(config)
    with ExitStack() as stack:
        files = Files(folder, theirs, stack)
        weights = dict(_ours(files, theirs, config))
        files.finish(theirs)
        weights = {n: t.float() if n.endswith(("A_log", "dt_bias")) and t.itemsize < 4 else t.clone() for n, t in weights.items()}
    model.load_state_dict(weights, assign=True)
    return model


class Files:
    """The tensors of a folder by canonical name, read when asked for; each is asked for once."""

    def __init__(self, folder: Path, family: Family, stack: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.where: dict[str, tuple[Any, str]] = {}
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise CheckpointError(f"{folder} holds no *.safetensors")
        for path in paths:
            try:
                file = stack.enter_context(safe_open(path, "pt"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from error
            for name in file.keys():  # noqa: SIM118
                self.where[family.canonical(name)] = (file, name)
        self.folder, self.aliases = folder, family.aliases

    def take(self, name: str) -> Tensor:
        for ending, other in self.aliases:
            if name not in self.where and name.endswith(ending):
                name = name.removesuffix(ending) + other
        if name not in self.where:
            raise CheckpointError(f"{self.folder}: missing {name}")
        file, stored = self.where.pop(name)
        return file.get_tensor(stored)

    def finish(self, family: Family) -> tuple[str, ...]:
        """The tensors that are no part of a language model; any other that was not asked for is an error."""
        wrong = [n for n in self.where if not any(re.fullmatch(p, n) for p in family.ignored)]
        if wrong:
            shape = list(self.take(wrong[0]).shape)
            raise CheckpointError(f"{self.folder}: {wrong[0]} {shape} has no place in a {family.name} model of this configuration")
        return tuple(sorted(self.where))


class Writer:
    """Tensors into safetensors files of limited size, with an index if there are several."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self.held: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.tensors = self.bytes = self.held_bytes = 0
        self.numbers: Counter[torch.dtype] = Counter()

    @property
    def dtype(self) -> str:
        """Of most numbers, as a configuration names it: gates may be wider than the rest."""
        return str(self.numbers.most_common(1)[0][0]).removeprefix("torch.")

    def add(self, name: str, tensor: Tensor) -> None:
        if self.held and self.held_bytes + tensor.nbytes > self.limit:
            self._flush()
        self.held[name] = tensor
        self.held_bytes += tensor.nbytes
        self.bytes += tensor.nbytes
        self.tensors += 1
        self.numbers[tensor.dtype] += tensor.numel()

    def finish(self) -> None:
        """Give the files their final names."""
        self._flush()
        count = len(self.shards)
        names = ["model.safetensors"] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
        for i, name in enumerate(names):
            self._partial(i).replace(self.folder / name)
        if count > 1:
            places = {tensor: names[i] for i, shard in enumerate(self.shards) for tensor in shard}
            index = {"metadata": {"total_size": self.bytes}, "weight_map": dict(sorted(places.items()))}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self) -> None:
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            save_file({n: t.contiguous() for n, t in self.held.items()}, self._partial(len(self.shards)), metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot write {self.folder}: {error}") from error
        self.shards.append(list(self.held))
        self.held, self.held_bytes = {}, 0

    def _partial(self, shard: int) -> Path:
        return self.folder / f".{shard}.partial"


def _read(folder: Path) -> tuple[dict[str, Any], Family, LM.Config]:
    """A folder's configuration as it stands there, the family it is of, and what it says."""
    given = read_json(folder / CONFIG)
    theirs = find(given)
    try:
        return given, theirs, theirs.read_config(given)
    except KeyError as error:
        raise ConfigError(f"{theirs.name}: {folder / CONFIG} has no {error.args[0]}") from error


def _ours(files: Files, theirs: Family, config: LM.Config) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one rule at a time."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LM(config).state_dict().items()}
    table = theirs.table(config)
    for name, expected in theirs.constant(config).items():
        if name in files.where and not torch.equal(files.take(name).float(), expected):
            raise CheckpointError(
                f"{files.folder}: {name} is expected to be {expected.flatten()[0]:g} everywhere; it takes part in nothing"
            )
    for rule in theirs.rules(config):
        rows = [shapes[name][0] for name in rule.ours]
        for name, tensor in zip(rule.ours, rule.read([files.take(n) for n in rule.theirs], rows)):
            if tensor.shape != shapes[name]:
                raise CheckpointError(f"{files.folder}: {' '.join(rule.theirs)}: expected {list(shapes[name])}, got {list(tensor.shape)}")
            yield name, tensor
            twice = name == "embedding.weight" and config.tie_embeddings and table.head in files.where
            if twice and not torch.equal(files.take(table.head), tensor):
                raise CheckpointError(f"{files.folder}: {table.head} differs from the embedding that the configuration ties it to")


def _renamed(files: Files, theirs: Family, mine: Family, config: LM.Config) -> Iterator[tuple[str, Tensor]]:
    """Tensors under the target's names: rules are applied as soon as all that they need has been read."""
    rules = {name: rule for rule in mine.rules(config) for name in rule.ours}
    waiting: dict[str, Tensor] = {}
    head = mine.table(config).head
    for name, tensor in _ours(files, theirs, config):
        waiting[name] = tensor
        rule = rules[name]
        if all(n in waiting for n in rule.ours):
            yield from zip(rule.theirs, rule.write([waiting.pop(n) for n in rule.ours]))
        if name == "embedding.weight" and config.tie_embeddings and mine.writes_tied_head:
            yield head, tensor.clone()  # safetensors refuses one memory under two names
    yield from mine.constant(config).items()


def _configuration(given: dict[str, Any], theirs: Family, mine: Family, config: LM.Config) -> dict[str, Any]:
    """The target's config.json; going back to the family that a checkpoint came from, also the fields that gdn does not know."""
    kept = given.get(ORIGIN) or {}
    values, inside = mine.write_config(config), given.get("text_config", given)
    named = {k: inside[k] for k in _GENERATION if k in inside}
    if mine.name == "gdn":
        return {**values, **named, ORIGIN: {"family": theirs.name, "config": given}}
    if kept.get("family") == mine.name:
        return _merged(kept["config"], values)
    return {**values, **named} if mine.name != "run" else values


def _ends(source: Path) -> dict[str, int]:
    """The token that ends a document, for a run: its configuration does not say, its tokenizer does."""
    return {"eos_token_id": load_tokenizer(source).end_id} if (source / TOKENIZER).is_file() else {}


def _padding(source: Path, vocab: int) -> int | None:
    """The token that `PAD` is for transformers, which counts on from a run's tokenizer. None where the model has no row for it."""
    if not (source / TOKENIZER).is_file() or not (source / TOKENS).is_file() or "pad_token" in read_json(source / TOKENS):
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source / TOKENIZER))
    taken = tokenizer.get_vocab()
    tokenizer.add_special_tokens([PAD])
    padding = tokenizer.get_vocab()[PAD]
    return padding if padding < vocab and (PAD in taken or padding not in taken.values()) else None


_PLAIN = ("run", "nvlabs")
"""Families whose configurations have no word for a dtype or the end of a document."""

_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype")


def _merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The original configuration where it says the same as the new one, else the new one's values in it."""
    new = {k: v for k, v in new.items() if k not in _GENERATION or k not in old}
    if "text_config" in old:
        return {**new, **{k: v for k, v in old["text_config"].items() if k not in new}}
    nested = {k: {**old[k], **v} for k, v in new.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
    return {**old, **{k: v for k, v in new.items() if k in old or v is not None}, **nested}
