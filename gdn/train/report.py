"""What a run leaves behind at its end: a table, a plot of the losses and a sample of text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from gdn.core.device import has_package
from gdn.models.sampling import Sampling, generate
from gdn.models.store import load_model
from gdn.train.display import duration
from gdn.train.metrics import Row


def table(rows: list[Row], *, parameters: int) -> Table:
    """The result of a run: the last value of each metric, and how fast all of it was, validations and checkpoints included."""
    last: Row = {name: value for row in rows for name, value in row.items()}
    shown = {"parameters": f"{parameters:,}", "steps": f"{last.get('step', 0):,}"}
    if "tokens_seen" in last:
        shown |= {"tokens": f"{last['tokens_seen']:,}", "time": duration(last["seconds"])}
        shown |= {"tokens per second": f"{last['tokens_seen'] / max(last['seconds'], 1e-9):,.0f}"}
    if "mfu" in last:
        shown["model FLOPs utilisation"] = f"{last['mfu']:.1%}"
    if "memory/peak_gib" in last:
        shown["peak memory"] = f"{last['memory/peak_gib']:.2f} GiB"
    if "loss/train" in last:
        shown["training loss"] = f"{last['loss/train']:.4f} nats per token"
    if "loss/val" in last:
        shown |= {
            "validation loss": f"{last['loss/val']:.4f} nats per token",
            "validation bits per byte": f"{last['bits_per_byte/val']:.3f}",
        }
    result = Table(show_header=False)
    for name, value in shown.items():
        result.add_row(name, value)
    return result


def plot(rows: list[Row], path: Path) -> Path | None:
    """Draw training and validation loss against steps as a picture; None without matplotlib or without a training loss."""
    train = [(row["step"], row["loss/train"]) for row in rows if "loss/train" in row]
    validation = [(row["step"], row["loss/val"]) for row in rows if "loss/val" in row]
    if not train or not has_package("matplotlib"):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(*zip(*train), color="tab:blue", linewidth=1.2, label=f"training, {train[-1][1]:.3f} at the end")
    if validation:
        axes.plot(*zip(*validation), "o-", color="tab:orange", markersize=4, label=f"validation, {validation[-1][1]:.3f} at the end")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=path.resolve().parent.name)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)
    return path


def sample(folder: Path, tokenizer: Any, *, prompt: str, tokens: int, device: torch.device) -> str:
    """The prompt and what the exported model writes after it, up to the end of the document."""
    model = load_model(folder, device=device).eval()
    ids = list(tokenizer.encode(prompt)) or [tokenizer.end_id]
    written: list[int] = []
    for token in generate(model, torch.tensor([ids], device=device), Sampling()):
        if int(token) == tokenizer.end_id or len(written) == tokens:
            break
        written.append(int(token))
    return prompt + tokenizer.decode(written)
