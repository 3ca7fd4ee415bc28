"""Figures over time: true means, whatever the moments of the readings, and never more points than a picture has."""

from __future__ import annotations

from typing import Any

import pytest

from kd_assets.worker.telemetry.series import MAX_POINTS, Series


def facts(series: Series) -> dict[str, Any]:
    found = series.facts()
    assert found is not None
    return found


def test_a_point_is_the_mean_over_its_interval_however_readings_fall() -> None:
    series = Series(100.0)
    for from_s, to_s, watts in (
        (100.0, 100.5, 10.0),
        (100.5, 101.5, 20.0),
        (101.5, 101.75, 40.0),
        (101.75, 103.0, 8.0),
    ):
        series.add("watts", from_s, to_s, watts)
    assert facts(series) == {"interval_s": 1.0, "watts": [15, 22, 8]}


def test_what_is_not_known_is_none_and_does_not_move_the_mean() -> None:
    series = Series(0.0)
    series.add("watts", 0.0, 1.5, 10.0)
    series.add("watts", 1.5, 3.0, None)
    series.add("percent", 2.0, 4.0, 50.0)
    series.add("never", 0.0, 4.0, None)
    assert facts(series) == {"interval_s": 1.0, "watts": [10, 10, None, None], "percent": [None, None, 50, 50]}


def test_a_reading_over_several_intervals_counts_in_each() -> None:
    series = Series(0.0)
    series.add("watts", 0.0, 0.5, 10.0)
    series.add("watts", 0.5, 4.0, 20.0)
    assert facts(series)["watts"] == [15, 20, 20, 20]


def test_a_last_interval_that_has_hardly_begun_is_part_of_the_one_before() -> None:
    series = Series(0.0)
    series.add("watts", 0.0, 3.0, 10.0)
    series.add("watts", 3.0, 3.25, 30.0)
    assert facts(series)["watts"] == [10, 10, 14]
    series.add("watts", 3.25, 3.75, 30.0)
    assert facts(series)["watts"] == [10, 10, 10, 30]


def test_less_than_three_intervals_are_no_series() -> None:
    series = Series(0.0)
    assert series.facts() is None
    series.add("watts", 0.0, 2.4, 10.0)
    assert series.facts() is None


@pytest.mark.parametrize("seconds", [239, 240, 241, 1000, 48 * 3600])
def test_a_series_of_any_length_has_a_bounded_number_of_points_and_the_same_mean(seconds: int) -> None:
    series = Series(0.0)
    for second in range(seconds):
        series.add("watts", float(second), second + 1.0, float(second % 7))
    found = facts(series)
    assert MAX_POINTS / 2 < len(found["watts"]) <= MAX_POINTS
    assert len(found["watts"]) * found["interval_s"] == pytest.approx(seconds, rel=0.01)
    assert sum(found["watts"]) / len(found["watts"]) == pytest.approx(3.0, abs=0.1)


def test_a_gap_longer_than_the_grid_makes_the_intervals_longer() -> None:
    series = Series(0.0)
    series.add("watts", 0.0, 1.0, 1.0)
    series.add("watts", 999.0, 1000.0, 5.0)
    found = facts(series)
    assert found["interval_s"] == 8.0
    assert [v for v in found["watts"] if v is not None] == [1, 5]


def test_numbers_are_as_short_as_a_picture_needs() -> None:
    series = Series(0.0)
    for name, value in (("watts", 2647.31), ("gib", 1.23456), ("tokens_per_s", 131072.4)):
        series.add(name, 0.0, 3.0, value)
    found = facts(series)
    assert (found["watts"][0], found["gib"][0], found["tokens_per_s"][0]) == (2647, 1.235, 131100)


def test_a_time_of_no_length_is_passed_over() -> None:
    series = Series(5.0)
    series.add("watts", 5.0, 5.0, 1e9)
    series.add("watts", 5.0, 8.0, 1.0)
    assert facts(series)["watts"] == [1, 1, 1]
