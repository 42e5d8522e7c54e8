"""The plots of BENCHMARKS.md: time, memory and tokens a second against length, one colour an implementation. Each is drawn where a machine
has results for two points of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recorded import Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FOLDER = Path("benchmarks/plots")
STYLES = {
    "ours": ("C0", "o"), "chunked": ("C0", "o"), "ours compiled": ("C9", "D"), "ours graph": ("C9", "D"), "ours compiled graph": ("C4", "P"),
    "fla": ("C1", "s"), "fla padded": ("C1", "X"), "fla generate": ("C5", "X"), "flash_qla": ("C2", "^"), "attention_gym": ("C3", "v"),
    "transformer": ("C7", "p"), "transformer compiled": ("darkgrey", "h"), "transformer blocks": ("dimgrey", "H"), "ours blocks": ("C4", "D"), "transformers": ("C6", "s"),
}  # fmt: skip
Point = tuple[str, Any, float]
"""Panel, length or name, value."""
Title = Callable[[str], str]
Points = dict[str, list[tuple[Any, float]]]
"""Implementation -> (length or name, value)."""


@dataclass(frozen=True)
class Picture:
    name: str
    caption: str
    panels: Callable[[Sequence[Result]], dict[str, Points]]
    """Title of each panel -> implementation -> points."""
    axes: Callable[[str], tuple[str, str]]
    """Names of the axes of a panel, by its title."""
    lines: int = 1
    """Lines of panels."""
    bars: bool = False
    """A bar for each name in place of a line over lengths."""
    zero: bool = False
    """A linear scale from zero in place of a logarithmic one."""

    def path(self, device: str) -> Path:
        return FOLDER / f"{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}_{self.name}.png"

    def shown(self, results: Sequence[Result]) -> dict[str, Points]:
        """Panels with a line to draw, or with a bar."""
        found = self.panels(results)
        return {name: points for name, points in found.items() if any(self.bars or len({x for x, _ in p}) > 1 for p in points.values())}

    def draw(self, results: Sequence[Result], title: Title) -> Figure:
        from matplotlib.figure import Figure

        panels = self.shown(results)
        columns = -(-len(panels) // self.lines)
        lines = -(-len(panels) // columns)
        width = 11.0 if self.bars else max(7.2, 3.6 * columns)
        figure = Figure(figsize=(width, 3.4 * lines), layout="constrained")
        figure.suptitle(self.caption, fontsize=11)
        places = figure.subplots(lines, columns, squeeze=False).ravel()
        for axes, (name, points) in zip(places, panels.items()):
            if self.bars:
                over_names(axes, points, title)
            else:
                over_lengths(axes, points, title, zero=self.zero)
            axes.set_title(name, fontsize=10)
            axes.set_xlabel(self.axes(name)[0])
            axes.set_ylabel(self.axes(name)[1])
        for axes in places[len(panels) :]:
            axes.set_axis_off()
        known: dict[str, Any] = {}
        for axes in places[: len(panels)]:
            handles, labels = axes.get_legend_handles_labels()
            known |= dict(zip(labels, handles))
        figure.legend(
            known.values(), known.keys(), loc="outside lower center", ncols=fitting(known, figure.get_figwidth()), fontsize=9, frameon=False
        )
        return figure


def fitting(labels: Iterable[str], inches: float) -> int:
    """Columns of a legend of this width, in letters of a fifteenth of an inch beside marks of as many as six."""
    longest = max(map(len, labels))
    return max(1, min(5, int(15 * inches / (longest + 6))))


def over_lengths(axes: Axes, points: Points, title: Title, *, zero: bool) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    for impl, line in points.items():
        colour, marker = STYLES.get(impl, ("C8", "*"))
        xs, ys = zip(*sorted(line))
        axes.plot(xs, ys, color=colour, marker=marker, markersize=5, linewidth=1.6, label=title(impl))
    axes.set_xscale("log", base=2)
    axes.set_yscale("linear" if zero else "log")
    axes.set_xticks(sorted({x for line in points.values() for x, _ in line}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K" if x >= 1024 else f"{x:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,g}"))
    if not zero:
        axes.yaxis.set_minor_formatter(FuncFormatter(minor(axes)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8, which="both")
    axes.grid(True, which="major", alpha=0.3)
    axes.margins(y=0.15)
    if zero:
        axes.set_ylim(bottom=0)


def minor(axes: Axes) -> Callable[[float, int], str]:
    """Name 2 and 5 between powers of ten where the axis spans less than two of them."""

    def name(y: float, _: int) -> str:
        low, high = axes.get_ylim()
        return f"{y:,g}" if high / low < 100 and f"{y:e}"[0] in "235" else ""

    return name


def over_names(axes: Axes, points: Points, title: Title) -> None:
    """A group of bars for each name."""
    names = list(dict.fromkeys(name for line in points.values() for name, _ in line))
    width = 0.8 / len(points)
    for i, (impl, line) in enumerate(points.items()):
        places = [names.index(name) + (i - (len(points) - 1) / 2) * width for name, _ in line]
        axes.bar(places, [y for _, y in line], width, color=STYLES.get(impl, ("C8", "*"))[0], label=title(impl))
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axes.tick_params(labelsize=9)
    axes.grid(True, axis="y", alpha=0.3)


def collect(results: Sequence[Result], value: Callable[[Result], Point | None]) -> dict[str, Points]:
    """Points by panel and implementation; None leaves a result out."""
    panels: dict[str, Points] = {}
    for result in results:
        found = None if result.failed else value(result)
        if found is not None:
            panels.setdefault(found[0], {}).setdefault(result.impl, []).append((found[1], found[2]))
    order = list(STYLES)
    return {
        name: dict(sorted(points.items(), key=lambda line: order.index(line[0]) if line[0] in order else 99))
        for name, points in panels.items()
    }


def rule_panels(what: str) -> Callable[[Sequence[Result]], dict[str, Points]]:
    """A panel of time and one of memory for each number of heads, of one sequence."""

    def panels(results: Sequence[Result]) -> dict[str, Points]:
        def one(value: str, unit: str) -> dict[str, Points]:
            def read(r: Result) -> Point | None:
                parts = (
                    re.fullmatch(r"(\d+/\d+) 1x(\d+)", str(r.fact("row"))) if r.bench == "delta_rule" and r.fact("what") == what else None
                )
                if parts is None or value not in r.values:
                    return None
                more = r.get("inputs_MiB", 0) if value == "peak_MiB" else 0
                return f"{parts[1]} heads, {unit}", int(parts[2]), r[value] + more

            return collect(results, read)

        found = one("eager_ms", "time") | one("peak_MiB", "memory")
        return dict(sorted(found.items(), key=lambda item: (item[0].endswith("memory"), [int(n) for n in re.findall(r"\d+", item[0])])))

    return panels


def rule_axes(panel: str) -> tuple[str, str]:
    return "tokens", "ms" if panel.endswith("time") else "peak MiB"


def train_panels(results: Sequence[Result]) -> dict[str, Points]:
    def one(value: str, panel: str, unit: float) -> dict[str, Points]:
        def read(r: Result) -> Point | None:
            if r.bench != "train" or value not in r.values:
                return None
            return f"{r.fact('size')}: {panel}", int(r.fact("shape").split("x")[1]), r[value] / unit

        return collect(results, read)

    return one("tokens_per_s", "speed", 1e3) | one("peak_GiB", "memory", 1)


def train_axes(panel: str) -> tuple[str, str]:
    return "tokens of a sequence", "thousand tokens/s" if panel.endswith("speed") else "peak GiB"


def decode_panels(results: Sequence[Result]) -> dict[str, Points]:
    return collect(results, lambda r: (f"{r.fact('size')}", r.fact("batch"), r["tokens_per_s"]) if r.bench == "decode" else None)


def layer_panels(results: Sequence[Result]) -> dict[str, Points]:
    def read(r: Result) -> Point | None:
        if r.bench != "layer":
            return None
        return f"width {r.fact('width')}, {r.fact('shape')}, {r.fact('dtype')}", r.fact("mixer"), r["eager_ms"]

    return collect(results, read)


def processor_panels(results: Sequence[Result]) -> dict[str, Points]:
    def read(r: Result) -> Point | None:
        named = re.fullmatch(r"(\d+) tokens", str(r.fact("name"))) if r.bench == "ops" else None
        return (f"{r.fact('op')}, {r.fact('mode')}", int(named[1]), r["eager_ms"]) if named else None

    return collect(results, read)


PICTURES = [
    Picture("rule_forward", "Gated delta rule, forward, one sequence: time and memory against length", rule_panels("forward"), rule_axes, lines=2),
    Picture(
        "rule_training", "Gated delta rule, forward and backward, one sequence: time and memory against length",
        rule_panels("training"), rule_axes, lines=2,
    ),
    Picture("layer", "One layer of each mixer, forward and backward", layer_panels, lambda _: ("", "ms"), bars=True),
    Picture("train", "Training a language model: speed and memory against length, equally many tokens a batch", train_panels, train_axes, zero=True),
    Picture("decode", "Decoding with a language model: speed against batch", decode_panels, lambda _: ("sequences", "tokens/s")),
    Picture("ops", "Operators on a processor: time against length", processor_panels, lambda _: ("tokens", "ms")),
]  # fmt: skip


def drawable(results: Sequence[Result]) -> list[Picture]:
    return [picture for picture in PICTURES if picture.shown(results)]
