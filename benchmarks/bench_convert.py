"""Every checkpoint family in both directions: opened, logits equal, tensors byte-equal on the way back. Exits 1 where something is not.

    python benchmarks/bench_convert.py                                   the table, for what is installed here
    TRITON_INTERPRET=1 python benchmarks/bench_convert.py                flash-linear-attention's classes too, without a GPU (minutes)
    python benchmarks/bench_convert.py --device cuda --dtype float32 bfloat16 --jobs 12

Rows "in": a small random model of the library's own class (transformers, flash-linear-attention) is saved, read here, converted to gdn and
back. Rows "out": a random model of gdn is converted and opened by that class, then converted back. Families without a class of another
library are read and written by gdn alone; the table says so.

`difference` is the largest difference between the two models' logits over the largest logit. The errors are each model's against ours in
float64 on the CPU, root mean square over that of the logits: a largest one of 16 bits is chance. In float32 the difference is at most
1e-4; in bfloat16 our error is at most twice theirs. More than 64 tokens take flash-linear-attention's kernels for chunks, which refuse
float32 in some families; so the rows in float32 are shorter than that, and those in bfloat16 longer (its interpreter takes only the former).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import transformers
from torch import Tensor

from gdn.core.device import machine
from gdn.hf.convert import convert, load
from gdn.hf.families import FAMILIES, family
from gdn.models.lm import LM
from gdn.models.store import save_model
from gdn.testing.checkpoints import PEERS, SIZES, logits_of, missing, open_folder, random_model, scattered

LENGTH = {"float32": 48, "bfloat16": 150}
BAR = 1e-4
NVLABS = {
    "n_embd": 108,
    "n_layer": 4,
    "n_head": 3,
    "vocab_size": 97,
    "padding_multiple": 97,
    "intermediate_size": 96,
    "gated_delta_per_layer": 2,
    "local_window": 16,
}


def largest(a: Tensor, b: Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).abs().max() / b.double().abs().max())


def error(a: Tensor, truth: Tensor) -> float:
    return float((a.double().cpu() - truth).norm() / truth.norm())


def tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    inside = folder if any(folder.glob("*.safetensors")) else folder / "model"
    return {name: tensor for path in sorted(inside.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def changed(one: Path, other: Path) -> list[str]:
    """Tensors that are not the same bytes."""
    a, b = tensors(one), tensors(other)
    return [n for n in sorted({*a, *b}) if n not in a or n not in b or a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])]


@torch.no_grad()
def compare(theirs: Any, ours: LM, dtype: str, device: str) -> dict[str, Any]:
    """Logits of both in one dtype on one device, and their errors."""
    tokens = torch.randint(ours.config.vocab, (2, LENGTH[dtype]), generator=torch.Generator().manual_seed(0))
    mine = ours.to(device)(tokens.to(device)).logits
    found = {} if theirs is None else {"theirs": logits_of(theirs.to(device), tokens.to(device))}
    truth = ours.cpu().double()(tokens).logits
    assert mine is not None and truth is not None
    row: dict[str, Any] = {"our_error": error(mine, truth), "length": LENGTH[dtype]}
    if found:
        row |= {"their_error": error(found["theirs"], truth), "difference": largest(mine, found["theirs"])}
        row["equal"] = row["difference"] <= BAR if dtype == "float32" else row["our_error"] <= 2 * row["their_error"]
    return row


def inwards(name: str, dtype: str, device: str, folder: Path) -> dict[str, Any]:
    """Their model, read here, and back."""
    model = random_model(name).to(getattr(torch, dtype))
    model.save_pretrained(folder / "theirs")
    row = {"opened_by": type(model).__name__, **compare(model, load(folder / "theirs").eval(), dtype, device)}
    convert(folder / "theirs", folder / "gdn", "gdn")
    convert(folder / "gdn", folder / "back", name)
    return row | {"tensors": len(tensors(folder / "theirs")), "changed": renamed(name, folder)}


def renamed(name: str, folder: Path) -> list[str]:
    """What changed, but for what transformers 5.23 itself reads differently than it writes (`gdn.hf.families.olmo`)."""
    found = changed(folder / "theirs", folder / "back")
    return [n for n in found if not (name == "olmo_hybrid" and ("conv1d" in n or "layernorm" in n or "layer_norm" in n))]


def outwards(name: str, dtype: str, device: str, folder: Path) -> dict[str, Any]:
    """Our model, opened by their class, and back."""
    torch.manual_seed(0)
    ours = scattered(LM(config_of(name))).to(getattr(torch, dtype)).eval()
    source = "run" if name != "run" else "gdn"
    save_model(ours, folder / "run")
    if source == "gdn":
        convert(folder / "run", folder / "gdn", "gdn")
    convert(folder / source, folder / "theirs", name)
    theirs = open_folder(name, folder / "theirs") if name == "gdn" or (name in PEERS and missing(name) is None) else None
    if theirs is not None:
        theirs = theirs.to(getattr(torch, dtype))  # float32 gates make some classes open all, or a part, in float32
    ours = load(folder / "theirs").eval() if theirs is None else load(folder / source).eval()
    row = {"opened_by": "gdn" if theirs is None else type(theirs).__name__, **compare(theirs, ours, dtype, device)}
    convert(folder / "theirs", folder / "back", source)
    return row | {"tensors": len(tensors(folder / source)), "changed": changed(folder / source, folder / "back")}


def config_of(name: str) -> LM.Config:
    """A configuration that the family can express."""
    if name == "nvlabs":
        return family(name).read_config(NVLABS)
    peer = PEERS.get(name if name not in ("gdn", "run") else "gated_deltanet")
    assert peer is not None
    if peer.library == "transformers":
        return family(name).read_config(random_model(name).config.to_dict())
    sizes = {**SIZES, **peer.sizes, "intermediate_size": None if name == "mamba2" else SIZES["intermediate_size"]}
    return family(name if name in PEERS else "gated_deltanet").read_config(sizes)


DIRECTIONS = {"in": inwards, "out": outwards}


def measure(name: str, direction: str, dtype: str, device: str) -> dict[str, Any]:
    row: dict[str, Any] = {"family": name, "direction": direction, "dtype": dtype}
    reason = missing(name)
    if direction == "in" and reason is not None:
        return row | {"without": reason}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            row |= DIRECTIONS[direction](name, dtype, device, Path(folder))
        except Exception as raised:  # a row of the table, whoever raised it
            return row | {"error": f"{type(raised).__name__}: {raised}"[:300]}
    return row | {"seconds": round(time.perf_counter() - start, 1)}


def measured(cases: list[tuple[str, str, str, str]], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows in the order of the cases, several processes at work: most of the time is spent compiling the peers' kernels."""
    if jobs == 1:
        yield from (measure(*case) for case in cases)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=quiet) as pool:
        yield from pool.map(measure, *zip(*cases))


def quiet() -> None:
    logging.disable(logging.WARNING)


def line(row: dict[str, Any]) -> str:
    start = f"{row['family']:20}{row['direction']:4}{row['dtype']:9} "
    if "without" in row:
        return f"{start}no class to compare with: {row['without']}"
    if "error" in row:
        return f"{start}FAILED {row['error']}"
    parts = [f"{row[key]:10.1e}" if key in row else f"{'-':>10}" for key in ("difference", "our_error", "their_error")]
    equal = {True: "equal", False: "NOT EQUAL", None: "-"}[row.get("equal")]
    kept = f"{row['tensors']} the same bytes" if not row["changed"] else f"CHANGED {', '.join(row['changed'][:2])}"
    return f"{start}{row['opened_by']:30}{''.join(parts)}  {equal:10} {kept}"


def failed(row: dict[str, Any]) -> bool:
    return "error" in row or row.get("equal") is False or bool(row.get("changed"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES), metavar="NAME", help="default: all")
    parser.add_argument("--dtype", nargs="+", default=["float32"], choices=list(LENGTH))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="processes; default: 1")
    parser.add_argument("--out", type=Path, help="append the rows here as JSON")
    options = parser.parse_args()
    quiet()
    here = machine()
    common = {"device": here.name, "torch": here.torch, "transformers": transformers.__version__}
    print(
        f"{here.name}, torch {here.torch}, transformers {transformers.__version__}, flash-linear-attention: {missing('gla') or 'its own classes'}"
    )
    print(f"{'family':20}{'':4}{'dtype':9} {'opened by':30}{'difference':>10}{'ours':>10}{'theirs':>10}  logits     and back")
    cases = [(name, way, dtype, options.device) for dtype in options.dtype for name in options.families for way in DIRECTIONS]
    rows = []
    for row in measured(cases, options.jobs):
        rows.append({**row, **common})
        print(line(row), flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{sum(map(failed, rows))} of {len(rows)} rows failed")
    return int(any(map(failed, rows)))


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    sys.exit(main())
