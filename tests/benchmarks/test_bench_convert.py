from __future__ import annotations

import bench_convert as bench
import pytest


def test_a_family_without_another_library_says_so() -> None:
    out, back = bench.measured([("nvlabs", way, "float32", "cpu") for way in ("out", "in")], jobs=1)
    assert not bench.failed(out) and "the same bytes" in bench.line(out)
    assert "no other library has it" in bench.line(back)


def test_what_is_not_equal_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    good = bench.measure("qwen3_next", "in", "float32", "cpu")
    assert good["equal"] and not good["changed"] and not bench.failed(good)
    monkeypatch.setattr(bench, "logits_of", lambda model, tokens: model(tokens).logits * 1.01)
    wrong = bench.measure("qwen3_next", "in", "float32", "cpu")
    assert bench.failed(wrong) and "NOT EQUAL" in bench.line(wrong)
    monkeypatch.undo()
    read = bench.tensors
    monkeypatch.setattr(bench, "tensors", lambda folder: {n: t + (folder.name == "back") for n, t in read(folder).items()})
    lost = bench.measure("qwen3_next", "in", "float32", "cpu")
    assert bench.failed(lost) and "CHANGED" in bench.line(lost)
