"""What the installed transformers calls things."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

from gdn.core.errors import ArgumentError

CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))
"""The argument and the result that hold a cache: `past_key_values` up to 5.23, `cache` from 5.24 on."""


def one_of(first: Any, second: Any) -> Any:
    """The cache, by whichever of its names it was given."""
    if first is not None and second is not None:
        raise ArgumentError("cache: given twice; past_key_values and cache_params are older names of it")
    return second if first is None else first
