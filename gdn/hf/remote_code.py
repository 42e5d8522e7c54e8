"""A folder that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` opens without `import gdn.hf`."""

from __future__ import annotations

import json
from pathlib import Path

from gdn.core.errors import CheckpointError

MODULE = "modeling_gdn"

CODE = '''"""The model is in the package gated-delta-networks."""

try:
    from gdn.hf import GdnConfig, GdnForCausalLM, GdnModel
except ImportError as error:
    raise ImportError('this model needs: pip install "gated-delta-networks[hf]"') from error

__all__ = ["GdnConfig", "GdnForCausalLM", "GdnModel"]
'''


def add_remote_code(folder: str | Path) -> None:
    """Add the code file and its mention in `config.json` to a folder written by `save_pretrained`."""
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file():
        raise CheckpointError(f"{folder} holds no config.json; expected a folder written by save_pretrained")
    values = json.loads(config.read_text())
    if values.get("model_type") != "gdn":
        raise CheckpointError(f'{config}: expected the model_type "gdn", got {values.get("model_type")!r}')
    classes = {"AutoConfig": "GdnConfig", "AutoModel": "GdnModel", "AutoModelForCausalLM": "GdnForCausalLM"}
    values["auto_map"] = {auto: f"{MODULE}.{name}" for auto, name in classes.items()}
    (folder / f"{MODULE}.py").write_text(CODE)
    config.write_text(json.dumps(values, indent=2) + "\n")
