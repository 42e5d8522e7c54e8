"""transformers' command line with this package's models registered: `python -m gdn.hf serve FOLDER`, `python -m gdn.hf chat ...`."""

from __future__ import annotations

from transformers.cli.transformers import app

import gdn.hf  # noqa: F401

if __name__ == "__main__":
    app()
