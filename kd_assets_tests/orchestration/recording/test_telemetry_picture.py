"""The picture of a partition's telemetry: what is in it, how large it is, and that it is well-formed."""

from __future__ import annotations

import base64
import re
from typing import Any
from xml.etree import ElementTree

import pytest

from kd_assets.orchestration.recording.telemetry_picture import (
    MOST_POINTS,
    UNITS_OF_HEIGHT,
    nice_top,
    path_of,
    telemetry_picture_markdown,
    thinned,
    time_ticks,
)
from kd_assets_tests.orchestration.recording.made_up import CPU_SERIES, GPU_SERIES

SVG = "{http://www.w3.org/2000/svg}"


def picture(telemetry: dict[str, Any]) -> ElementTree.Element:
    markdown = telemetry_picture_markdown(telemetry)
    assert markdown is not None
    found = re.fullmatch(r"!\[[^\[\]]+ over time\]\(data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)\)", markdown)
    assert found is not None
    return ElementTree.fromstring(base64.b64decode(found[1]))


def words(svg: ElementTree.Element) -> list[str]:
    return ["".join(text.itertext()).strip() for text in svg.iter(f"{SVG}text")]


def lines(svg: ElementTree.Element) -> list[ElementTree.Element]:
    return [path for path in svg.iter(f"{SVG}path") if path.get("transform")]


def test_on_gpus_power_utilisation_and_speed_are_shown() -> None:
    svg = picture(GPU_SERIES)
    shown = words(svg)
    assert [w for w in shown if w in ("power of all GPUs (W)", "utilisation (%)", "tokens/s")] == [
        "power of all GPUs (W)",
        "utilisation (%)",
        "tokens/s",
    ]
    assert any(re.fullmatch(r"GPU mean [\d.]+CPU mean [\d.]+", w) for w in shown), "a gap is between them"
    assert "time (min)" in shown
    assert len(lines(svg)) == 4
    assert not any("memory" in w for w in shown)


def test_on_a_machine_without_gpus_cpu_memory_and_speed_are_shown() -> None:
    shown = words(picture(CPU_SERIES))
    assert {"utilisation (%)", "memory of the process (GiB)", "tokens/s", "time (s)"} <= set(shown)
    assert not any("GPU" in w for w in shown)


def test_the_ground_is_the_pages_and_ink_is_read_on_white_and_on_black() -> None:
    svg = picture(GPU_SERIES)
    assert not list(svg.iter(f"{SVG}rect"))
    used = {value for element in svg.iter() for value in element.attrib.values() if re.fullmatch("#[0-9a-f]+", value)}
    for colour in used:
        red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        assert 0.3 < 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.65, colour


def test_what_is_not_known_has_no_panel() -> None:
    series = {"interval_s": 1.0, "tokens_per_s": [5.0, 5.0, 6.0], "total_gpu_power_watts": [None, None, None]}
    assert [w for w in words(picture(series)) if "(" in w or "tokens" in w] == ["tokens/s", "time (s)"]


@pytest.mark.parametrize("telemetry", [None, {"interval_s": 1.0}, {"interval_s": 1.0, "tokens_per_s": [None] * 5}])
def test_without_figures_there_is_no_picture(telemetry: dict[str, Any] | None) -> None:
    assert telemetry_picture_markdown(telemetry) is None


def test_every_axis_begins_at_zero_and_holds_its_figures() -> None:
    svg = picture({"interval_s": 1.0, "tokens_per_s": [980.0, 1010.0, 990.0]})
    assert [w for w in words(svg) if re.fullmatch(r"[\d,.]+", w)][:3] == ["0", "600", "1,200"]
    (line,) = lines(svg)
    (first,) = re.findall(r"^M0\.5 (\d+)", str(line.get("d")))
    assert int(first) == round(980 / 1200 * UNITS_OF_HEIGHT)


def test_utilisation_has_an_axis_to_one_hundred_unless_there_is_more() -> None:
    low = picture({"interval_s": 1.0, "cpu_utilisation_percent": [3.0, 4.0, 3.0]})
    assert "100" in words(low)
    high = picture({"interval_s": 1.0, "cpu_utilisation_percent": [3.0, 140.0, 3.0]})
    assert "160" in words(high)


def test_a_line_has_a_gap_where_nothing_is_known() -> None:
    assert path_of([1.0, 2.0, None, 0.5, 0.5], axis_top=4.0) == "M0.5 40l1 40M3.5 20l1 0"
    assert path_of([4.0, 0.0], axis_top=4.0) == f"M0.5 {UNITS_OF_HEIGHT}l1-{UNITS_OF_HEIGHT}"


def test_long_lines_are_thinned_by_averaging_neighbours() -> None:
    assert thinned([1.0, 2.0, None]) == [1.0, 2.0, None]
    values: list[float | None] = [1.0, 3.0] * MOST_POINTS
    values[0:2] = [None, 5.0]
    values[2:4] = [None, None]
    assert thinned(values) == [5.0, None] + [2.0] * (MOST_POINTS - 2)


@pytest.mark.parametrize(
    ("largest", "top"),
    [(0.0, 1.0), (0.7, 0.8), (1.0, 1.0), (1.01, 1.2), (99.0, 100.0), (2600.0, 3000.0), (13_400.0, 16_000.0)],
)
def test_the_top_of_an_axis_is_a_short_number(largest: float, top: float) -> None:
    assert nice_top(largest) == pytest.approx(top)


@pytest.mark.parametrize(
    ("duration_s", "unit", "numbers"),
    [
        (3, "s", ["0", "1", "2", "3"]),
        (14, "s", ["0", "5", "10"]),
        (179, "s", ["0", "50", "100", "150"]),
        (800, "min", ["0", "5", "10"]),
        (48 * 3600, "h", ["0", "10", "20", "30", "40"]),
        (240 * 4096, "h", ["0", "50", "100", "150", "200", "250"]),
    ],
)
def test_time_is_in_the_unit_that_people_would_use(duration_s: float, unit: str, numbers: list[str]) -> None:
    ticks, found = time_ticks(duration_s)
    assert (found, [number for _, number in ticks]) == (unit, numbers)
    assert all(0 <= share <= 1 for share, _ in ticks)


@pytest.mark.parametrize("series", [GPU_SERIES, CPU_SERIES])
def test_a_picture_takes_less_than_6_kb(series: dict[str, Any]) -> None:
    """Dagster's databases keep one for each materialization."""
    markdown = telemetry_picture_markdown(series)
    assert markdown is not None
    assert len(markdown) < 6000
