"""Imports point down the list of layers and never up or around, deferred imports included."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "gdn"

# From the top. A layer may import what stands below it; names on one line are independent of each other.
LAYERS = [
    ["__main__"],
    ["cli"],
    ["testing"],
    ["recipes", "experiments"],
    ["train"],
    ["eval"],
    ["hf", "compat"],
    ["models"],
    ["data"],
    ["mixers"],
    ["nn"],
    ["ops"],
    ["core"],
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imports(path: Path) -> list[tuple[int, str]]:
    """Line and dotted name of every import in a file, wherever it stands."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def violations(path: Path, layer: str) -> list[str]:
    wrong = []
    for line, name in imports(path):
        parts = name.split(".")
        if parts[0] != "gdn" or len(parts) < 2 or parts[1].startswith("_"):
            continue
        target = parts[1]
        if target not in RANK or (target != layer and RANK[target] <= RANK[layer]):
            wrong.append(f"{path.name}:{line}: gdn.{layer} imports {name}")
    return wrong


def test_imports_point_down() -> None:
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            assert parts[0] in RANK, f"{path.name}: gdn.{parts[0]} is in no layer"
            wrong += violations(path, parts[0])
    assert not wrong, "\n".join(wrong)


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text("def late():\n    from gdn.models.lm import LM\n    return LM\n")
    assert violations(file, "ops") == ["example.py:2: gdn.ops imports gdn.models.lm.LM"]
    assert violations(file, "train") == []


def test_only_one_file_asks_what_hardware_this_is() -> None:
    asking = []
    for path in sorted(ROOT.rglob("*.py")):
        if path.relative_to(ROOT).as_posix() == "core/device.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("get_device_capability", "get_device_properties"):
                asking.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not asking


def test_importing_gdn_loads_nothing_heavy_and_importing_a_model_no_compiler() -> None:
    code = """
import sys, gdn
print([m for m in ("torch", "triton", "transformers", "datasets") if m in sys.modules])
import gdn.models.lm, gdn.train.step, gdn.mixers
print([m for m in ("torch._dynamo", "torch.distributed.tensor", "triton", "transformers", "datasets") if m in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == ["[]", "[]"]
