"""Documents in rows of equal length, with their boundaries.

A source is one endless sequence: the end token, a document, the end token, a document, ... At each place the input is a token and the
target is the one after it. A document thus begins with the end token as input and finishes with it as target: every token of every document
is a target exactly once, and a model can begin a text from nothing but the end token. Rows are consecutive pieces of this sequence; a
document that does not fit in a row goes on in the next as if it were another document, with a fresh state.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdn.core.packing import Packing
from gdn.data.tokenizer import Tokenizer

IGNORE = -100
"""The target of a place where nothing is to be predicted."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Batch:
    """Rows for one forward and backward pass."""

    tokens: Tensor
    """int64 `[B, T]`"""
    targets: Tensor
    """int64 `[B, T]`: the next token of the same document; -100 where there is none, only in the padding of a last batch."""
    packing: Packing | None
    """Where documents begin; None if rows are to be read as one text each."""
    num_targets: int
    """Targets that are not -100."""
    num_bytes: int
    """UTF-8 bytes of text that the targets stand for; an end token stands for none. Bits per byte is the summed loss in nats over
    ln 2 and over this."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The same batch on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            targets=self.targets.to(device, non_blocking=non_blocking),
            packing=None if self.packing is None else self.packing.to(device),
        )


def pack(tokens: NDArray[Any], targets: NDArray[Any], tokenizer: Tokenizer, *, batch: int, length: int, boundaries: bool) -> Batch:
    """Put at most `batch * length` places into rows; missing ones are padded with end tokens and targets of -100."""
    missing = batch * length - len(tokens)
    num_bytes, num_targets = int(tokenizer.token_bytes[targets].sum()), len(targets)
    packing = None
    if boundaries:
        starts = np.zeros(batch * length + 1, dtype=bool)
        starts[: len(tokens)] = tokens == tokenizer.end_id
        starts[len(tokens)] = True
        starts[::length] = True
        packing = Packing.from_cu_seqlens(torch.from_numpy(np.flatnonzero(starts)))
    tokens = np.pad(tokens, (0, missing), constant_values=tokenizer.end_id)
    targets = np.pad(targets, (0, missing), constant_values=IGNORE)
    return Batch(
        tokens=torch.from_numpy(tokens.reshape(batch, length)),
        targets=torch.from_numpy(targets.reshape(batch, length)),
        packing=packing,
        num_targets=num_targets,
        num_bytes=num_bytes,
    )
