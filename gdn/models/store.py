"""A model as a folder: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from gdn.core.errors import CheckpointError
from gdn.models.lm import LM

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def model_folder(run: str | Path) -> Path:
    """The folder with the weights: `run` itself, or `run/model` of a training directory."""
    run = Path(run)
    for folder in (run, run / "model"):
        if (folder / WEIGHTS).is_file():
            return folder
    if not run.exists():
        raise CheckpointError(f"{run}: no such folder")
    raise CheckpointError(f"{run} holds no {WEIGHTS}, nor does {run / 'model'}; a training run writes it when it ends")


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
    """Read a model written by `save_model`. `dtype` converts the weights; A_log and dt_bias stay float32."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} holds no {name}; expected a folder written by save_model or by a finished training run")
    config = read_config(folder)
    with torch.device("meta"):
        model = LM(config)
    try:
        weights = load_file(folder / WEIGHTS, device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder / WEIGHTS} cannot be read: {error}") from error
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


def read_config(folder: Path) -> LM.Config:
    """The configuration of a stored model."""
    try:
        values = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read: {error}") from error
    return LM.Config.from_dict(values)


def cast(model: LM, dtype: torch.dtype) -> LM:
    """Convert the weights in place, but not the gates' A_log and dt_bias, whose precision the decay depends on."""
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data = parameter.data.to(dtype)
    return model
