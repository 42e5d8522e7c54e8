"""A CUDA driver that writes down what it is asked for."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REAL, FAKE = "libcuda.so.1", "libgdn_fake_cuda.so.1"


class Driver:
    """The driver under test: what it has been asked for since the last time."""

    library = FAKE
    """That which has what is asked of cuBLAS too."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.fake_log.restype = ctypes.c_char_p

    def log(self) -> list[str]:
        lines = self._library.fake_log().decode().splitlines()
        self._library.fake_clear()
        return lines

    def fail(self, name: str, how: int = 700) -> None:
        self._library.fake_fail(name.encode(), how)

    def context(self, context: int) -> None:
        """Current in this thread."""
        self._library.fake_context(ctypes.c_long(context))

    def current(self) -> int:
        return self._library.fake_current()

    def capture(self, whether: bool) -> None:
        self._library.fake_capture(int(whether))

    def cublas(self, does: str, workspace: int = 0) -> None:
        """What cuBLAS has the GPU do from now on, with at least so many bytes (fake_driver.c)."""
        self._library.fake_cublas(does.encode(), ctypes.c_long(workspace))

    def told(self) -> int:
        """How many nodes of graphs have been given parameters since the last time."""
        return self._library.fake_told()

    def living(self) -> int:
        """Graphs, those made executable, and streams."""
        return self._library.fake_living()


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Loaded before launches.c is, which finds it by its name."""
    pytest.importorskip("triton")
    from triton.backends.nvidia import driver as nvidia

    path = tmp_path_factory.mktemp("driver") / FAKE
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "cc"  # as Triton finds the one for launches.c
    source, include = Path(__file__).with_name("fake_driver.c"), nvidia.include_dirs[0]
    command = [compiler, "-shared", "-fPIC", "-Wall", "-Werror", f"-I{include}", f"-Wl,-soname,{FAKE}", str(source), "-o", str(path)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture
def driver(library: ctypes.CDLL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """launches.c and products.c with it in place of the real one, which may be there too."""
    from gdn.core import portable_plan

    sources = [tmp_path / source.name for source in portable_plan._SOURCES]
    codes = [source.read_text() for source in portable_plan._SOURCES]
    assert sum(code.count(REAL) for code in codes) == 1
    for source, code in zip(sources, codes, strict=True):
        source.write_text(code.replace(REAL, FAKE))
    monkeypatch.setattr(portable_plan, "_SOURCES", sources)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(portable_plan, "_found", [])
    found = Driver(library)
    found.cublas("fills its workspace")
    yield found
    found.fail("")
    found.capture(False)
    found.context(1)
    found.log()
