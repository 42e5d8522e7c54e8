"""Which text to learn from and how it is cut into rows."""

from __future__ import annotations

from gdn.core.config import Config
from gdn.core.errors import ConfigError


class DataConfig(Config):
    """Text, tokenizer and rows. The default needs no download: the Python source on this machine, as bytes."""

    source: str = "python"
    """python, python:FOLDER, a file, folder or pattern (.txt .md .py .jsonl .parquet), tokens:FILE.bin, hf:REPOSITORY[/CONFIG][@SPLIT];
    several with commas between them."""
    text_field: str = "text"
    """Field or column of .jsonl, .parquet and hf: that holds the text."""
    tokenizer: str = "bytes"
    """bytes, a tokenizer.json, or a folder that holds one."""
    length: int = 512
    """Tokens in a row."""
    batch: int = 8
    """Rows in a batch of one process."""
    seed: int = 0
    """Seed of the order of the text."""
    shuffle: bool = True
    """Read the text in another order each epoch; otherwise in the order of the source."""
    packing: bool = True
    """Start with a fresh state at each document; otherwise the state runs on through a row, as in the official recipe."""
    mix: int = 1
    """Batches whose rows are dealt out in random order among them, so that the pieces of a long document do not all meet in one batch."""
    validation_fraction: float = 0.02
    """Part of the source that is never trained on; not used with validation_source."""
    validation_source: str | None = None
    """Other text to validate on."""
    prefetch: int = 2
    """Batches made ahead in a background thread; 0 makes each when it is asked for."""

    def check(self) -> None:
        for name, least in (("length", 1), ("batch", 1), ("mix", 1), ("seed", 0), ("prefetch", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if not 0 <= self.validation_fraction < 1:
            raise ConfigError(f"validation_fraction: expected at least 0 and below 1, got {self.validation_fraction}")

    @property
    def held_out(self) -> float:
        """The fraction of the source that is on its validation side."""
        return 0.0 if self.validation_source else self.validation_fraction
