"""Run in a process of its own by test_warps.py: translate every kernel with a running sum for Hopper, and look at the layouts of the sums.

Arguments: names of `every_row.CASES`. Prints JSON, a line for each kernel with running sums: its name, in how many of them lanes of equal
numbers lie between lanes of different ones, and how many it has. All that Triton 3.6 gets wrong are among them (notes/triton_pipelines.md).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator

from compile_warps import code, pretend
from every_row import cut_up, several_writes, written
from warps import name_of

from gdn.core.portable_launch import Launch

SCAN = re.compile(r'"tt.scan"[^\n]*?axis = (\d+).*?\}\) : \(tensor<([\dx]+)x\w+, (#\w+)>\) ->', re.S)
BLOCKED = re.compile(
    r"(#\w+) = #ttg.blocked<\{sizePerThread = \[([\d, ]+)\], threadsPerWarp = \[([\d, ]+)\], "
    r"warpsPerCTA = \[[\d, ]+\], order = \[([\d, ]+)\]"
)


def lanes(shape: list[int], each: list[int], threads: list[int], order: list[int]) -> list[int | None]:
    """The dimension along which each bit of a lane's number goes, the lowest first; None where both lanes hold the same numbers."""
    bits: list[int | None] = []
    for d in order:
        for bit in range(int(math.log2(threads[d]))):
            bits.append(d if each[d] << bit < shape[d] else None)
    return bits


def mixed_scans(text: str) -> tuple[int, int]:
    """Running sums in which lanes of equal numbers are nearer to each other than lanes of different ones along the sum, and all of them."""
    layouts = {name: [[int(x) for x in part.split(", ")] for part in parts] for name, *parts in BLOCKED.findall(text)}
    found = SCAN.findall(text)
    assert len(found) == text.count('"tt.scan"')
    mixed = 0
    for axis, shape, layout in found:
        bits = lanes([int(x) for x in shape.split("x")], *layouts[layout])
        along = [i for i, d in enumerate(bits) if d == int(axis)]
        mixed += bool(along) and None in bits[: along[-1]]
    return mixed, len(found)


def launches(name: str) -> Iterator[Launch]:
    if name == "gated_delta_product":
        for n in (2, 3, 4, 40):
            yield from written(name, case=several_writes(n))
    else:
        yield from written(name)


def main(*names: str) -> None:
    """Gates in the kernel of the pairs where they may be, then apart, and sequences cut up."""
    pretend()
    seen = set()
    for cut in (False, True):
        if cut:
            cut_up(setattr)
        for what in (what for name in names for what in launches(name)):
            if (key := (what.kernel, what.name(0)[0])) not in seen:
                seen.add(key)
                if text := code(what, "tt.scan"):
                    print(json.dumps([name_of(what.kernel), *mixed_scans(text)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
