from __future__ import annotations

import json
import re

import pictures
import pytest
import recorded
import report

MACHINE = {
    "device": "NVIDIA H200",
    "torch": "2.11.0",
    "flash-linear-attention": "0.6.0",
    "date": "2026-11-25T05:00Z",
    "command": "python b.py",
}


def row(impl="ours", bench="delta_rule", **values):
    known = {"delta_rule": {"what": "forward", "row": "2/8 1x2048", "kind": "layer"}}.get(bench, {})
    return {"bench": bench, **known, "impl": impl, **MACHINE, **values}


def load(tmp_path, *rows, file="delta_rule"):
    path = tmp_path / "h200" / f"{file}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return recorded.load(tmp_path)


def test_the_committed_page_is_what_the_results_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_the_committed_page_shows_plots_that_are_there():
    text = (report.ROOT / "BENCHMARKS.md").read_text()
    shown = set(re.findall(r"\]\((benchmarks/plots/.*?)\)", text))
    assert shown and shown == {str(p.relative_to(report.ROOT)) for p in (report.ROOT / pictures.FOLDER).glob("*.png")}


def test_every_recorded_bench_has_a_section():
    assert set(report.SECTIONS) == set(recorded.PROBLEMS)


def test_the_newest_measurement_counts(tmp_path):
    rows = [row(eager_ms=2.0), row(eager_ms=1.0, date="2026-11-25T04:00Z"), row(eager_ms=9.0, device="another card")]
    found = recorded.newest(load(tmp_path, *rows))
    assert [(r.run.device, r["eager_ms"]) for r in found] == [("NVIDIA H200", 2.0), ("another card", 9.0)]


def test_of_one_date_the_last_line_counts(tmp_path):
    assert [r["eager_ms"] for r in recorded.newest(load(tmp_path, row(eager_ms=2.0), row(eager_ms=3.0)))] == [3.0]


def test_a_failure_does_not_replace_a_measurement(tmp_path):
    rows = [row(eager_ms=2.0), row(failed="RuntimeError: later", date="2026-11-26T00:00Z"), row("fla", failed="OutOfMemoryError: 68 GiB")]
    text = report.text(load(tmp_path, *rows))
    assert "| 2.00 | failed |" in text and "- FLA, forward 2/8 1x2048 layer bfloat16: OutOfMemoryError: 68 GiB" in text
    assert "later" not in text


def test_a_peer_that_was_not_installed_is_no_result(tmp_path):
    rows = [row(eager_ms=2.0), row("fla", failed="ModuleNotFoundError: No module named 'fla'")]
    assert "FLA |" not in report.text(load(tmp_path, *rows))


def test_ratios_of_two_runs_have_a_star(tmp_path):
    one = report.text(load(tmp_path, row(eager_ms=2.0, graph_ms=1.0), row("fla", eager_ms=3.0, graph_ms=2.5)))
    assert "| 1.50 / 2.50× | 1 |" in one
    two = report.text(load(tmp_path, row(eager_ms=2.0), row("fla", eager_ms=3.0, command="python b.py --again")))
    assert "| 1.50×\\* | 1, 2 |" in two


def test_a_ratio_is_of_the_run_of_the_peer(tmp_path):
    later = {"command": "python b.py --again", "date": "2026-11-26T00:00Z"}
    rows = [row(eager_ms=2.0), row("fla", eager_ms=3.0), row(eager_ms=4.0, **later), row("flash_qla", eager_ms=5.0, **later)]
    assert "| 4.00 | 3.00 | 5.00 | 1.50× | 1.25× | 1, 2 |" in report.text(load(tmp_path, *rows))


def test_a_run_has_versions_date_and_command(tmp_path):
    text = report.text(load(tmp_path, row(eager_ms=2.0)))
    assert "## NVIDIA H200" in text
    assert "1. 2026-11-25T05:00Z: `python b.py`; torch 2.11.0, flash-linear-attention 0.6.0" in text


def test_memory_counts_the_inputs_and_the_worst_error_is_shown(tmp_path):
    text = report.text(load(tmp_path, row(eager_ms=2.0, peak_MiB=1000, inputs_MiB=234, errors={"o": 1e-3, "S": 4e-3})))
    assert "| 2/8 1x2048 | 1,234 | 4.0e-03 |" in text


def test_old_forms_are_read(tmp_path):
    old = {
        "what": "training",
        "row": "6/6 8x4096 K256 V512",
        "impl": "fla 0.6.0",
        "eager_ms": 1.0,
        "device": "NVIDIA H200",
        "run": "with FLA",
    }
    found = load(tmp_path, old)[0]
    assert (found.impl, found.fact("what"), found.bench) == ("fla", "wide", "delta_rule")
    assert ("flash-linear-attention", "0.6.0") in found.run.versions


def test_layers_and_models_have_errors_beside_times(tmp_path):
    layer = {"bench": "layer", "mixer": "gla", "width": 1024, "shape": "8x4096", "dtype": "bf16", "eager_ms": 1.0}
    model = {"bench": "train", "size": "like_fla", "tokens_per_s": 64000, "step_ms": 510.0, "first_s": 9.0, "parameters": 1_300_000_000}
    known, both = {"y": 3e-3, "dx": 4e-3, "dw": 5e-3}, {"loss": 1e-5, "gradients": 7e-3}
    rows = [
        row(**layer, errors=known),
        row("fla", **layer, errors_missing="KeyError: 'A_log'"),
        row(**layer | {"mixer": "swat"}),
        row(**model, shape="8x4096", errors=both),
        row(**model, shape="2x16384"),
    ]
    text = report.text(load(tmp_path, *rows))
    assert "| error gdn / compiled / FLA | run |" in text and "| error of loss / gradients | run |" in text
    for line in ("| gla, 8x4096", "| 5.0e-03 / - | 1 |"), ("| swat, 8x4096", "| - | 1 |"):
        assert any(found.startswith(line[0]) and found.endswith(line[1]) for found in text.splitlines())
    for line in ("| like_fla 8x4096", "| 9.00 | 1.0e-05 / 7.0e-03 | 1 |"), ("| like_fla 2x16384", "| 9.00 | - | 1 |"):
        assert any(found.startswith(line[0]) and found.endswith(line[1]) for found in text.splitlines())


def test_every_section_is_written(tmp_path):
    some = {"eager_ms": 1.0, "parameters": 7}
    rows = [
        row(bench="layer", mixer="gla", width=1024, shape="8x4096", dtype="bf16", note="as it is", **some),
        row(
            bench="train",
            size="like_fla",
            shape="8x4096",
            tokens_per_s=64000,
            step_ms=510.0,
            graph_ms=490.0,
            first_s=9.0,
            mfu=0.5,
            mfu_6n=0.52,
            parameters=1_300_000_000,
        ),
        row("fla", "train", size="like_fla", shape="8x4096", failed="more than 300 s"),
        row(bench="decode", size="gdn_1.3b", batch=32, context=64, tokens_per_s=3000, ms_per_token=10.7),
        row(bench="small_ops", row="l2norm", eager_ms=0.07, host_us=64.0, host_first_us=99.0, of_copy=0.9, error=1e-3, plain_error=1e-3),
        row(what="errors", kind="still", errors={"o": 1e-3, "dq": 2e-3}),
    ]
    text = report.text(load(tmp_path, *rows))
    for part in (
        "gla, 8x4096, bf16", "- gla: as it is", "64,000 | 510 / 490 | 50.0% | 52.0%", "more than 300 s", "3,000 | 10.7", "90%",
        "| 2/8 1x2048 still bfloat16 | gdn | 1.0e-03 | 2.0e-03 | 1 |",
    ):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("x", "shown"), [(0.06528, "0.0653"), (1.944, "1.94"), (9.9996, "10.0"), (510.0, "510"), (64276.0, "64,276"), (0, "0.00"), (None, "")]
)
def test_numbers_have_three_digits(x, shown):
    assert report.number(x) == shown


def test_a_bad_row_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"delta_rule.jsonl, line 2: ValueError: bench: expected one of .*, got 'rule'"):
        load(tmp_path, row(eager_ms=1.0), row(bench="rule"))
    with pytest.raises(ValueError, match="line 1: KeyError: 'impl'"):
        load(tmp_path, {"bench": "layer", "device": "x"})


def test_plots_are_drawn_where_there_are_two_lengths(tmp_path):
    some = [row(impl, row=f"2/8 1x{n}", eager_ms=n / 1e4, peak_MiB=n) for n in (2048, 8192) for impl in ("ours", "fla")]
    results = load(
        tmp_path,
        *some,
        row(row="16/16 1x8192", eager_ms=1.0),
        row(bench="layer", mixer="gla", width=128, shape="1x8", dtype="bf16", eager_ms=1.0),
    )
    panels = pictures.PICTURES[0].shown(results)
    assert list(panels) == ["2/8 heads, time", "2/8 heads, memory"]
    assert panels["2/8 heads, time"]["fla"] == [(2048, 0.2048), (8192, 0.8192)]
    old = tmp_path / pictures.FOLDER / "of_old.png"
    old.parent.mkdir(parents=True)
    old.touch()
    paths = report.draw(results, tmp_path)
    assert [p.name for p in paths] == ["nvidia_h200_rule_forward.png", "nvidia_h200_layer.png"]
    assert all(p.stat().st_size > 5000 for p in paths) and not old.exists()
