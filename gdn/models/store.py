"""A model as a folder: `config.json` and `model.safetensors`, written here or by the Hugging Face class (`gdn.hf`)."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdn.core.errors import CheckpointError
from gdn.mixers.base import FLOAT32
from gdn.models.lm import LM
from gdn.models.start import PREFIX, Start

CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"

HF_NAMES = {
    "vocab": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "mlp": "intermediate_size",
    "tie_embeddings": "tie_word_embeddings",
}
"""Fields of `LM.Config` that have a name of their own in a Hugging Face folder; the others stand there under "lm"."""

ORIGIN = "origin"
"""Where a converted folder keeps the family and the configuration that it was converted from, so that the way back loses nothing."""

HF_PREFIX = "lm."
"""What the names of weights begin with in a Hugging Face folder."""


def model_folder(run: str | Path) -> Path:
    """The folder with the weights: `run` itself, or `run/model` of a training directory."""
    run = Path(run)
    for folder in (run, run / "model"):
        if (folder / WEIGHTS).is_file() or (folder / INDEX).is_file():
            return folder
    if not run.exists():
        raise CheckpointError(f"{run}: no such folder")
    if not run.is_dir():
        raise CheckpointError(f"{run}: expected a folder, got a file")
    raise CheckpointError(f"{run} holds no {WEIGHTS}, nor does {run / 'model'}; a training run writes it when it ends")


def checkpoint_folder(path: str | Path) -> Path:
    """The folder with the weights of any family: itself, in pieces or whole, or that of a training run."""
    path = Path(path)
    if (path / CONFIG).is_file() and any(path.glob("*.safetensors")):
        return path
    return model_folder(path)


def expect_new(folder: Path) -> None:
    """Raise `CheckpointError` for a folder that holds a checkpoint."""
    if (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} already holds a checkpoint; expected a new folder")


def save_model(model: LM, folder: str | Path) -> None:
    """Write the model's configuration and weights; each file appears whole or not at all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = Path(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    partial = folder / f".{WEIGHTS}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, partial, metadata={"format": "pt"})
        os.replace(partial, folder / WEIGHTS)
        partial = folder / f".{CONFIG}.partial"
        partial.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n")
        os.replace(partial, folder / CONFIG)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {folder}: {error}") from error


def load_model(folder: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LM:
    """Read a model written by `save_model`, or by the Hugging Face class. `dtype` converts the weights; A_log and dt_bias stay float32."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} holds no {CONFIG}; expected a folder written by save_model or by a finished training run")
    config = stored_config(folder)
    with torch.device("meta"):
        model = LM(config)
        weights = _weights(folder, device)
        if any(name.startswith(PREFIX) for name in weights):
            model.start = Start(model.init_state(1))
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        first = wrong[0]
        raise CheckpointError(
            f"{folder / WEIGHTS} does not fit its config: {first} is {found.get(first, 'absent')}, expected {expected.get(first, 'absent')}"
        )
    model.load_state_dict(weights, assign=True)
    if dtype is not None:
        cast(model, dtype)
    return model


def stored_config(folder: Path) -> LM.Config:
    """The configuration of a stored model."""
    return read_config(read_json(folder / CONFIG))


def converted_from(folder: Path) -> str | None:
    """The checkpoint family that a model was converted from; None for one that was made here."""
    family = read_json(folder / CONFIG).get(ORIGIN, {}).get("family")
    return None if family in ("gdn", "run") else family


def read_config(values: Mapping[str, Any]) -> LM.Config:
    """The configuration in a folder's config.json."""
    if values.get("model_type") == "gdn":
        return LM.Config.from_dict({**values["lm"], **{ours: values[theirs] for ours, theirs in HF_NAMES.items()}})
    if "model_type" in values:
        raise CheckpointError(f'{CONFIG}: a "{values["model_type"]}" model; convert it first: gdn convert SRC DST --to gdn')
    return LM.Config.from_dict(values)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{path} cannot be read: expected an object, got {type(found).__name__}")
    return found


def _weights(folder: Path, device: torch.device | str) -> dict[str, Tensor]:
    """The tensors of one or several files; gates in float32 however they were stored."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = [WEIGHTS]
    if (folder / INDEX).is_file() and not (folder / WEIGHTS).is_file():  # transformers leaves an old index beside one file
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}; expected a folder written by save_model or by a finished training run")
        try:
            stored = load_file(folder / name, device=str(device))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} cannot be read: {error}") from error
        weights |= {n.removeprefix(HF_PREFIX): t for n, t in stored.items()}
    return {n: t.float() if n.endswith(FLOAT32) and t.itemsize < 4 else t for n, t in weights.items()}


def cast(model: LM, dtype: torch.dtype) -> LM:
    """Convert the weights in place, but not the gates' A_log and dt_bias, whose precision the decay depends on."""
    for name, parameter in model.named_parameters():
        if not name.endswith(FLOAT32):
            parameter.data = parameter.data.to(dtype)
    return model
