"""A small corpus in every form that a source can have."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from gdn.data import ByteTokenizer, DataConfig, prepare

TEXTS = [f"# text {i}\n" + "".join(f"line {j} of {i}: é€😀 {'x' * (j * i % 40)}\n" for j in range(i % 13)) for i in range(60)]

LONG = 4
"""How often the long text repeats the others."""

Corpus = Callable[[str], DataConfig]

KINDS = ["python", "text", "long text", "jsonl", "parquet", "tokens", "hf", "joined"]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def write_parquet(path: Path, texts: list[str | None], field: str = "text", rows: int = 8) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({field: pyarrow.array(texts, pyarrow.string())}), path, row_group_size=rows)
    return path


def write_corpus(kind: str, folder: Path) -> str:
    if kind in ("python", "text"):
        suffix = "py" if kind == "python" else "txt"
        for i, text in enumerate(TEXTS):
            path = folder / "many" / f"p{i % 7}" / f"f{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return f"python:{folder / 'many'}" if kind == "python" else str(folder / "many" / "**" / "*.txt")
    if kind == "long text":
        (folder / "long.md").write_text("".join(TEXTS) * LONG)
        return str(folder / "long.md")
    if kind == "jsonl":
        return str(write_jsonl(folder / "rows.jsonl", TEXTS))
    if kind == "parquet":
        return str(write_parquet(folder / "rows.parquet", list(TEXTS)))
    if kind == "tokens":
        return f"tokens:{prepare(TEXTS, ByteTokenizer(), folder / 'tokens.bin')}"
    if kind == "hf":
        for i in range(3):
            write_jsonl(folder / "hub" / f"train-{i}.jsonl", TEXTS[i::3])
        return f"hf:{folder / 'hub'}"
    return ",".join(write_corpus(part, folder) for part in ("python", "jsonl", "tokens"))
