"""Orders and splits that depend on names and contents only, so that they are the same on every machine and survive added files.

A unit of text (a file, a block of lines) has a 64-bit key made from its name. An epoch reads units by ascending `epoch_keys`; a place in
the epoch is the key of the unit that is read, and stays a place when other units come or go.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]

MASK = 2**64 - 1


def key(content: bytes) -> int:
    """64 bits that stand for the content."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def keys(names: list[str]) -> Keys:
    """The key of each name."""
    return np.array([key(name.encode("utf-8", "surrogateescape")) for name in names], dtype=np.uint64)


def mix(values: Keys) -> Keys:
    """A bijection of 64-bit numbers that scatters neighbours: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def block_keys(file: int, blocks: int) -> Keys:
    """Keys of the blocks of a file, from the file's key."""
    return mix(np.arange(blocks, dtype=np.uint64) ^ mix(np.array([file], dtype=np.uint64)))


def distinct(units: Keys) -> Keys:
    """The keys, all different: a key that came before is mixed until it is new. Files below several folders can have the same name."""
    units = units.copy()
    while len(again := np.delete(np.arange(len(units)), np.unique(units, return_index=True)[1])):
        units[again] = mix(units[again])
    return units


def epoch_keys(units: Keys, seed: int, epoch: int) -> Keys:
    """What to sort the units by in one epoch: another order for each seed and epoch."""
    start = mix(np.array([seed & MASK], dtype=np.uint64)) + np.uint64(epoch)
    return mix(units ^ mix(start))


def is_held_out(content_key: int, fraction: float) -> bool:
    """Whether a text belongs to the validation side, given its key and the fraction of texts that do."""
    return content_key < fraction * 2**64
