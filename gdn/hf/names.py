"""What the installed transformers calls things."""

from __future__ import annotations

from dataclasses import fields

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = next(field.name for field in fields(BaseModelOutputWithPast) if field.name in ("cache", "past_key_values"))
"""The argument and the result that hold a cache: `past_key_values` up to 5.23, `cache` from 5.24 on."""
