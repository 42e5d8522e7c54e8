"""The only file that asks what hardware this is."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import dataclass

import torch

from gdn.core.errors import ArgumentError, nearest


@functools.cache
def capability(index: int = 0) -> int:
    """Compute capability of a CUDA device as one number (90 for Hopper), 0 without one."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return 0
    major, minor = torch.cuda.get_device_capability(index)
    return major * 10 + minor


@functools.cache
def multiprocessors(index: int = 0) -> int:
    """Number of streaming multiprocessors of a CUDA device, 0 without one."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return 0
    return torch.cuda.get_device_properties(index).multi_processor_count


HOPPER, AMPERE, SMALL = 227, 163, 99
"""KiB of shared memory that a program may have: of an H100 or H200; of an A100; of GPUs for desks, from sm_86 to sm_121 (CUDA
C++ Programming Guide, "Compute Capabilities")."""


@functools.cache
def room(index: int = 0) -> int:
    """Shared memory that the rules for launch parameters may count on: `HOPPER`, where they were measured, also without a GPU; else at
    most `AMPERE`, for products on other GPUs take operands through registers (`portable_launch.through_registers`); or `SMALL`."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return HOPPER
    properties = torch.cuda.get_device_properties(index)
    size = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block) // 1024
    return SMALL if size < AMPERE else HOPPER if size >= HOPPER and capability(index) // 10 == 9 else AMPERE


@functools.cache
def memory_bytes(index: int = 0) -> int:
    """Memory of a CUDA device, 0 without one."""
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        return 0
    return torch.cuda.get_device_properties(index).total_memory


def total_bytes(device: torch.device) -> int:
    """Memory of a CUDA device or, for the CPU, of the machine; 0 for others, and where nobody says."""
    return memory_bytes(device.index or 0) if device.type == "cuda" else _memory_bytes() if device.type == "cpu" else 0


@functools.cache
def has_package(name: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(name) is not None


def interprets_triton() -> bool:
    """Whether Triton runs kernels on the CPU in its interpreter: decided by the environment before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What `gdn doctor` prints about the machine."""

    device: str
    name: str
    memory_bytes: int
    threads: int
    torch: str
    triton: str | None


def machine() -> Machine:
    """Describe the machine this process runs on."""
    triton = None
    if has_package("triton"):
        from importlib.metadata import version

        triton = version("triton")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        device, name, memory = "cuda", properties.name, properties.total_memory
    else:
        device, name, memory = "cpu", _cpu_name(), _memory_bytes()
    return Machine(
        device=device,
        name=name,
        memory_bytes=memory,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        triton=triton,
    )


def default_device() -> torch.device:
    """CUDA when there is a GPU, otherwise the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def named_device(name: str) -> torch.device:
    """A device by name: "auto", "cpu", "cuda" or "cuda:1". Raises `ArgumentError` for one that is not here."""
    if name == "auto":
        return default_device()
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise ArgumentError(f'device: expected "auto", "cpu", "cuda" or "cuda:1", got "{name}".{nearest(name, ("auto", "cpu", "cuda"))}')
    if kind == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= found:
            raise ArgumentError(
                f'device: expected one that is here, got "{name}", and torch {torch.__version__} finds {found} CUDA device(s)'
            )
    return torch.device(name)


def _cpu_name() -> str:
    import platform

    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
