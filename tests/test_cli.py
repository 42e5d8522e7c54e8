"""The command `gdn` as a user meets it: what it prints, its exit status, and what it says about mistakes."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import torch
from rich.console import Console

from gdn import recipes
from gdn.cli import COMMANDS, Family, main
from gdn.core.errors import ConfigError
from gdn.data import ByteTokenizer, DataConfig, load_tokenizer
from gdn.data.find import open_source
from gdn.data.source import View
from gdn.eval.report import _counted
from gdn.mixers.gated_deltanet import GatedDeltaNet
from gdn.models.lm import LM
from gdn.models.store import save_model
from gdn.train import Trainer

TINY = LM.Config(vocab=257, width=16, layers=1, mlp=16, pattern=(GatedDeltaNet.Config(heads=1, head_dim=8),))
SMALL = ["--model.width=16", "--model.layers=1", "--model.mlp=16", "--model.pattern.0.heads=1", "--model.pattern.0.head-dim=8"]
QUICK = ["--steps=2", "--data.length=16", "--data.batch=1", "--data.mix=1", "--validation-tokens=16", "--sample-tokens=2"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("one two three five eight\n" * 40)
    return file


@pytest.fixture
def run(tmp_path: Path, text: Path) -> Path:
    """A training directory as a finished run leaves it, without the training."""
    folder = tmp_path / "run"
    torch.manual_seed(0)
    model = LM(TINY)
    with torch.no_grad():
        model.embedding.weight.mul_(30)  # far from uniform
    save_model(model, folder / "model")
    ByteTokenizer().save(folder / "model")
    data = DataConfig(validation_source=str(text), length=64, batch=2)
    (folder / "config.json").write_text(json.dumps(Trainer.Config(model=TINY, data=data).to_dict()))
    return folder


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def says(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """Standard output of a command that ends well, standard error of one that does not."""
    try:
        got = main([str(a) for a in arguments])
    except SystemExit as leaving:  # the parser's
        got = leaving.code
    out, err = capsys.readouterr()
    assert got == status, (got, out, err)
    assert "Traceback" not in err
    return err if status else out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ((), ("--help",)):
        usage = says(capsys, *arguments)
        for command in COMMANDS:
            assert re.search(rf"^  {command} +[A-Z].*[.a-z]$", usage, re.M), command
    for command in ("train", "generate", "eval", "info", "doctor"):
        assert "--help" in says(capsys, command, "--help")
    assert re.fullmatch(r"gdn \d+\.\d+\.\d+\n", says(capsys, "--version"))


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        ("trian", 2, 'Did you mean "train"'),
        ("train dmo", 1, 'Did you mean "demo"'),
        ("train demo --stepss 3", 2, "--steps INT"),
        ("train demo --model.pattern.0.head_dims 3", 2, "--model.pattern.0.head-dim INT"),
        ("train demo --precision fp16", 2, "fp32"),
        ("train demo --optim.lr -1", 2, "lr: expected above 0, got -1.0"),
        ("train demo --size gdn_1.4b", 1, 'Did you mean "gdn_1.3b"'),
        ("train demo --size", 1, "--size: expected a value"),
        ("train demo --device tpu", 1, 'device: expected "auto", "cpu", "cuda"'),
        ("train demo --data.source no-such-*.txt", 1, "no-such-*.txt: no file matches"),
        ("info gdn_1.4b", 1, 'Did you mean "gdn_1.3b"'),
        ("info gdn_data", 1, '"gdn_data" is neither a folder with a model nor a known size or recipe.'),
        ("info no/such/folder", 1, '"no/such/folder" is neither a folder with a model nor a known size or recipe. Known: corpus, '),
        ("info gdn_d4 --length 0", 1, "length: expected at least 1, got 0"),
        ("generate no-such-folder", 1, "no-such-folder: no such folder"),
        ("generate no-such-folder --tempreature 1", 2, "--temperature FLOAT"),
        ("eval no-such-folder", 1, "no-such-folder: no such folder"),
        ("doctor --device tpu", 1, 'device: expected "auto", "cpu", "cuda"'),
        ("bench opss", 1, 'Did you mean "ops"'),
        ("check no-such-folder --device tpu", 1, 'device: expected "auto", "cpu", "cuda"'),
    ],
)
def test_mistakes_are_named(capsys: pytest.CaptureFixture[str], arguments: str, status: int, expected: str) -> None:
    assert expected in says(capsys, *arguments.split(), status=status)


def test_info_tells_a_size_without_building_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LM, "__init__", None)
    out = says(capsys, "info", "gdn_1.3b")
    for part in ("1,309,295,632", "heads = 9", "head_dim = 200", "FLOPs per token", "decoding state", "AdamW"):
        assert part in out, part


def test_info_tells_a_run_and_a_recipe(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert f"{TINY.num_parameters():,}" in says(capsys, "info", run)
    assert "width = 128" in says(capsys, "info", "demo")
    (run / "model" / "config.json").write_text("{")
    assert "config.json cannot be read" in says(capsys, "info", run, status=1)


def test_generate_depends_on_the_seed_alone(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    texts = [says(capsys, "generate", run, "--prompt=one", "--tokens=30", f"--seed={seed}") for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0].startswith("one")
    greedy = [says(capsys, "generate", run, "--prompt=one", "--tokens=30", "--temperature=0", f"--seed={seed}") for seed in (1, 2)]
    assert greedy[0] == greedy[1]


def test_generate_reads_a_prompt_from_standard_input(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("five"))
    piped = says(capsys, "generate", run, "--prompt=-", "--tokens=5")
    assert piped == says(capsys, "generate", run, "--prompt=five", "--tokens=5")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--tokens=-1", "tokens: expected 0 or more, got -1"),
        ("--temperature=-1", "temperature: expected 0 or more, got -1.0"),
        ("--temperature=nan", "temperature: expected a number, got nan"),
        ("--top-p=2", "top_p: expected above 0 and at most 1, got 2.0"),
        ("--device=tpu", 'device: expected "auto", "cpu", "cuda"'),
    ],
)
def test_generate_names_wrong_values(capsys: pytest.CaptureFixture[str], run: Path, option: str, expected: str) -> None:
    assert expected in says(capsys, "generate", run, option, status=1)


def test_generate_writes_nothing_before_it_says_what_is_wrong(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert main(["generate", str(run), "--prompt=one", "--load-state=nowhere"]) == 1
    assert capsys.readouterr() == ("", "gdn generate: nowhere: no such file\n")
    file = run / "config.json" / "state"
    assert main(["generate", str(run), "--prompt=one", f"--save-state={file}"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and f"save_state: expected a file that can be written, got {file} (" in err


def test_eval_tells_bits_per_byte_on_one_line_and_positions_beyond_the_training_length(
    capsys: pytest.CaptureFixture[str], run: Path
) -> None:
    out = says(capsys, "eval", run)
    assert re.search(r"^[\d,]+ tokens \([\d,]+ bytes\): loss .* bits per byte \d+\.\d+$", out, re.M)
    assert "trained on 64" in out
    assert re.search(r"64 to 127 .* beyond the training length", out)
    assert re.search(r"128 to 255 .* beyond the training length", out)


def test_eval_shows_how_far_it_is_on_standard_error_if_that_is_a_terminal(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["eval", str(run)]) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    monkeypatch.setenv("TERM", "xterm")
    stderr = Terminal()
    monkeypatch.setattr("sys.stderr", stderr)
    assert main(["eval", str(run)]) == 0
    assert capsys.readouterr().out == quiet.out
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stderr.getvalue())  # without colours and moves of the cursor
    for shown in ("reading text", "loss 0:00:0", "loss by position 0:00:0"):
        assert shown in said, shown


def test_eval_of_the_model_folder_in_a_run_knows_the_run(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    assert says(capsys, "eval", run / "model") == says(capsys, "eval", run)


def test_eval_of_a_model_alone_claims_no_training_length(capsys: pytest.CaptureFixture[str], run: Path, text: Path) -> None:
    (run / "config.json").unlink()
    out = says(capsys, "eval", run / "model", "--source", text, "--length=256")
    assert "bits per byte" in out
    assert "train" not in out


def test_train_reaches_nested_fields_and_leaves_a_model_that_generates(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    source = [f"--data.source={text}", f"--data.validation-source={text}", f"--directory={tmp_path / 'new'}"]
    out = says(capsys, "train", "corpus", *SMALL, *QUICK, *source)
    assert re.search(r"^validation bits per byte \d\.\d\d$", out, re.M)
    saved = json.loads((tmp_path / "new" / "config.json").read_text())
    assert saved["model"]["pattern"][0]["head_dim"] == 8
    assert says(capsys, "generate", tmp_path / "new", "--prompt=one", "--tokens=3").startswith("one")


def test_text_without_a_validation_side_is_an_error_with_the_options_that_mend_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path
) -> None:
    source = [f"--data.source={text}", "--data.validation-fraction=0", f"--directory={tmp_path / 'new'}"]
    said = says(capsys, "train", "corpus", *SMALL, *QUICK, *source, status=1)
    helped = says(capsys, "train", "--help")
    for field in ("data.validation_fraction", "data.validation_source", "validation_tokens"):
        option = f"--{field.replace('_', '-')}"
        assert field.removeprefix("data.") in said
        assert option in said and option in helped
    assert "--source" in said and "--source" in says(capsys, "eval", "--help")


def test_the_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    out = says(capsys, "train", "--list")
    for name in ("demo", "corpus", "gdn_0.4b", "gdn_1.3b"):
        assert re.search(rf"^{re.escape(name)} +\w.*\.$", out, re.M), name


def test_a_full_disk_is_an_error_of_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        file = tmp_path / "x.bin"
        assert says(capsys, "tokens", file, "--source", text, status=1) == f"gdn tokens: {file}: File too large\n"
        said = says(capsys, "tokenizer", tmp_path / "bpe", "--source", text, "--vocab", 257, "--validation-fraction", 0, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.fullmatch(r"gdn tokenizer: .*tokenizer.json: cannot be written: File too large.*\n", said)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["bpe", "text.txt"]


RECIPE = """
from __future__ import annotations

from gdn import recipes
from gdn.core.config import Config

with open(__file__ + ".times", "a") as times:
    times.write("once ")

class Plan(Config):
    steps: int = 7

def experiment():
    \"""Mine.\"""
    return recipes.load("demo").with_(steps=Plan().steps)
"""


def test_a_recipe_of_ones_own_may_define_classes_and_is_executed_once(tmp_path: Path) -> None:
    file = tmp_path / "my_runs.py"
    file.write_text(RECIPE)
    assert recipes.load(f"{file}:experiment").steps == 7
    assert recipes.summary(f"{file}:experiment") == "Mine."
    assert Path(f"{file}.times").read_text() == "once "
    (tmp_path / "other").mkdir()
    other = tmp_path / "other" / "my_runs.py"
    other.write_text(RECIPE.replace("7", "8"))
    assert recipes.load(f"{other}:experiment").steps == 8


@pytest.mark.parametrize(
    ("function", "message"),
    [("three", "expected a function that returns a Trainer.Config, it returned 3"), ("tree", 'defines no "tree". Did you mean "three"?')],
)
def test_what_is_no_recipe_is_named(function: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "no_run.py"
    file.write_text("from gdn.train import Trainer\n\ndef three():\n    return 3\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        recipes.load(f"{file}:{function}")
    with pytest.raises(ConfigError, match=r'defines no "zzz"\. Known: three\.$'):
        recipes.load(f"{file}:zzz")


def test_a_tokenizer_is_learned_used_and_tokenises_a_corpus_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text, bpe, corpus = tmp_path / "text", tmp_path / "bpe", tmp_path / "corpus.bin"
    text.mkdir()
    for i in range(30):
        (text / f"{i}.txt").write_text(f"document {i} of the same words and the same words again\n" * 3)
    arguments = ("--source", text, "--vocab", 270, "--validation-fraction", 0.3)
    printed = says(capsys, "tokenizer", bpe, *arguments)
    assert printed == f"{bpe / 'tokenizer.json'}: 270 tokens\ngdn train --data.tokenizer {bpe} --model.vocab 270 --data.source {text}\n"
    assert "exists; expected a new one" in says(capsys, "tokenizer", bpe, *arguments, status=1)
    assert "megabytes: expected above 0, got 0" in says(capsys, "tokenizer", tmp_path / "x", "--megabytes", 0, status=1)
    printed = says(capsys, "tokens", corpus, "--source", text, "--tokenizer", bpe)
    learned = load_tokenizer(bpe)
    expected = sum(len(learned.encode(path.read_text())) + 1 for path in text.iterdir())
    assert printed.startswith(f"{corpus}: {expected:,} tokens of 30 documents, ")
    assert len(list(open_source(f"tokens:{corpus}", tokenizer=learned).documents())) == 30
    assert "source: expected text, got tokens" in says(capsys, "tokenizer", tmp_path / "x", "--source", f"tokens:{corpus}", status=1)


def test_a_tokenizer_learns_nothing_from_text_that_is_held_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"{chr(0x3041 + i) * 6}\n")
    printed = says(capsys, "tokenizer", tmp_path / "bpe", "--source", tmp_path / "*.txt", "--vocab", 2000, "--validation-fraction", 0.5)
    assert printed.endswith(f"--data.source '{tmp_path}/*.txt'\n")  # as a shell takes it
    source = open_source(str(tmp_path / "*.txt"), tokenizer=ByteTokenizer(), fraction=0.5)
    for side, learned in (("train", True), ("validation", False)):
        documents = list(source.documents(View(side=side)))
        assert documents
        lengths = [len(load_tokenizer(tmp_path / "bpe").encode(text)) for text in documents]
        assert all((length < 6) == learned for length in lengths), (side, lengths)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_configuration_is_named_by_every_command(capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str) -> None:
    save_model(LM(TINY), tmp_path)
    (tmp_path / "config.json").write_text(content)
    for arguments in (("generate",), ("check",), ("convert", tmp_path / "out", "--to", "gdn")):
        command, *rest = arguments
        assert f"{tmp_path / 'config.json'} cannot be read: " in says(capsys, command, tmp_path, *rest, status=1)


def test_convert_needs_transformers_only_for_arguments_that_can_be(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    new = tmp_path / "new"
    assert "invalid choice 'qwen3_nxt'" in says(capsys, "convert", run, new, "--to", "qwen3_nxt", status=2)
    assert "nowhere: no such folder" in says(capsys, "convert", "nowhere", new, "--to", "gdn", status=1)
    assert "already holds a checkpoint" in says(capsys, "convert", run, run / "model", "--to", "gdn", status=1)
    assert 'gdn convert needs the package "transformers"' in says(capsys, "convert", run, new, "--to", "gdn", status=1)


def test_convert_names_every_family() -> None:
    pytest.importorskip("transformers")
    from gdn.hf.families import FAMILIES

    assert set(get_args(Family)) == set(FAMILIES)


def test_damaged_weights_are_named_in_a_conversion(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_model(LM(TINY), tmp_path)
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    printed = says(capsys, "convert", tmp_path, tmp_path / "out", "--to", "gdn", status=1)
    assert f"{tmp_path / 'model.safetensors'} cannot be read: " in printed


def test_a_file_that_cannot_be_opened_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_model(LM(TINY), tmp_path)
    ByteTokenizer().save(tmp_path)
    absent = tmp_path / "absent.txt"
    assert says(capsys, "drift", tmp_path, "--source", absent, status=1) == f"gdn drift: {absent}: No such file or directory\n"


def test_text_that_is_none_is_named(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    file = tmp_path / "bytes.txt"
    file.write_bytes(b"ab\xff")
    assert "source: expected UTF-8, got 0xff as byte 2" in says(capsys, "drift", run, "--source", file, status=1)
    file.write_bytes(b"")
    assert f"source: expected text, got none in {file}" in says(capsys, "drift", run, "--source", file, status=1)
    assert "prompt: expected UTF-8, which character 2 is not" in says(capsys, "generate", run, "--prompt=ab\udcff", status=1)


def test_a_run_that_is_none_is_named(capsys: pytest.CaptureFixture[str], run: Path, text: Path) -> None:
    assert f"{text}: expected a folder, got a file" in says(capsys, "generate", text, status=1)
    for damaged in (b"{", b'"\xff"', b"3"):
        (run / "config.json").write_bytes(damaged)
        assert f"{run / 'config.json'} is damaged: " in says(capsys, "eval", run, status=1)


def test_a_model_that_cannot_fit_is_refused_before_it_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("gdn.core.device.total_bytes", lambda device: 2**20)
    monkeypatch.setattr(LM, "__init__", None)
    error = says(capsys, "train", "demo", "--directory", tmp_path / "run", status=1)
    assert re.search(r"model: [\d,]+ parameters take \d+\.\d GiB and more, and cpu has 0\.0 GiB: choose a smaller size", error)


def test_a_state_does_not_replace_a_device(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    for place in (pipe, Path("/dev/null"), tmp_path):
        error = says(capsys, "generate", run, "--prompt=a", "--tokens=1", "--save-state", place, status=1)
        assert f"save_state: expected a file, got {place}, which is something else" in error
    assert pipe.is_fifo() and Path("/dev/null").is_char_device()


def test_an_interruption_is_told(capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("gdn.eval.report.evaluate", interrupted)
    assert says(capsys, "eval", run, status=130) == "\ngdn eval: interrupted\n"


@pytest.mark.parametrize("arguments", ["--help", "--version", "train --list"])
def test_a_reader_that_has_gone_is_no_error(arguments: str) -> None:
    """With the buffers that Python has by itself, which it empties as it ends."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    begin, end = os.pipe()
    os.close(begin)
    command = [sys.executable, "-m", "gdn", *arguments.split()]
    ended = subprocess.run(command, stdout=end, stderr=subprocess.PIPE, env=environment, text=True, timeout=120)
    os.close(end)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_help_on_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    for arguments in (["--help"], ["--version"]):
        assert main(arguments) == 1
        assert capsys.readouterr().err == "gdn: cannot write: No space left on device\n"


def test_evaluation_says_now_and_then_how_far_it_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 9))
    monkeypatch.setattr("gdn.eval.report.time", SimpleNamespace(monotonic=lambda: next(now)))
    batches: list[Any] = list(range(9))
    assert list(_counted(batches, "loss", Console(stderr=True))) == batches
    assert capsys.readouterr().err.splitlines() == [f"loss: {done} of 9 batches" for done in (2, 5, 8)]


def test_evaluation_says_how_far_it_is(capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdn.eval.report.EVERY", -1.0)
    assert main(["eval", str(run), "--max-tokens", "1000"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"loss: 0 of (\d+) batches", lines[0]) and any(line.startswith("loss by position: 1 of ") for line in lines)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("convert", "[-h] SRC DST --to"),
        ("generate", "] RUN"),
        ("tokens", "[-h] OUT"),
        ("info", "[-h] NAME"),
        ("experiment", "] [NAME ...]"),
    ],
)
def test_usage_tells_arguments_apart(capsys: pytest.CaptureFixture[str], command: str, expected: str) -> None:
    assert expected in says(capsys, command, "--help").splitlines()[0]


def test_bench_says_what_it_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"^  ops +[A-Z].*\.$", says(capsys, "bench", "--help"), re.M)
