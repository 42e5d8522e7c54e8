from __future__ import annotations

import pytest

from gdn.core.errors import ConfigError
from gdn.train.schedule import Schedule, position


def test_points_of_the_schedule() -> None:
    schedule = Schedule(warmup=10, final_fraction=0.1)
    points = {0: 0.1, 4: 0.5, 9: 1.0, 10: 1.0, 60: 0.55, 110: 0.1, 500: 0.1}
    for step, expected in points.items():
        assert schedule.factor(step, 110) == pytest.approx(expected), step


def test_it_never_rises_after_warm_up() -> None:
    factors = [Schedule(warmup=7, final_fraction=0.0).factor(step, 50) for step in range(50)]
    assert factors[:7] == sorted(factors[:7])
    assert factors[7:] == sorted(factors[7:], reverse=True)
    assert factors[-1] > 0


def test_without_warm_up_it_starts_at_the_peak() -> None:
    assert Schedule(warmup=0).factor(0, 10) == 1.0


def test_a_run_no_longer_than_its_warm_up() -> None:
    assert [Schedule(warmup=4).factor(step, 3) for step in range(3)] == [0.25, 0.5, 0.75]


def test_with_a_time_limit_the_cosine_follows_the_clock_and_warm_up_the_steps() -> None:
    schedule = Schedule(warmup=10, final_fraction=0.1)
    assert position(20, 1000, elapsed=50.0, limit=None) == 20
    assert position(20, 1000, elapsed=50.0, limit=100.0) == 500
    assert position(800, 1000, elapsed=50.0, limit=100.0) == 800
    assert position(20, 1000, elapsed=500.0, limit=100.0) == 1000
    assert schedule.factor(20, 1000, at=1000) == pytest.approx(0.1)
    assert schedule.factor(4, 1000, at=10) == pytest.approx(0.5)


@pytest.mark.parametrize("wrong", [{"warmup": -1}, {"final_fraction": 1.5}])
def test_values_that_cannot_work_are_named(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Schedule(**wrong)
