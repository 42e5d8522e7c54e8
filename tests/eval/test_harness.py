"""lm-evaluation-harness on local tasks: what it is told equals a direct computation, and the command says what is wrong."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from text_models import run, tokenizer

from gdn.cli import main
from gdn.core.errors import ArgumentError
from gdn.eval.harness import GdnHarness
from gdn.models.store import load_model

QUESTIONS = [
    {"question": "one two three ", "choices": ["four", "and so", "on"], "answer": 0},
    {"question": "and so it goes", "choices": [" on", " eleven twelve", " it"], "answer": 1},
    {"question": "seven", "choices": [" eight", " nine", " ten ten"], "answer": 2},
]
FEWSHOT = [{"question": "five", "choices": [" six", " on"], "answer": 0}, {"question": "two", "choices": [" six", " three"], "answer": 1}]
PAGES = [{"page": "one two three " * n + "\n\nand ünd so"} for n in (1, 12, 5)] + [{"page": "x"}]

CHOICE = """
task: gdn_choice
dataset_path: json
dataset_kwargs: {files}
output_type: multiple_choice
test_split: test
fewshot_split: few
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
ROLLING = """
task: gdn_pages
dataset_path: json
dataset_kwargs: {files}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{page}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
WRITING = """
task: gdn_writing
dataset_path: json
dataset_kwargs: {files}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["zzz"], max_gen_toks: 6, do_sample: false, temperature: 0.0}}
num_fewshot: 0
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder with three tasks and their data."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, rows in (("questions", QUESTIONS), ("few", FEWSHOT), ("pages", PAGES)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for text, data in ((CHOICE, {"test": "questions", "few": "few"}), (ROLLING, {"test": "pages"}), (WRITING, {"test": "questions"})):
        files = {split: str(folder / f"{name}.jsonl") for split, name in data.items()}
        filled = text.format(files=json.dumps({"data_files": files, "cache_dir": str(tmp_path / "cache")}))
        (folder / f"{filled.split()[1]}.yaml").write_text(filled)
    return folder


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import datasets
    from datasets.utils import logging

    datasets.disable_progress_bars()
    logging.set_verbosity_error()
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield
    datasets.enable_progress_bars()


def likelihood(folder: Path, context: list[int], continuation: list[int]) -> float:
    lm = load_model(folder / "model")
    with torch.no_grad():
        logits = lm(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum())


def asked(*arguments: Any) -> Any:
    return SimpleNamespace(args=arguments)


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    """What the command prints: standard output if it ends well, standard error if not."""
    try:
        got = main(["eval", *map(str, arguments)])
    except SystemExit as leaving:
        got = leaving.code
    out, err = capsys.readouterr()
    assert got == status, (got, out, err)
    return err if status else out


@pytest.mark.parametrize(("pattern", "kind"), [("linear", "bytes"), ("hybrid", "bpe")])
def test_the_command_gives_the_figures_of_a_direct_computation(
    tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str], pattern: str, kind: str
) -> None:
    folder, text = run(tmp_path, pattern, kind), tokenizer(kind, tmp_path)
    names = "gdn_choice,gdn_pages,gdn_writing"
    out = evaluated(capsys, folder, f"--tasks={names}", f"--include-path={tasks}", "--batch=2")
    written = Path(out.splitlines()[-1])
    assert written.parent == folder / "evaluations"
    found = json.loads(written.read_text())
    results = found["results"]
    assert found["gdn"]["tasks"] == names.split(",") and found["n-shot"] == {"gdn_choice": 0, "gdn_pages": 0, "gdn_writing": 0}
    assert "bits_per_byte" in out and "acc_norm" in out

    end, total = [text.end_id], 0.0
    for page in PAGES:
        total += likelihood(folder, end, text.encode(page["page"]).tolist())
    num_bytes = sum(len(page["page"].encode()) for page in PAGES)
    assert results["gdn_pages"]["bits_per_byte,none"] == pytest.approx(-total / num_bytes / math.log(2), rel=1e-9)

    right = []
    for row in QUESTIONS:
        question, trailing = row["question"].rstrip(), row["question"][len(row["question"].rstrip()) :]
        before = text.encode(question).tolist()
        whole = [text.encode(question + trailing + choice).tolist() for choice in row["choices"]]
        right.append(np.argmax([likelihood(folder, end + before, each[len(before) :]) for each in whole]) == row["answer"])
    assert results["gdn_choice"]["acc,none"] == pytest.approx(np.mean(right))


def test_limits_and_examples(tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run(tmp_path)
    options = ["--tasks=gdn_*", f"--include-path={tasks}", "--limit=2", "--num-fewshot=1"]
    found = json.loads(Path(evaluated(capsys, folder, *options).splitlines()[-1]).read_text())
    assert found["n-shot"] == {"gdn_choice": 1, "gdn_pages": 1, "gdn_writing": 0}
    assert {count["effective"] for count in found["n-samples"].values()} == {2}
    assert len(list((folder / "evaluations").iterdir())) == 1


@pytest.mark.parametrize("bos", ["auto", "yes", "no"])
def test_what_stands_before_a_text(tmp_path: Path, bos: Any) -> None:
    folder = run(tmp_path)
    harness, text = GdnHarness(folder, bos=bos), tokenizer("bytes", tmp_path)
    end = [] if bos == "no" else [text.end_id]
    pairs = [("one two", " three"), ("", "one"), ("one ", "two"), ("  ", "x"), ("one", "")]
    expected = [
        likelihood(folder, end + list(b"one two"), list(b" three")),
        likelihood(folder, [text.end_id], list(b"one")),
        likelihood(folder, end + list(b"one"), list(b" two")),
        likelihood(folder, [text.end_id], list(b"  x")),
        0.0,
    ]
    assert [s for s, _ in harness.loglikelihood([asked(*pair) for pair in pairs])] == pytest.approx(expected, rel=1e-9)
    assert harness.loglikelihood_rolling([asked("one"), asked("")]) == pytest.approx([expected[1], 0.0], rel=1e-9)


def test_checkpoints_of_others_begin_as_their_tokenizer_says(tmp_path: Path) -> None:
    folder = run(tmp_path)
    assert GdnHarness(folder).opening == [256]
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "gdn", **_named(config)}))
    assert GdnHarness(folder).opening == []
    assert GdnHarness(folder).first == [256]
    assert GdnHarness(folder, bos="yes").opening == [256]
    import tokenizers

    path = folder / "model" / "tokenizer.json"
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.add_special_tokens(["<s>"])
    theirs.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    theirs.save(str(path))
    assert GdnHarness(folder).opening == GdnHarness(folder, bos="yes").opening == [257]
    assert GdnHarness(folder, bos="no").opening == []


def _named(config: dict[str, Any]) -> dict[str, Any]:
    from gdn.models.store import HF_NAMES

    values = {theirs: config.pop(ours) for ours, theirs in HF_NAMES.items()}
    return {**values, "lm": config, "origin": {"family": "qwen3_5_text", "config": {}}}


def test_a_continuation_that_a_token_swallows_is_still_scored(tmp_path: Path) -> None:
    folder, text = run(tmp_path, kind="bpe"), tokenizer("bpe", tmp_path)
    letters = next(p for p in ("one", "two", "on", "go") if len(text.encode(p)) == 1)
    context, continuation = letters[:-1], letters[-1]
    assert len(text.encode(context)) == 1
    ((found, _),) = GdnHarness(folder).loglikelihood([asked(context, continuation)])
    ids = text.encode(context).tolist(), text.encode(continuation).tolist()
    assert found == pytest.approx(likelihood(folder, [text.end_id, *ids[0]], ids[1]), rel=1e-9)


def test_with_a_limit_texts_are_cut_as_for_models_that_have_one(tmp_path: Path) -> None:
    folder = run(tmp_path)
    harness = GdnHarness(folder, max_length=8)
    page = b"one two three four five"
    windows = [([256, *page[:7]], page[:8]), (page[7:15], page[8:16]), (page[14:22], page[16:23])]
    expected = sum(likelihood(folder, list(read[: len(read) + 1 - len(wanted)]), list(wanted)) for read, wanted in windows)
    assert harness.loglikelihood_rolling([asked(page.decode())])[0] == pytest.approx(expected, rel=1e-9)
    ((found, _),) = harness.loglikelihood([asked("one two three", " four")])
    assert found == pytest.approx(likelihood(folder, list(b"hree"), list(b" four")), rel=1e-9)
    short, limited = (GdnHarness(folder, max_length=n) for n in (0, 8))
    wanted = {"until": [], "max_gen_toks": 3}
    assert limited.generate_until([asked("one two three", wanted)]) == GdnHarness(folder, bos="no").generate_until([asked("three", wanted)])
    assert short.generate_until([asked("three", wanted)]) != [""]
    with pytest.raises(ArgumentError, match="max_length: expected at least 9, the tokens of a continuation, got 8"):
        harness.loglikelihood([asked("one", " two thre")])
    with pytest.raises(ArgumentError, match="max_length: expected more than the 8 tokens to generate, got 8"):
        harness.generate_until([asked("one", {"until": [], "max_gen_toks": 8})])


def test_what_a_task_says_about_generation(tmp_path: Path) -> None:
    harness = GdnHarness(run(tmp_path))
    requests = [
        asked("one", {"until": ["\n"], "max_gen_toks": n, **more}) for n in (2, 5) for more in ({}, {"do_sample": True, "top_k": 3})
    ]
    texts = harness.generate_until([*requests, *requests[::-1]])
    assert texts[0] == texts[7] and texts[2] == texts[5] and texts[2].startswith(texts[0])
    with pytest.raises(ArgumentError, match=r"generation_kwargs: expected temperature, top_p, top_k, .* got num_beams"):
        harness.generate_until([asked("one", {"until": [], "num_beams": 2})])


def test_the_harness_knows_the_class_by_name(tmp_path: Path) -> None:
    from lm_eval.api.registry import get_model

    made = get_model("gdn").create_from_arg_string(
        f"run={run(tmp_path)},bos=no", {"batch_size": 3, "device": "cpu", "max_batch_size": None}
    )
    assert isinstance(made, GdnHarness) and made.batch_size == 3 and made.opening == []


def test_mistakes_are_named(tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run(tmp_path)
    own = f"--include-path={tasks}"
    manager = sys.modules["lm_eval.tasks.manager"]
    monkeypatch.setattr(
        manager, "__file__", str(Path(str(manager.__file__)).with_name("lambada") / "x")
    )  # of thousands of tasks only these
    for expected, status, arguments in (
        ('knows no task "lambada_opena". Did you mean "lambada_openai"', 1, [folder, "--tasks=lambada_opena"]),
        ("no-such: no such folder", 1, ["no-such", "--tasks=gdn_pages", own]),
        ("include_path: expected a folder with tasks", 1, [folder, "--tasks=gdn_pages", "--include-path=no-such"]),
        ("limit: expected 0 (all) or more documents, got -1", 1, [folder, "--tasks=gdn_pages", own, "--limit=-1"]),
        ("num_fewshot: expected 0 or more, got -2", 1, [folder, "--tasks=gdn_pages", own, "--num-fewshot=-2"]),
        ("tasks: expected at least one name", 1, [folder, "--tasks=,", own]),
        ("batch_size: expected at least 1, got 0", 1, [folder, "--tasks=gdn_pages", own, "--batch=0"]),
        ("--max-length", 2, [folder, "--tasks=gdn_pages", own, "--max-lenght=3"]),
    ):
        assert expected in evaluated(capsys, *arguments, status=status)
    (tasks / "pages.jsonl").unlink()
    assert "tasks: gdn_pages: cannot be loaded" in evaluated(capsys, folder, "--tasks=gdn_pages", own, status=1)
    assert "--num-fewshot" in evaluated(capsys, "--tasks", "--help")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert 'needs the package "lm_eval": pip install "gated-delta-networks[eval]"' in evaluated(capsys, folder, "--tasks=x", status=1)
