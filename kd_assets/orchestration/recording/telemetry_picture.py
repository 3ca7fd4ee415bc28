"""The picture of a partition's telemetry: panels over time, as Markdown that holds an SVG.

Every materialization of a cache has one, in every database of Dagster that keeps it, and recording has 50 ms for all of
a partition. So it is written by hand: 0.6 ms of CPU and less than 6 kB. The same look by matplotlib, its figure kept
from picture to picture and its text left as text, takes 30 ms and 30 kB as SVG, and 44 ms and 38 kB as PNG
(`kd_assets_tests/benchmarks/LOG.md`). The picture of losses, one a student, is matplotlib's: see `loss_picture`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_assets.orchestration.recording.figures import BLUE, GREEN, INK, ORANGE, PURPLE

WIDTH, PLOT_HEIGHT = 520, 64
LEFT, RIGHT, TITLE, GAP, BOTTOM = 52, 12, 24, 6, 34
"""Room for the numbers of the vertical axis, right of the plot, above each panel, between two, and below the last."""
MOST_POINTS = 120
"""Of a line: nearly four pixels each."""
UNITS_OF_HEIGHT = 160
"""Of an axis: less than half a pixel each."""

GRID_OPACITY = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """A figure of the series, and how it looks."""

    name: str
    label: str
    colour: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Panel:
    """Figures that share an axis, which begins at 0."""

    title: str
    lines: tuple[Line, ...]
    least_top: float = 0.0
    """The axis reaches at least this."""


POWER = Panel(title="power of all GPUs (W)", lines=(Line(name="total_gpu_power_watts", label="", colour=ORANGE),))
UTILISATION = Panel(
    title="utilisation (%)",
    lines=(
        Line(name="gpu_utilisation_percent", label="GPU", colour=GREEN),
        Line(name="cpu_utilisation_percent", label="CPU", colour=PURPLE),
    ),
    least_top=100.0,
)
MEMORY = Panel(title="memory of the process (GiB)", lines=(Line(name="host_memory_gib", label="", colour=INK),))
SPEED = Panel(title="tokens/s", lines=(Line(name="tokens_per_s", label="", colour=BLUE),))


def telemetry_picture_markdown(telemetry: Mapping[str, Any] | None) -> str | None:
    """The series of a manifest's fact `telemetry` (see `worker.telemetry.series`) as one picture.

    Power of the GPUs, utilisation of GPUs and processors, tokens/s; without GPUs the memory of the process. Of these
    what is known; None where nothing is.
    """
    if telemetry is None:
        return None
    known = {name: v for name, v in telemetry.items() if isinstance(v, list) and any(x is not None for x in v)}
    wanted = (POWER, UTILISATION, SPEED) if _lines(POWER, known) else (UTILISATION, MEMORY, SPEED)
    panels = [panel for panel in wanted if _lines(panel, known)]
    if not panels:
        return None
    svg = _svg(panels, known, float(telemetry["interval_s"]))
    words = ", ".join(panel.title for panel in panels)
    return f"![{words} over time](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _svg(panels: Sequence[Panel], known: Mapping[str, Sequence[float | None]], interval_s: float) -> str:
    n_points = max(len(known[line.name]) for panel in panels for line in _lines(panel, known))
    height = len(panels) * (TITLE + PLOT_HEIGHT + GAP) - GAP + BOTTOM
    drawn = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        f'font-family="system-ui,sans-serif" font-size="11" fill="{INK}">'
    ]
    ticks, unit = time_ticks(n_points * interval_s)
    for number, panel in enumerate(panels):
        top = number * (TITLE + PLOT_HEIGHT + GAP) + TITLE
        drawn += _panel(panel, known, top=top, time_at=[t for t, _ in ticks])
    base = height - BOTTOM
    drawn.append('<g text-anchor="middle">')
    drawn += [f'<text x="{_x(share):.0f}" y="{base + 14}">{text}</text>' for share, text in ticks]
    drawn.append(f'<text x="{_x(0.5):.0f}" y="{base + 28}">time ({unit})</text></g></svg>')
    return "".join(drawn)


def _panel(
    panel: Panel, known: Mapping[str, Sequence[float | None]], *, top: int, time_at: Sequence[float]
) -> list[str]:
    lines = _lines(panel, known)
    largest = max(v for line in lines for v in known[line.name] if v is not None)
    axis_top = nice_top(max(largest, panel.least_top))
    base = top + PLOT_HEIGHT
    drawn = [f'<path stroke="{INK}" stroke-opacity="{GRID_OPACITY}" d="']
    drawn.append("".join(f"M{_x(t):.0f} {top}V{base}" for t in time_at))
    drawn.append("".join(f"M{LEFT} {y}H{WIDTH - RIGHT}" for y in (top, top + PLOT_HEIGHT // 2)) + '"/>')
    drawn.append(f'<path stroke="{INK}" d="M{LEFT} {base}H{WIDTH - RIGHT}"/>')
    drawn.append('<g text-anchor="end">')
    for share in (0.0, 0.5, 1.0):
        y = base - share * PLOT_HEIGHT + 4
        drawn.append(f'<text x="{LEFT - 6}" y="{y:.0f}">{_number(share * axis_top)}</text>')
    means = "".join(
        f'<tspan fill="{line.colour}" dx="{8 if i else 0}">{line.label} mean {_number(_mean(known[line.name]))}</tspan>'
        for i, line in enumerate(lines)
    )
    drawn.append(f'<text x="{WIDTH - RIGHT}" y="{top - 8}">{means}</text></g>')
    drawn.append(f'<text x="{LEFT}" y="{top - 8}" font-weight="600">{panel.title}</text>')
    drawn.append('<g fill="none" stroke-width="1.5" stroke-linejoin="round">')
    for line in lines:
        values = thinned(known[line.name])
        scale = f"{(WIDTH - RIGHT - LEFT) / len(values):.4f} -{PLOT_HEIGHT / UNITS_OF_HEIGHT}"
        drawn.append(
            f'<path stroke="{line.colour}" vector-effect="non-scaling-stroke" '
            f'transform="translate({LEFT} {base}) scale({scale})" d="{path_of(values, axis_top=axis_top)}"/>'
        )
    return [*drawn, "</g>"]


def path_of(values: Sequence[float | None], *, axis_top: float) -> str:
    """A line through the middles of the intervals, with a gap where a value is not known. One interval is 1 wide, the
    axis `UNITS_OF_HEIGHT` high: whole numbers, each but the first the difference to the one before."""
    commands, before = [], None
    for i, value in enumerate(values):
        height = None if value is None else round(value / axis_top * UNITS_OF_HEIGHT)
        if height is not None:
            commands.append(f"M{i}.5 {height}" if before is None else f"l1 {height - before}")
        before = height
    return "".join(commands).replace(" -", "-")


def thinned(values: Sequence[float | None]) -> list[float | None]:
    """At most `MOST_POINTS` of them, by averaging neighbours."""
    step = math.ceil(len(values) / MOST_POINTS)
    return [_mean(values[i : i + step]) for i in range(0, len(values), step)]


def nice_top(largest: float) -> float:
    """The smallest number of two short halves that is not below `largest`; 1 where all is 0."""
    if largest <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(n * power for n in (1, 1.2, 1.6, 2, 2.4, 3, 4, 5, 6, 8, 10) if n * power >= largest * (1 - 1e-9))


def time_ticks(duration_s: float) -> tuple[list[tuple[float, str]], str]:
    """(share of the duration, number) of at most seven ticks, and their unit."""
    unit, unit_s = next((u, s) for u, s in (("h", 3600), ("min", 60), ("s", 1)) if duration_s >= 3 * s or s == 1)
    n_units = duration_s / unit_s
    steps = (step * 10**power for power in range(6) for step in (1, 2, 5))
    step = next(step for step in steps if n_units / step <= 6)
    return [(i * step / n_units, f"{i * step:,}") for i in range(int(n_units / step + 1e-9) + 1)], unit


def _lines(panel: Panel, known: Mapping[str, Any]) -> list[Line]:
    return [line for line in panel.lines if line.name in known]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - RIGHT - LEFT)


def _number(value: float | None) -> str:
    """Three digits or more, as people write them: 0.412, 51.3, 2,610."""
    if value is None or value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
