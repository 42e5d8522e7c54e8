"""Every Python block of the documents runs, and every example in a docstring is right."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import gdn

ROOT = Path(__file__).parent.parent
DOCUMENTS = ["README.md", *(p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "gdn").rglob("*.md")))]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks((ROOT / document).read_text()):
        exec(compile(code, document, "exec"), {"__name__": "__main__"})


def test_the_readme_has_a_library_tour() -> None:
    tour = blocks((ROOT / "README.md").read_text())
    assert tour
    assert "gated_delta_rule" in "".join(tour)


def modules_with_examples() -> list[str]:
    found = []
    for module in pkgutil.walk_packages(gdn.__path__, "gdn."):
        spec = module.module_finder.find_spec(module.name, None)  # type: ignore[call-arg]
        if spec and spec.origin and ">>> " in Path(spec.origin).read_text():
            found.append(module.name)
    return found


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstring_examples_are_right(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted
    assert not result.failed
