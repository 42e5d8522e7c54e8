import contextlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def asked_ahead(monkeypatch):
    """The processes and limits that benchmarks ask `tuning.compiled_ahead` for; it finds nine configurations, one of them slow."""
    import tuning

    asked = []

    @contextlib.contextmanager
    def ahead(processes, limit, until):
        asked.append((processes, limit))
        yield tuning.Tuned(configurations=9, left_out=["slow"])

    monkeypatch.setattr(tuning, "compiled_ahead", ahead)
    return asked
