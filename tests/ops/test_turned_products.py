"""A product of matrices, turned, as the first operand of another: wrong on Hopper with some versions of Triton, numbers of warps and sizes.

What two issues of flash-linear-attention say, and the pull requests that followed:

- https://github.com/fla-org/flash-linear-attention/issues/640 (H20, H100): with Triton from 3.4 `chunk_gated_delta_rule` had wrong
  gradients of beta and g. https://github.com/fla-org/flash-linear-attention/pull/826 found the line:
  `b_dk += tl.dot(tl.trans(b_ds), b_q)`, where b_ds, 64 x 64 in 16 bits, is a sum of products. Blocks of 64 channels were wrong, of 32 and
  128 right, whatever the warps and stages that were tried (https://github.com/unslothai/unsloth-zoo/pull/1010). Triton 3.7.1 is right
  (https://github.com/fla-org/flash-linear-attention/pull/983).
- https://github.com/fla-org/flash-linear-attention/issues/984 (H100): with Triton from 3.4 `prepare_wy_repr_bwd_kernel`, the gradient of
  the delta rule's inverse, gave wrong gradients of keys and beta in chunks of 64, not of 32. With 3.7.1, 4 warps ended in illegal accesses
  and 2 were right (https://github.com/fla-org/flash-linear-attention/pull/988). Which line is wrong has not been found out here; the two
  products with the inverse are not, says the issue, and after them the kernel has the line of the other issue.

Triton takes Hopper's own products with 4 warps and not with 2. Our rows have neither kernel, and three forms in place of the line:

- stored: one kernel stores the product, another loads it turned (`pairs_kernel` and `gradient_kernel` of delta_rule and of delta_channel);
- again: the turned product is one of its own (`_of_keys` in linear_recurrence/portable_heads.py, `key_gradient_kernel` in
  attention/portable.py);
- parted: turned in registers and cut into parts, which differs from the line by masks alone (`channel_gradient_kernel` in
  linear_recurrence/portable_channels.py).

Here they are alone. In whole operators, in blocks of 64 channels, the tests of head widths have them (test_delta_rule.py,
test_delta_channel_triton.py, test_linear_recurrence.py), and with other numbers of warps test_warps.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_gpu import gpu

pytest.importorskip("triton")

from turned_products import ISSUES, OURS, errors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ((64, 2), (64, 4), (128, 4))
"""Channels and warps. Not 8, nor 32 channels, which read beyond shared memory for other reasons (notes/triton_pipelines.md)."""


@pytest.mark.parametrize("form", OURS if DEVICE == "cuda" else (*OURS, *ISSUES))
@pytest.mark.parametrize(("width", "warps"), SIZES if DEVICE == "cuda" else SIZES[:1])
def test_forms_are_right(form: str, width: int, warps: int) -> None:
    """Those of our rows everywhere. In the interpreter, which compiles nothing, those of the issues too."""
    wrong, allowed = errors(form, width, warps, DEVICE)
    assert {name: error for name, error in wrong.items() if not error <= allowed[name]} == {}


@gpu
def test_the_form_of_the_issues_is_shown_beside_ours(capsys: pytest.CaptureFixture[str]) -> None:
    """Whether this Triton gets it wrong is for who reads; it runs in a process of its own, which an illegal access may end."""
    script = Path(__file__).with_name("turned_products.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    with capsys.disabled():
        print(f"\nform, channels, warps, error of dk:\n{done.stdout}{done.stderr[-300:]}")
    assert done.stdout or "CUDA error" in done.stderr
