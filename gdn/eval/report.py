"""What `gdn info` and `gdn eval` print."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.tree import Tree

from gdn.core.errors import ArgumentError
from gdn.data import Batch, DataConfig, validation_batches
from gdn.eval.perplexity import ByPosition, evaluate, evaluate_by_position
from gdn.models.describe import costs, mixer_costs
from gdn.models.lm import LM

EVERY = 20.0
"""Seconds between two lines about how far an evaluation is, where there is no terminal."""


def print_config(config: LM.Config, *, title: str, length: int, itemsize: int) -> None:
    """The resolved configuration as a tree, and its costs as a table."""
    console = Console()
    tree = Tree(f"[bold]{title}[/]")
    _branches(tree, config.to_dict())
    console.print(tree)
    c = costs(config, length, itemsize=itemsize)
    table = Table(title=f"at {length:,} tokens of context", title_justify="left", show_header=False)
    rows = {
        "parameters": f"{c.parameters:,}  ({c.embedding_parameters:,} of them embeddings)",
        "forward FLOPs per token": f"{c.flops_per_token:.4g}",
        "training FLOPs per token": f"{c.train_flops_per_token:.4g}",
        "decoding state per sequence": f"{_bytes(c.state_bytes)}, {_growth(config)}",
        "weights in float32": _bytes(c.weight_bytes),
        "weights, gradients, AdamW": _bytes(c.optimizer_bytes),
        "training activations": f"about {_bytes(c.activation_bytes)} a sequence; recomputing blocks {_bytes(c.block_activation_bytes)}",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _growth(config: LM.Config) -> str:
    growing = sum(mixer.state_grows for mixer in config.mixers)
    return f"growing with the length in {growing} of {config.layers} layers" if growing else "the same at any length"


def print_mixers(*, width: int, length: int, itemsize: int) -> None:
    """Every mixer in its default configuration, with what it costs."""
    found, reasons = mixer_costs(width, length, itemsize=itemsize)
    table = Table(title=f"mixers as they are by default, at width {width:,} and {length:,} tokens of context", title_justify="left")
    table.add_column("mixer", no_wrap=True)
    for column in ("parameters", "forward\nFLOPs\nper token", "state per\nsequence"):  # leaves 80 columns room for whole names of fields
        table.add_column(column, justify="right")
    table.add_column("", overflow="fold")
    for c in found:
        remark = "grows with the length" if c.state_grows else c.chosen
        table.add_row(c.name, f"{c.parameters:,}", f"{c.flops_per_token:,}", _bytes(c.state_bytes), remark)
    for name, reason in reasons.items():
        table.add_row(name, "", "", "", reason)
    Console().print(table)


def print_evaluation(model: LM, tokenizer: Any, data: DataConfig, trained: int | None, *, length: int, max_tokens: int) -> None:
    """Loss and bits per byte in rows of `data.length`, then loss by position up to `length`; `trained` is the training length if known."""
    if length and length < 2:
        raise ArgumentError(f"length: expected at least 2 tokens, got {length}")
    console = Console()
    with _watched("loss", data, tokenizer, max_tokens) as batches:
        result = evaluate(model, batches)
    console.print(
        f"{result.tokens:,} tokens ({result.num_bytes:,} bytes): loss {result.loss:.4f} nats per token, "
        f"perplexity {result.perplexity:.3f}, [bold]bits per byte {result.bits_per_byte:.3f}[/]",
        soft_wrap=True,
    )
    longest = length or 4 * data.length
    rows = data.with_(length=longest, batch=max(1, data.batch * data.length // longest))
    with _watched("loss by position", rows, tokenizer, max_tokens) as batches:
        buckets = evaluate_by_position(model, batches, _edges(data.length, longest))
    console.print(_by_position(buckets, trained))


@contextmanager
def _watched(what: str, data: DataConfig, tokenizer: Any, max_tokens: int) -> Iterator[Iterable[Batch]]:
    """Validation batches that move a bar on standard error as they are taken, or write a line now and then where that is no terminal."""
    columns = BarColumn(bar_width=16), TextColumn("{task.description}"), TimeRemainingColumn()
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading text", total=None)
        batches = validation_batches(data, tokenizer, max_tokens)
        progress.update(task, description=what)
        yield progress.track(batches, task_id=task) if console.is_terminal else _counted(batches, what, console)


def _counted(batches: Sequence[Batch], what: str, console: Console) -> Iterator[Batch]:
    said = time.monotonic()
    for done, batch in enumerate(batches):
        if time.monotonic() - said > EVERY:
            console.print(f"{what}: {done} of {len(batches)} batches", highlight=False)
            said = time.monotonic()
        yield batch


def _by_position(buckets: list[ByPosition], trained: int | None) -> Table:
    known = "" if trained is None else f" (trained on {trained:,})"
    table = Table(title=f"loss by position in the document{known}", title_justify="left")
    for column in ("positions", "tokens", "nats per token", ""):
        table.add_column(column, justify="left" if not column else "right")
    for bucket in buckets:
        beyond = "beyond the training length" if trained is not None and bucket.start >= trained else ""
        table.add_row(f"{bucket.start:,} to {bucket.stop - 1:,}", f"{bucket.tokens:,}", f"{bucket.loss:.4f}", beyond)
    return table


def _edges(trained: int, longest: int) -> list[int]:
    """0 and then doublings that meet the training length exactly and end at the longest."""
    edges = [trained]
    while edges[0] > 32:
        edges.insert(0, edges[0] // 2)
    while edges[-1] * 2 < longest:
        edges.append(edges[-1] * 2)
    return [0, *[edge for edge in edges if edge < longest], longest]


def _branches(tree: Tree, values: dict[str, Any]) -> None:
    for name, value in values.items():
        if isinstance(value, dict):
            _branches(tree.add(f"[bold]{name}[/]"), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for i, item in enumerate(value):
                _branches(tree.add(f"[bold]{name}.{i}[/]"), item)
        else:
            tree.add(f"{name} = {value}")


def _bytes(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
