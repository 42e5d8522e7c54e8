"""The folder that can be uploaded as a Hugging Face kernel imports from any path, as `kernels` imports it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gdn.compat import fla

PACKAGE = Path(__file__).parents[2] / "kernels" / "gated_delta_networks"
VARIANT = PACKAGE / "build" / "torch-universal"


def load(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Under a name of its own, with the package's parent on no path."""
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", [VARIANT, VARIANT / "gated_delta_networks"], ids=["flat", "nested"])
def test_the_kernel_imports_by_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = load(folder, "_kernel_of_a_test", monkeypatch)
    assert kernel.chunk_gated_delta_rule is fla.chunk_gated_delta_rule
    assert kernel.fused_recurrent_gated_delta_rule is fla.fused_recurrent_gated_delta_rule
    assert all(hasattr(kernel, name) for name in kernel.__all__)
    one, g = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1)
    o, _ = kernel.layers.chunk_gated_delta_rule()(one, one, 3 * one, g=g, beta=g + 0.5)
    assert o.flatten().tolist() == [1.5, 2.25]
    assert torch.equal(kernel.layers.recurrent_gated_delta_rule()(one, one, 3 * one, g=g, beta=g + 0.5)[0], o)
    compiled = torch.compile(kernel.layers.chunk_gated_delta_rule(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(one, one, 3 * one, g=g, beta=g + 0.5)[0], o)


def test_the_loader_finds_what_it_asks_for() -> None:
    """`kernels` 0.17 parses both files strictly: a name of lower-case letters, digits and dashes, these fields, no others."""
    build = tomllib.loads((PACKAGE / "build.toml").read_text())
    general = build["general"]
    assert set(build) == {"general", "torch-noarch"}
    assert set(general) == {"edition", "name", "version", "license", "backends"}
    metadata = json.loads((VARIANT / "metadata.json").read_text())
    assert set(metadata) == {"name", "id", "version", "license", "python-depends", "backend"}
    assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", metadata["name"])
    assert metadata["id"].isidentifier()  # the module's name
    assert metadata["backend"]["type"] in general["backends"]
    assert all(metadata[name] == general[name] for name in ("name", "version", "license"))
    assert (VARIANT / metadata["name"].replace("-", "_") / "__init__.py").is_file()
