"""The doctor examines every operator, finds none wrong, and finds a fault that is planted."""

from __future__ import annotations

import pytest
import torch

from gdn.core.dispatch import Impl, ops
from gdn.testing import doctor

CPU = torch.device("cpu")


def test_every_operator_has_an_example() -> None:
    assert set(doctor.EXAMPLES) == set(ops())


@pytest.mark.parametrize("name", sorted(doctor.EXAMPLES))
def test_every_row_that_runs_here_is_right(name: str) -> None:
    findings = doctor.examine_op(ops()[name], CPU, torch.float32)
    assert any(f.error is not None for f in findings)
    for finding in findings:
        assert finding.ok, finding
    assert sum(f.chosen for f in findings) == 1


def half_as_large(x: torch.Tensor, eps: float) -> torch.Tensor:
    return 0.5 * ops()["l2norm"].function("reference")(x, eps)


def test_a_wrong_row_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    op = ops()["l2norm"]
    monkeypatch.setattr(op, "impls", op.impls)
    op.register(Impl("wrong", f"{__name__}:half_as_large"))
    monkeypatch.setattr(doctor, "EXAMPLES", {"l2norm": doctor.EXAMPLES["l2norm"]})
    assert doctor.examine("cpu") == 1
    op._choices.clear()
    assert "l2norm: wrong is wrong here" in capsys.readouterr().out
