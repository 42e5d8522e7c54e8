"""Tests that need a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch


def gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test; without a CUDA device it is skipped."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))
