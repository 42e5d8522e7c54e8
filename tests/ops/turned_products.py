"""A gradient as chunks have it, with a product of matrices turned to be the first operand of another: Triton got that wrong on Hopper.

    scores = do v^T for i >= j        dq = do h + scores k        dk = v dh + scores^T q

`FORM` says how scores^T q is found: "turned" and "chained" are the forms of two issues of flash-linear-attention, the others those of our
rows (test_turned_products.py). As a program it prints how wrong the former are: form, columns, warps and the error of dk, a JSON line each.
An error of the GPU ends it.
"""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl
from torch import Tensor

from gdn.core.portable_launch import launch
from gdn.testing import compare

C = 64
V = 128
BLOCK = 64
ISSUES = ("turned", "chained")
OURS = ("stored", "again", "parted")


@triton.jit
def load(x, first, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr):
    return tl.load(x + first + (tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, COLUMNS)[None, :]))


@triton.jit
def gradient_kernel(
    do,
    v,
    h,
    dh,
    q,
    k,
    held,
    scratch,
    dq,
    dk,
    C: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    FORM: tl.constexpr,
):
    i = tl.arange(0, C)
    at = i[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    scores = tl.zeros((C, C), tl.float32)
    turned = tl.zeros((C, C), tl.float32)
    total_q = tl.zeros((C, WIDTH), tl.float32)
    total_k = tl.zeros((C, WIDTH), tl.float32)
    for first in tl.range(0, V, BLOCK, num_stages=2):
        do_rows = load(do, first, C, BLOCK, V)
        v_rows = load(v, first, C, BLOCK, V)
        scores = tl.dot(do_rows, tl.trans(v_rows), scores)
        if FORM == "again":
            turned = tl.dot(v_rows, tl.trans(do_rows), turned)
        total_q = tl.dot(do_rows, load(h, first * WIDTH, BLOCK, WIDTH, WIDTH), total_q)
        total_k = tl.dot(v_rows, load(dh, first * WIDTH, BLOCK, WIDTH, WIDTH), total_k)
    q_rows = load(q, 0, C, WIDTH, WIDTH)
    k_rows = load(k, 0, C, WIDTH, WIDTH)
    narrow = tl.where(i[:, None] >= i[None, :], scores, 0.0).to(tl.bfloat16)
    if FORM == "chained":
        inverse = load(held, 0, C, C, C)
        narrow = tl.dot(narrow, inverse).to(tl.bfloat16)
        narrow = tl.where(i[:, None] >= i[None, :], tl.dot(inverse, narrow), 0.0).to(tl.bfloat16)
    total_q = tl.dot(narrow, k_rows, total_q)
    if FORM == "again":
        total_k = tl.dot(tl.where(i[:, None] <= i[None, :], turned, 0.0).to(tl.bfloat16), q_rows, total_k)
    elif FORM == "stored":
        tl.store(scratch + (i[:, None] * C + i[None, :]), narrow)
        tl.debug_barrier()
        total_k = tl.dot(tl.trans(load(scratch, 0, C, C, C)), q_rows, total_k)
    elif FORM == "parted":
        columns = tl.trans(narrow)
        total_k = tl.dot(tl.where(i[:, None] == i[None, :], columns, 0.0).to(tl.bfloat16), q_rows, total_k)
        for level in tl.range(0, 6, num_stages=1):
            apart = ((i[:, None] >> level) ^ (i[None, :] >> level)) == 1
            total_k = tl.dot(tl.where(apart, columns, 0.0).to(tl.bfloat16), q_rows, total_k)
    else:
        total_k = tl.dot(tl.trans(narrow), q_rows, total_k)
    tl.store(dq + at, total_q)
    tl.store(dk + at, total_k)


def errors(form: str, width: int, warps: int, device: str) -> tuple[dict[str, float], dict[str, float]]:
    """How wrong dq and dk are, and how wrong they may be: twice what it costs to round what the kernel rounds."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"do": (C, V), "v": (C, V), "h": (V, width), "dh": (V, width), "q": (C, width), "k": (C, width), "held": (C, C)}
    given = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    scratch, dq, dk = torch.empty(C, C, dtype=torch.bfloat16), torch.empty(C, width), torch.empty(C, width)
    arguments = [x.to(device) for x in (*given.values(), scratch, dq, dk)]
    launch(gradient_kernel, (1,), *arguments, C, V, BLOCK, width, form, warps=warps, stages=2)
    truth, rounded = (_expected(form, {name: x.double() for name, x in given.items()}, narrow) for narrow in (False, True))
    wrong = {name: compare.error(x.double().cpu(), truth[name]) for name, x in zip(("dq", "dk"), arguments[-2:], strict=True)}
    return wrong, {name: compare.allowed(compare.error(rounded[name], truth[name]), torch.bfloat16) for name in wrong}


def _expected(form: str, x: dict[str, Tensor], narrow: bool) -> dict[str, Tensor]:
    def rounds(y: Tensor) -> Tensor:
        return y.bfloat16().double() if narrow else y

    scores = rounds((x["do"] @ x["v"].mT).tril())
    if form == "chained":
        scores = rounds((x["held"] @ rounds(scores @ x["held"])).tril())
    return {"dq": x["do"] @ x["h"] + scores @ x["k"], "dk": x["v"] @ x["dh"] + scores.mT @ x["q"]}


def main() -> None:
    for form in ISSUES:
        for width, warps in ((64, 2), (64, 4), (32, 4), (128, 4)):
            wrong, _ = errors(form, width, warps, "cuda")
            print(json.dumps([form, width, warps, wrong["dk"]]), flush=True)


if __name__ == "__main__":
    main()
