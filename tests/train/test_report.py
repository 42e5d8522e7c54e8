from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from gdn.train import report
from gdn.train.display import Display, describe, duration
from gdn.train.metrics import Row

TRAIN: Row = {"loss/train": 2.5, "bits_per_byte/train": 3.25, "tokens_per_second": 12345.6, "tokens_seen": 640, "seconds": 75.0}
ROWS: list[Row] = [{"step": 10} | TRAIN, {"step": 20} | TRAIN | {"loss/val": 2.25, "bits_per_byte/val": 3.125}]


def shown(console_options: dict[str, object], rows: list[Row]) -> str:
    output = io.StringIO()
    console = Console(file=output, width=120, highlight=False, **console_options)
    with Display(40, 0, console=console) as display:
        for row in rows:
            display.advance(int(row["step"]), row["step"], row)
    return output.getvalue()


def test_without_a_terminal_there_is_a_plain_line_for_each_row_and_no_control_character() -> None:
    lines = shown({}, [*ROWS, {"step": 21, "lr": 0.1}]).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("step     10  loss 2.5000  bits/byte 3.250  12,346 tokens/s  0:0")
    assert "validation loss 2.2500  bits/byte 3.125" in lines[1]
    assert all(line.isprintable() for line in lines)


def test_on_a_terminal_there_is_a_bar_and_only_validations_stay_as_lines() -> None:
    text = shown({"force_terminal": True, "color_system": None}, ROWS)
    assert "\x1b[" in text
    assert text.count("validation loss 2.2500") >= 1
    assert "12,346 tokens/s" in text
    assert "left" in text


def test_time_left_is_at_the_pace_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("gdn.train.display.time.monotonic", lambda: now[0])
    display = Display(100, 40, silent=True)
    now[0] += 30.0
    assert display.seconds_left(60) == pytest.approx(60.0)
    assert display.seconds_left(100) == 0.0


def test_durations_and_rows_in_words() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
    assert describe({"lr": 0.1}) == ""


def test_the_table_has_the_last_value_of_each_metric_and_the_speed_of_the_whole_run() -> None:
    output = io.StringIO()
    Console(file=output, width=100).print(report.table(ROWS, parameters=1234))
    for text in ("1,234", "640", "1:15", "│ tokens per second        │ 9 ", "2.5000 nats per token", "2.2500 nats per token", "3.125"):
        assert text in output.getvalue(), text


@pytest.mark.usefixtures("picture")
def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = report.plot(ROWS, tmp_path / "loss.png")
    assert path is not None
    assert path.read_bytes().startswith(b"\x89PNG")
    assert report.plot([{"step": 1, "loss/val": 1.0}], tmp_path / "none.png") is None


def test_without_matplotlib_there_is_no_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "has_package", lambda name: False)
    assert report.plot(ROWS, tmp_path / "loss.png") is None
