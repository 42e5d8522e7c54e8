"""The part of `fla.models.utils.Cache` that the layer uses. FLA's own cache may be given in its place."""

from __future__ import annotations

from typing import Any

from gdn.core.errors import ArgumentError


class Cache:
    """One dictionary of states for each layer, and the number of tokens they have seen."""

    def __init__(self) -> None:
        self.states: list[dict[str, Any]] = []
        self._seen_tokens = 0

    def __len__(self) -> int:
        return len(self.states)

    def __getitem__(self, layer_idx: int) -> dict[str, Any]:
        return self.states[layer_idx]

    def update(self, *, layer_idx: int, offset: int = 1, **states: Any) -> dict[str, Any]:
        """Store the states of a layer (`recurrent_state`, `conv_state`); None leaves one as it is. Layers arrive in order."""
        if layer_idx > len(self.states):
            raise ArgumentError(f"layer_idx: expected at most {len(self.states)}, the first layer without a state, got {layer_idx}")
        if layer_idx == len(self.states):
            self.states.append({})
        if layer_idx == 0:
            self._seen_tokens += offset
        self.states[layer_idx].update({name: state for name, state in states.items() if state is not None})
        return self.states[layer_idx]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen."""
        return self._seen_tokens if layer_idx < len(self.states) else 0

    def reset(self) -> None:
        """Forget everything."""
        self.states.clear()
        self._seen_tokens = 0
