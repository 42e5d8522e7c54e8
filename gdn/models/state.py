"""What a model remembers, as a thing one can hold: measure, copy, fork, save, load, take back, store in fewer bits."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdn.core.errors import ArgumentError, CheckpointError
from gdn.mixers.base import MixerState, Past
from gdn.models.precision import PRECISIONS, Precision, precision_of, stored

if TYPE_CHECKING:
    from gdn.models.lm import LM

FORMAT = "gdn.state.1"
SAMPLES = 1024
"""Values of each weight that a fingerprint looks at."""


@dataclass(eq=False)
class LMState:
    """The state of every layer for a batch of sequences. Its size does not grow with the text unless a layer attends to all of it.

    Example:
        >>> from gdn.mixers import GatedDeltaNet
        >>> from gdn.models import LM
        >>> model = LM(LM.Config(vocab=256, width=64, layers=2, mlp=128, pattern=(GatedDeltaNet.Config(heads=2, head_dim=16),)))
        >>> document, question = torch.arange(100).reshape(1, 100), torch.arange(5).reshape(1, 5)
        >>> state = model.init_state(1)
        >>> with torch.no_grad():
        ...     state = model(document, state=state).state
        ...     branch = state.fork().record()
        ...     branch = model(question, state=branch).state
        >>> branch.length, branch.rollback(3).length, state.length
        (105, 102, 100)
    """

    layers: list[MixerState]
    length: int = 0
    """Tokens read so far."""
    model: LM | None = None
    """The model whose state this is."""
    pending: Tensor | None = None
    """Tokens `[B, n]` that belong to the text and have not been read, if any: those to read first when going on."""

    @property
    def nbytes(self) -> int:
        """Bytes of the state itself; `Past` has its own."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return next(iter(self.layers[0].tensors.values())).shape[0]

    def take_pending(self, tokens: Tensor) -> None:
        """Take note that tokens `[B, T]` are read now, which must begin with those that are pending: without them the text has a hole."""
        waiting = self.pending
        if waiting is None:
            return
        first = tokens[:, : waiting.shape[1]]
        if first.shape[1:] != waiting.shape[1:] or not torch.equal(first, waiting.expand(len(tokens), -1).to(tokens)):
            raise ArgumentError(
                f"state: {waiting.shape[1]} token(s) of its text have not been read (state.pending), and those given begin with others: "
                "give torch.cat([state.pending, tokens], dim=1)"
            )
        self.pending = None

    def clone(self) -> LMState:
        """A snapshot that later tokens do not touch."""
        return self._with([layer.clone() for layer in self.layers])

    fork = clone

    def copy_(self, other: LMState) -> None:
        """Return to a snapshot, in place. The tokens that can be taken back are then those that the snapshot kept."""
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.copy_(theirs)
            mine.past = None if theirs.past is None else theirs.past.map(Tensor.clone)
        self.length, self.pending = other.length, other.pending

    def select(self, sequences: Tensor) -> LMState:
        """The state of some sequences `[n]` of the batch, in that order."""
        selected = self._with([layer.select(sequences) for layer in self.layers])
        if self.pending is not None:
            selected.pending = self.pending.index_select(0, sequences.to(self.pending.device))
        return selected

    def record(self, window: int = 64) -> LMState:
        """From now on keep what takes the last `window` tokens back. Memory: a copy of the state and the inputs of those tokens' layers."""
        if window < 1:
            raise ArgumentError(f"window: expected at least 1 token, got {window}")
        for layer in self.layers:
            layer.past = None
            layer.past = Past(layer.mark(), window)
        return self

    def forget(self) -> LMState:
        """Stop keeping the past."""
        for layer in self.layers:
            layer.past = None
        return self

    def rollback(self, tokens: int) -> LMState:
        """Take the last tokens back, in place, exactly: as if they had never been read. Needs `record` before them. What was still to be
        read after them is no part of the text any more."""
        for mixer, layer in zip(self._model().mixers(), self.layers, strict=True):
            mixer.rollback(layer, tokens)
        self.length -= tokens
        self.pending = None if tokens else self.pending
        return self

    def to(self, target: torch.device | str | Precision) -> LMState:
        """On another device, or with the recurrent memories stored as "fp32", "bf16", "fp16", "int8" or "fp8" between tokens.

        The arithmetic stays float32; how far a precision drifts is measured by `gdn.eval.drift`.
        """
        for precision in PRECISIONS:
            if target == precision:
                return self._with([stored(layer, precision) for layer in self.layers])
        try:
            device = torch.device(target)
        except (RuntimeError, TypeError):
            raise ArgumentError(f"target: expected a device, fp32, bf16, fp16, int8 or fp8, got {target!r}") from None
        moved = self._with([layer._map(lambda t: t.to(device)) for layer in self.layers])
        moved.pending = None if self.pending is None else self.pending.to(device)
        return moved

    def save(self, path: str | Path) -> None:
        """Write the state with the fingerprint of its model: one safetensors file, whole or not at all."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        tensors = {f"{i}.{name}": t.detach().cpu().contiguous() for i, layer in enumerate(self.layers) for name, t in layer.tensors.items()}
        if self.pending is not None:
            tensors["pending"] = self.pending.detach().cpu().contiguous()
        precisions = [precision_of(layer) for layer in self.layers]
        metadata = {
            "format": FORMAT,
            "model": fingerprint(self._model()),
            "length": str(self.length),
            "precisions": json.dumps(precisions),
            "counts": json.dumps([_counts(layer) for layer in self.layers]),
        }
        partial = path.with_name(f".{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, metadata=metadata)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise CheckpointError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path, model: LM, *, device: torch.device | str | None = None) -> LMState:
        """Read a state written by `save`; one of another model is refused.

        Args:
            path: the file.
            model: the model that goes on from here: the same configuration, weights and dtype. Of a prompt it has still to read `pending`,
                which `gdn.models.sampling.resume` does.
            device: where to; that of the model by default.
        """
        tensors, metadata = read_file(Path(path), FORMAT)
        expected = fingerprint(model)
        if metadata["model"] != expected:
            raise CheckpointError(
                f"{path}: this state belongs to another model: fingerprint {metadata['model']}, expected {expected} "
                "(configuration, dtype and weights must be those of the model that wrote it)"
            )
        device = device or model.head_weight.device
        counts = json.loads(metadata["counts"])
        fixed = any("begun" in count for count in counts)  # a state that was made with room, which its tensors bring with them
        state = model.init_state(1, room=1 if fixed else None)
        state.length, state.pending = int(metadata["length"]), tensors.pop("pending", None)
        if state.pending is not None:
            state.pending = state.pending.to(device)
        for i, precision in enumerate(json.loads(metadata["precisions"])):
            layer = stored(state.layers[i], precision)
            layer.tensors = {name: tensors[f"{i}.{name}"].to(device) for name in layer.tensors}
            for name, count in counts[i].items():
                setattr(layer, name, count)
            state.layers[i] = layer
        return state

    def __deepcopy__(self, memo: dict[int, Any]) -> LMState:
        return self.clone()

    def _with(self, layers: list[MixerState]) -> LMState:
        return LMState(layers, self.length, self.model, self.pending)

    def _model(self) -> LM:
        if self.model is None:
            raise ArgumentError("state: belongs to no model; make it with model.init_state")
        return self.model


def _counts(layer: MixerState) -> dict[str, int]:
    """What a state knows on the host beside its tensors."""
    values = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return {name: value for name, value in values.items() if isinstance(value, int)}


@torch.no_grad()
def fingerprint(model: LM, *, start: bool = True) -> str:
    """What tells one model from another: configuration, dtypes, and up to 1024 evenly spaced values of every weight, hashed.

    A step of training moves nearly every weight, so it changes the fingerprint; reading every weight of a large model would take seconds.
    `start` says whether a first memory (`gdn.models.start`) is part of the model.
    """
    digest = hashlib.sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith("start.") and not start:
            continue
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, flat.numel() // SAMPLES)].to("cpu", torch.float64)
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def read_file(path: Path, expected: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file of ours."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != expected:
                raise CheckpointError(f"{path}: expected a file of the format {expected}, found the format {metadata.get('format')!r}")
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a state file: {error}") from error
