"""What a person sees while a run goes on: a progress bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from gdn.train.metrics import Row


class Display:
    """Shows a run of `steps`, which stands at `start` when this process begins."""

    def __init__(self, steps: int, start: float, *, silent: bool = False, console: Console | None = None) -> None:
        self.steps, self.start, self.silent = steps, start, silent
        self.console = console or Console(highlight=False, quiet=silent)
        self.began = time.monotonic()
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.text = "starting"

    def __enter__(self) -> Display:
        if self.console.is_terminal and not self.silent:
            self.bar = Progress(
                BarColumn(bar_width=16),
                TextColumn("{task.fields[where]}"),
                TextColumn("{task.fields[numbers]}"),
                TextColumn("[dim]{task.fields[left]}[/]"),
                console=self.console,
                transient=True,
            )
            self.task = self.bar.add_task("", total=self.steps, completed=int(self.start), where="", numbers=self.text, left="")
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    def advance(self, step: int, at: float, row: Row) -> None:
        """After each step: where the run stands on its way (`at`, of `steps`), and the row of the step, empty if none was due."""
        numbers = describe(row)
        left = f"{duration(self.seconds_left(at))} left"
        if self.bar is not None:
            if "loss/train" in row:
                self.text = f"loss {row['loss/train']:.4f}  {row['tokens_per_second']:,.0f} tokens/s"  # fits 80 columns
            self.bar.update(self.task, completed=at, where=f"step {step:,}", numbers=self.text, left=left)
        if numbers and (self.bar is None or "loss/val" in row):
            self.say(f"step {step:>6,}  {numbers}  {left}")

    def seconds_left(self, at: float) -> float:
        """At the pace of this process so far."""
        done = max(at - self.start, 1e-9)
        return (time.monotonic() - self.began) / done * max(0.0, self.steps - at)


def describe(row: Row) -> str:
    """The numbers of a row that a person follows, in one line."""
    parts = []
    if "loss/train" in row:
        parts += [
            f"loss {row['loss/train']:.4f}",
            f"bits/byte {row['bits_per_byte/train']:.3f}",
            f"{row['tokens_per_second']:,.0f} tokens/s",
        ]
    if "loss/val" in row:
        parts += [f"validation loss {row['loss/val']:.4f}", f"bits/byte {row['bits_per_byte/val']:.3f}"]
    return "  ".join(parts)


def duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
