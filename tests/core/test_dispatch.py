"""The table of implementations: order, reasons, forcing, registration, plug-ins, and the choice under torch.compile."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gdn.core import dispatch
from gdn.core.dispatch import Impl, Needs, Op, ops, triton_gpu, use
from gdn.core.errors import ImplementationError


def narrow(x: Tensor) -> Tensor:
    return x + 1


def general(x: Tensor) -> Tensor:
    return x + 2


def outside(x: Tensor) -> Tensor:
    return x + 3


NARROW = Needs(device="cpu", dtypes=(torch.float32, torch.float64), dims={"K": (64, 128), "V": range(1, 257)})


@pytest.fixture
def op(monkeypatch: pytest.MonkeyPatch) -> Iterator[Op]:
    """A table of three rows; it leaves the process with the test."""
    dispatch.ops()  # or the tables that a test is the first to import would leave with it
    monkeypatch.setattr(dispatch, "_OPS", dict(dispatch._OPS))
    yield Op(
        "toy",
        (
            Impl("absent", "no_such_module:function", Needs(packages=("no_such_package",))),
            Impl("narrow", f"{__name__}:narrow", NARROW),
            Impl("general", f"{__name__}:general"),
        ),
    )


def call(op: Op, x: Tensor) -> Tensor:
    return op.pick(x, K=x.shape[-1])(x)


def test_the_first_row_that_can_serve_is_chosen(op: Op) -> None:
    assert op.pick(torch.zeros(64), K=64) is narrow
    assert op.pick(torch.zeros(65), K=65) is general
    assert op.pick(torch.zeros(64).half(), K=64) is general
    assert op.pick(torch.zeros(64, device="meta"), K=64) is general
    assert op.pick(torch.zeros(64), K=64, V=257) is general
    assert op.pick(torch.zeros(64)) is narrow, "a dimension that is not named does not matter"


def test_reasons(op: Op) -> None:
    def reasons(*args: Any, **dims: int) -> list[str | None]:
        verdicts = op.explain(*args, **dims)
        assert [v.name for v in verdicts] == ["absent", "narrow", "general"]
        return [v.reason for v in verdicts]

    absent = 'needs the package "no_such_package"'
    assert reasons(K=64) == [absent, None, None]
    assert reasons(K=65) == [absent, "needs K in (64, 128), got 65", None]
    assert reasons("cpu", torch.bfloat16) == [absent, "needs float32 or float64, got torch.bfloat16", None]
    assert reasons("cuda") == [absent, "needs a cpu tensor, got cuda", None]


def test_the_reason_of_old_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.hardware, "capability", lambda index: {0: 80, 1: 90, 2: 75, 3: 0}[index])
    needs, cuda = Needs(device="cuda", arch=90), {"device": "cuda", "dtype": torch.float32}
    assert needs.why_not(dispatch.Call(index=0, **cuda)) == "needs compute capability 9.0, got 8.0"
    assert needs.why_not(dispatch.Call(index=1, **cuda)) is None
    triton = dataclasses.replace(triton_gpu(), packages=())
    found = [triton.why_not(dispatch.Call(index=i, **cuda)) for i in range(4)]
    assert found == [None, None, "needs compute capability 8.0, got 7.5", None], "without a GPU here, any GPU is spoken of"
    on_cpu = dispatch.Call(device="cpu", dtype=torch.float32, index=3)
    assert triton.why_not(on_cpu, interpreted=True) is None
    assert needs.why_not(on_cpu, interpreted=True) == "needs a cuda tensor, got cpu"


def test_a_module_is_imported_when_its_row_is_chosen(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    op.register(Impl("late", "colorsys:rgb_to_hsv", Needs(dtypes=(torch.float64,))))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    op.pick(torch.zeros(1))
    assert "colorsys" not in sys.modules
    assert op.pick(torch.zeros(1).double()) is sys.modules["colorsys"].rgb_to_hsv


def test_an_automatic_choice_is_logged_once(op: Op, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gdn.dispatch"):
        for width in (64, 128, 64):
            op.pick(torch.zeros(width), K=width)
        assert [r.getMessage() for r in caplog.records] == ["toy: narrow (cpu, torch.float32, {'K': 64})"]
        op.pick(torch.zeros(65), K=65)
    assert len(caplog.records) == 2


def test_forcing_lasts_for_its_block(op: Op) -> None:
    x = torch.zeros(64)
    with use(toy="general"):
        assert call(op, x).tolist() == [2.0] * 64
        with use(toy="narrow"):
            assert op.pick(x, K=64) is narrow
        assert op.pick(x, K=64) is general
    assert op.pick(x, K=64) is narrow
    with pytest.raises(KeyError), use(toy="general"):
        raise KeyError
    assert op.forced is None


def test_forced_and_unable_is_an_error_with_the_reason(op: Op) -> None:
    with use(toy="narrow"), pytest.raises(ImplementationError, match='toy: "narrow" was asked for and cannot run: needs K in'):
        op.pick(torch.zeros(5), K=5)
    with use(toy="absent"), pytest.raises(ImplementationError, match=r'"absent" was asked .* needs the package "no_such_package"'):
        op.pick(torch.zeros(5), K=5)


def test_without_a_gpu_the_interpreter_is_named_where_it_would_do(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdn.core.device.interprets_triton", lambda: False)
    monkeypatch.setattr("gdn.core.device.has_package", lambda name: name == "triton")
    op.register(Impl("triton", f"{__name__}:narrow", triton_gpu(K=(64,))))
    for x, named in ((torch.zeros(64), True), (torch.zeros(64).double(), False), (torch.zeros(65), False)):
        with use(toy="triton"), pytest.raises(ImplementationError, match="needs a cuda tensor, got cpu") as caught:
            op.pick(x, K=len(x))
        assert ("; or set TRITON_INTERPRET=1 in the environment" in str(caught.value)) == named


def test_unknown_names_are_errors_before_anything_changes(op: Op) -> None:
    with pytest.raises(ImplementationError, match=r'toy has no implementation "genral"\. Did you mean "general"\?'), use(toy="genral"):
        pass
    with pytest.raises(ImplementationError, match=r'no operator "tory"\. Did you mean "toy"\?'), use(toy="general", tory="general"):
        pass
    assert op.forced is None
    with pytest.raises(ImplementationError, match="no implementation"):
        op.function("missing")


def test_no_row_at_all_lists_every_reason() -> None:
    table = Op.__new__(Op)
    table.name, table.impls = "lonely", (Impl("narrow", f"{__name__}:narrow", NARROW),)
    with pytest.raises(ImplementationError, match=r"lonely: no implementation can run\. narrow: needs a cpu tensor, got cuda"):
        table._select(None, dispatch.Call(device="cuda", index=0, dtype=torch.float32))


def test_registering_before_a_row(op: Op) -> None:
    x = torch.zeros(64)
    assert op.pick(x, K=64) is narrow
    op.register(Impl("late", f"{__name__}:outside"), before="general")
    assert [row.name for row in op.impls] == ["absent", "narrow", "late", "general"]
    assert op.pick(x, K=64) is narrow
    assert op.pick(torch.zeros(5), K=5) is outside
    op.register(Impl("first", f"{__name__}:outside"))
    assert op.pick(x, K=64) is outside, "a choice made before must not outlive the registration"
    with pytest.raises(ImplementationError, match='toy already has an implementation "late"'):
        op.register(Impl("late", f"{__name__}:outside"))
    with pytest.raises(ImplementationError, match=r'toy has no implementation "gneral"\. Did you mean "general"'):
        op.register(Impl("other", f"{__name__}:outside"), before="gneral")


def plug_in() -> None:
    """What an installed package names as its entry point."""
    ops()["toy"].register(Impl("plugged", f"{__name__}:outside"), before="narrow")


def test_installed_packages_add_rows_once(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = importlib.metadata.EntryPoint("toy", f"{__name__}:plug_in", dispatch.ENTRY_POINTS)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == dispatch.ENTRY_POINTS else [])
    monkeypatch.setattr(dispatch, "_plugged", False)
    assert op.pick(torch.zeros(64), K=64) is outside
    assert [v.name for v in op.explain()] == ["absent", "plugged", "narrow", "general"]


def counting() -> tuple[list[object], Callable[..., Any]]:
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def test_the_choice_is_part_of_one_compiled_graph(op: Op) -> None:
    graphs, backend = counting()
    compiled = torch.compile(lambda x: call(op, x), fullgraph=True, backend=backend, dynamic=True)
    for length in (3, 5, 8):
        assert torch.equal(compiled(torch.zeros(length, 64)), torch.ones(length, 64))
    assert len(graphs) == 1, "another length must not compile again"
    assert torch.equal(compiled(torch.zeros(3, 65)), torch.full((3, 65), 2.0)), "another width must choose again"
    assert torch.equal(compiled(torch.zeros(3, 64).half()), torch.full((3, 64), 2.0).half())


@pytest.mark.parametrize("strict", [False, True])
def test_a_row_for_compiled_graphs_serves_neither_eager_calls_nor_exported_graphs(strict: bool, op: Op) -> None:
    op.register(Impl("compiled", f"{__name__}:outside", Needs(compiled=True)), before="absent")

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return call(op, x)

    module, x = Module(), torch.zeros(64)
    assert module(x)[0] == 1
    assert torch.export.export(module, (x,), strict=strict).module()(x)[0] == 1
    assert torch.compile(module, fullgraph=True, backend="eager")(x)[0] == 3


def test_what_is_called_while_tracing_is_marked_as_torch_marks_constants() -> None:
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(dispatch._choose) == vars(dispatch._exporting) == vars(marked) != {}


def test_forcing_reaches_a_compiled_graph(op: Op) -> None:
    graphs, backend = counting()
    compiled = torch.compile(lambda x: call(op, x), fullgraph=True, backend=backend)
    x = torch.zeros(64)
    assert compiled(x)[0] == 1
    with use(toy="general"):
        assert compiled(x)[0] == 2
    assert compiled(x)[0] == 1
    assert len(graphs) == 2
    with use(toy="narrow"), pytest.raises(Exception, match="needs K in"):
        compiled(torch.zeros(65))


def test_every_operator_of_the_library_ends_with_its_reference() -> None:
    for name, table in ops().items():
        assert table.impls[-1].name == "reference", name
        assert table.impls[-1].needs == Needs(), f"{name}: the last row takes anything"
        assert table.function("reference").__doc__, name


def test_names_of_tables_are_public_operators() -> None:
    import gdn.ops

    assert set(ops()) <= set(gdn.ops.__all__)
