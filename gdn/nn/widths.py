"""Widths of a mixer that follow from that of the residual stream."""

from __future__ import annotations

from gdn.core.errors import ConfigError


def head_multiple(name: str, expand: float, width: int, heads: int) -> int:
    """`expand * width` channels for `heads` heads of equal width; `name` is the field that `expand` comes from."""
    channels = round(expand * width)
    if channels != expand * width or channels < 1 or channels % heads:
        raise ConfigError(f"{name}: expected {name} * width to be a multiple of heads={heads}, got {expand} * {width}")
    return channels
