"""Without a GPU, Triton's kernels run in its interpreter. That is decided before Triton is first imported, so for all tests here."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
