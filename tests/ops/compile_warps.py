"""Run in a process of its own by test_warps.py: translate kernels for Hopper, with the warps that they ask for and with twice as many.

Arguments: names of `every_row.CASES`. Prints JSON, a line for each kernel with matrix products: its name, "as asked" or "twice", and how
many products of warp groups have fewer rows than 16 a warp and the first operand in shared memory.
"""

from __future__ import annotations

import json
import re
import sys
from fractions import Fraction
from typing import Any

from compile_portable import source
from every_row import cut_up, written
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from warps import name_of, warps_times

from gdn.core import checks
from gdn.core import device as hardware
from gdn.core.portable_launch import Launch

TARGET = GPUTarget("cuda", 90, 32)
ROWS = re.compile(r"(#\w+) = #ttg.nvidia_mma<\{versionMajor = 3, .*?warpsPerCTA = \[(\d+)")
PRODUCT = re.compile(r"warp_group_dot .*?\} : (\S+)<.* -> tensor<(\d+)x\w+, (#\w+)>")


def code(what: Launch, operation: str) -> str | None:
    """Triton's code for a GPU, layouts chosen; None for a kernel without this operation."""
    backend: Any = make_backend(TARGET)
    options = backend.parse_options({"num_warps": what.warps, "num_stages": what.stages})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    made = source(what)
    module: Any = made.make_ir(TARGET, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)
    if operation not in str(module):
        return None
    stages: dict[str, Any] = {}
    metadata: dict[str, Any] = {"target": TARGET, **options.__dict__}
    backend.add_stages(stages, options, made.language)
    for name in ("ttir", "ttgir"):
        module = stages[name](module, metadata)
    return str(module)


def small_products(text: str) -> int:
    """Those of fewer rows than 16 for each warp that shares them, with the first operand in shared memory."""
    along = {layout: int(warps) for layout, warps in ROWS.findall(text)}
    found = PRODUCT.findall(text)
    assert len(found) == text.count("warp_group_dot ")
    return sum(first == "!ttg.memdesc" and int(rows) < 16 * along[layout] for first, rows, layout in found)


def pretend() -> None:
    """Let rows take tensors of the CPU as if an H200 were here. Nothing is launched."""
    hardware.interprets_triton = lambda: True
    hardware.capability = lambda index=0: 90
    hardware.room = lambda index=0: hardware.HOPPER
    hardware.multiprocessors = lambda index=0: 132
    checks.not_positive = lambda *arguments: None


def main(*names: str) -> None:
    pretend()
    cut_up(setattr)
    seen = set()
    for factor, times in (("as asked", Fraction(1)), ("twice", Fraction(2))):
        with warps_times(times, hold=False):
            found = [what for name in names for what in written(name)]
        for what in found:
            key = (what.kernel, what.name(0)[0])
            if key not in seen:
                seen.add(key)
                text = code(what, "tt.dot")
                if text is not None:
                    print(json.dumps([name_of(what.kernel), factor, small_products(text)]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
