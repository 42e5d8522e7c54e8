"""`transformers serve` answers with a model of ours."""

from __future__ import annotations

import importlib.util
import json
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fresh
import pytest
import torch
from small import causal
from transformers import PreTrainedTokenizerFast

from gdn.hf import GdnForCausalLM, add_remote_code

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn", "openai")), reason="needs the extra `serve`"
)
NEW = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that knows its own code, with a tokenizer of words w0 to w16 and a chat template."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(17)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w1", pad_token="w2")
    tokenizer.chat_template = "{% for m in messages %}w3 {{ m.content }} {% endfor %}w4"
    folder = tmp_path_factory.mktemp("served")
    model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    add_remote_code(folder)
    return folder


def model() -> GdnForCausalLM:
    return causal("hybrid", eos_token_id=1, pad_token_id=2)


def expected(prompt: list[int]) -> str:
    with torch.no_grad():
        text = model().generate(torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False)
    return " ".join(f"w{t}" for t in text[0, len(prompt) :].tolist() if t not in (1, 2))


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[str]:
    """The address of a module's server that is stopped at the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = fresh.start(log, fresh.module, *command, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu", strict=False)
    try:
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert server.exitcode is None, log.read_text()[-2000:]
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.join(20)
        server.kill()


def ask(address: str, **body: Any) -> dict[str, Any]:
    data = json.dumps({"temperature": 0.0, "max_tokens": NEW, **body}).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        return json.loads(urllib.request.urlopen(request, timeout=60).read())
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error


def test_transformers_own_command_serves_a_folder_with_its_code(folder: Path, tmp_path: Path) -> None:
    command = ["transformers.cli.transformers", "serve", "--trust-remote-code"]
    with serving(command, tmp_path / "log") as address:
        answer = ask(f"{address}/v1/completions", model=str(folder), prompt="w5 w6 w7")
    assert answer["choices"][0]["text"].split() == expected([5, 6, 7]).split()


def test_our_command_serves_without_trust(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".py":
            (bare / file.name).write_bytes(file.read_bytes())
    config = json.loads((bare / "config.json").read_text())
    del config["auto_map"]
    (bare / "config.json").write_text(json.dumps(config))
    with serving(["gdn.hf", "serve", str(bare)], tmp_path / "log") as address:
        answer = ask(f"{address}/v1/chat/completions", model=str(bare), messages=[{"role": "user", "content": "w8 w9"}])
    assert re.findall(r"w\d+", answer["choices"][0]["message"]["content"]) == expected([3, 8, 9, 4]).split()
