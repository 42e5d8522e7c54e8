"""Run in a process of its own by test_targets.py: compile the kernels of the delta rules in float32 for Hopper, to the end.

Arguments: widths of keys and of values. Prints JSON, a line for each kernel: its name, registers of a thread, and bytes of its stack.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from compile_portable import launches, recurrence, source
from compile_warps import TARGET, pretend
from every_row import cut_up
from triton import knobs
from warps import name_of

from gdn.core.portable_launch import Launch
from gdn.ops.delta_channel.portable import channel_delta_rule
from gdn.ops.delta_rule.portable import gated_delta_rule

USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


def usage(what: Launch) -> tuple[int, int]:
    """Registers, and bytes of the stack."""
    options = {"num_warps": what.warps, "num_stages": what.stages, "maxnreg": what.registers}
    code = triton.compile(source(what), target=TARGET, options=options).asm["cubin"]
    with tempfile.TemporaryDirectory() as folder:
        (file := Path(folder) / "kernel.cubin").write_bytes(code)
        printed = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file], capture_output=True, text=True, check=True).stdout
    registers, stack = USAGE.findall(printed)[0]
    return int(registers), int(stack)


def main(K: int, V: int) -> None:
    """In segments and with gates apart, so that all kernels are there."""
    pretend()
    cut_up(setattr)
    seen = set()
    for row in (gated_delta_rule, channel_delta_rule):
        function, tensors, rest = recurrence(row, K, V, T=128)
        for what in launches(function, {name: x.float() for name, x in tensors.items()}, rest):
            if (key := (what.kernel, what.name(0)[0])) not in seen:
                seen.add(key)
                print(json.dumps([name_of(what.kernel), *usage(what)]), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
