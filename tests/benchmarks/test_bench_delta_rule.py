from __future__ import annotations

import bench_delta_rule_gpu as bench
import pytest
import rows
import torch


@pytest.fixture
def tiny(monkeypatch):
    """Two small problems, and a peer that is slightly wrong."""
    monkeypatch.setattr(bench, "FORWARD", [(2, 4, 128, 128, 1, 4096, (2048, 2048))])
    monkeypatch.setattr(bench, "TRAINING", [(2, 2, 128, 128, 2, 2048, None)])

    def peer(problem, device):
        rule = bench.ours(problem, device)
        return lambda *x: tuple(1.5 * y for y in rule(*x))

    monkeypatch.setitem(bench.RULES, "fla", peer)


def run(line):
    args = bench.parse(f"--device cpu --repeats 3 {line}".split())
    return rows.run("delta_rule", bench.plan(args), args, "cpu")


def test_times_and_errors_stand_beside_each_other(tiny, tmp_path):
    found = run(f"--tables forward,training --peers fla --out {tmp_path / 'out.jsonl'}")
    assert [(r["what"], r["row"], r["impl"]) for r in found] == [
        ("forward", "1/2 32+32", "ours"),
        ("forward", "1/2 32+32", "fla"),
        ("training", "1/1 2x32", "ours"),
        ("training", "1/1 2x32", "fla"),
    ]
    assert all(r["eager_ms"] > 0 for r in found)
    for right, wrong in zip(found[::2], found[1::2]):
        assert max(right["errors"].values()) < 0.01
        assert all(e == pytest.approx(0.5, abs=0.02) for e in wrong["errors"].values())
    assert list(found[0]["errors"]) == ["o", "S"]
    assert list(found[2]["errors"]) == ["o", "S", "dq", "dk", "dv", "dg", "dbeta"]
    text = bench.summary(found)
    assert text.count("\n") == 1 and "err 5.0e-01" in text


def test_tables_stand_in_the_order_they_are_named(tiny):
    """A run may be cut, so whoever needs one table first names it first."""
    args = bench.parse(["--device", "cpu", "--tables", "errors,training,forward"])
    found = bench.plan(args)
    assert list(dict.fromkeys(r.problem["what"] for r in found)) == ["errors", "training", "forward"]
    assert [r.problem["kind"] for r in found[:4]] == list(bench.KINDS)


def test_a_missing_peer_does_not_end_the_run(tiny, monkeypatch):
    def missing(problem, device):
        raise ModuleNotFoundError("No module named 'flash_qla'")

    monkeypatch.setitem(bench.RULES, "flash_qla", missing)
    found = run("--tables forward --peers flash_qla --no-errors")
    assert found[0]["eager_ms"] > 0 and "errors" not in found[0]
    assert found[1]["failed"] == "ModuleNotFoundError: No module named 'flash_qla'"


def test_a_comparison_that_fails_keeps_the_times(tiny, monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("no room for float64")

    monkeypatch.setattr(bench, "truth", broken)
    found = run("--tables forward")[0]
    assert found["eager_ms"] > 0 and "no room" in found["errors_missing"]


def test_the_bars_have_their_rows():
    forward = {bench.name(p) for p in bench.FORWARD}
    few = {f"2/8 1x{T}" for T in (32768, 8192, 2048)}
    grouped = {"16/32 1x32768", "16/32 1x8192", "16/32 8x4096", "16/32 8x1024", "16/32 6144+2048", "16/64 1x32768", "16/64 8x4096"}
    assert forward == few | grouped | {"16/16 1x8192", "16/16 8x4096"}
    assert {bench.name(p) for p in bench.TRAINING} == {"16/16 8x4096", "16/32 1x8192", "16/32 1x32768", "2/8 1x32768"}
    assert {bench.name(p) for p in bench.WIDE} == {"6/6 8x4096 K256 V512", "9/9 8x4096 K200 V400"}


def test_peers_get_the_problems_that_they_have_kernels_for():
    args = bench.parse(["--device", "cpu", "--tables", "wide", "--peers", "fla,flash_qla,attention_gym,transformers"])
    assert [(r.problem["row"], r.impl) for r in bench.plan(args)] == [
        ("1/1 8x64 K256 V512", "ours"),
        ("1/1 8x64 K256 V512", "fla"),
        ("1/1 8x64 K256 V512", "transformers"),
        ("1/1 8x64 K200 V400", "ours"),
        ("1/1 8x64 K200 V400", "fla"),
        ("1/1 8x64 K200 V400", "fla padded"),
        ("1/1 8x64 K200 V400", "transformers"),
    ]
    args = bench.parse(["--device", "cpu", "--tables", "forward", "--match", "6144", "--peers", "transformers"])
    assert [r.impl for r in bench.plan(args)] == ["ours"]  # it has no packed rows


def test_padding_for_a_peer_changes_nothing(monkeypatch):
    problem = (1, 2, 12, 20, 1, 40, None)
    monkeypatch.setattr(bench, "fla", lambda problem, device: lambda *x: bench.gated_delta_rule(*x, scale=12**-0.5))
    x = bench.inputs(problem, torch.float32, device="cpu")
    for padded, plain in zip(bench.fla_padded(problem, "cpu")(*x), bench.ours(problem, "cpu")(*x), strict=True):
        torch.testing.assert_close(padded, plain)


@pytest.mark.parametrize("kind", bench.KINDS)
def test_the_truth_is_the_recurrence(kind):
    """The timed tables are compared with the chunked row in float64; here that is compared with the definition."""
    problem = (1, 2, 16, 16, 1, 100, (60, 40))
    x = [t.double() for t in bench.inputs(problem, torch.bfloat16, kind=kind, device="cpu")]
    do = bench.output_gradient(problem, "cpu", torch.bfloat16).double()
    packing = bench.Packing.from_lengths(problem[6])
    definition = bench.results_of(lambda *y: bench.reference(*y, 16**-0.5, None, packing), x, do)
    for a, b in zip(bench.truth(problem, kind, True, "cpu", torch.bfloat16), definition, strict=True):
        assert bench.error(a, b) < 1e-10


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        bench.parse(["--tables", "forwards", "--device", "cpu"])
    assert "'forwards': expected some of forward, training, wide, errors" in capsys.readouterr().err


def test_only_what_fla_tunes_is_compiled_ahead(tiny, asked_ahead):
    found = run("--tables training --peers fla,flash_qla --no-errors --compilers 3 --compile-limit 40")
    assert [r["impl"] for r in found] == ["ours", "fla", "flash_qla"]
    assert asked_ahead == [(0, 40), (3, 40), (0, 40)]
