"""The folder that can be uploaded as a Hugging Face kernel imports from any path, as `kernels` imports it."""

from __future__ import annotations

import importlib.util
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


def test_build_toml_names_the_package() -> None:
    general = tomllib.loads((PACKAGE / "build.toml").read_text())["general"]
    assert general == {"name": PACKAGE.name, "universal": True}
    assert (VARIANT / general["name"] / "__init__.py").is_file()
