"""Figures over time, kept in a bounded number of points however long they go on.

Used by `sampler`; standard library only. A series has an even grid of intervals; a point is the
mean over its interval. The invariant: there are never more than `MAX_POINTS` of them, because two neighbours become one
whenever time runs off the grid's end, and no figure is lost by that, only resolution.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

MAX_POINTS = 240
MIN_POINTS = 3
"""Fewer tell nothing over time."""
INTERVAL_S = 1.0
"""Of a short series; a long one has this times a power of two."""


@dataclass(slots=True)
class _Point:
    """One figure's mean over what is known of one interval."""

    total: float = 0.0
    """Its integral over the time for which it is known."""
    known_s: float = 0.0

    def add(self, other: _Point) -> None:
        self.total += other.total
        self.known_s += other.known_s

    @property
    def mean(self) -> float | None:
        return self.total / self.known_s if self.known_s > 0 else None


class Series:
    """Named figures since `started_s`, all on one grid. Any thread may add and ask."""

    def __init__(self, started_s: float) -> None:
        self._started_s, self._interval_s, self._end_s = started_s, INTERVAL_S, 0.0
        self._points: dict[str, list[_Point]] = {}
        self._lock = threading.Lock()

    def add(self, name: str, from_s: float, to_s: float, value: float | None) -> None:
        """The figure was `value` on average between two moments; None: it is not known for that time."""
        first_s, last_s = from_s - self._started_s, to_s - self._started_s
        if last_s <= first_s:
            return
        with self._lock:
            self._end_s = max(self._end_s, last_s)
            while self._end_s > self._interval_s * MAX_POINTS:
                self._halve()
            if value is None:
                return
            points = self._points.setdefault(name, [])
            for index in range(int(first_s / self._interval_s), math.ceil(last_s / self._interval_s)):
                while len(points) <= index:
                    points.append(_Point())
                begins_s = index * self._interval_s
                within_s = min(last_s, begins_s + self._interval_s) - max(first_s, begins_s)
                points[index].add(_Point(total=value * within_s, known_s=within_s))

    def facts(self) -> dict[str, Any] | None:
        """`interval_s`, and a list of means for each figure that was ever known, None where it was not; all lists are
        of equal length, and point i is of the time from i to i + 1 intervals. None where the time was too short.

        A last interval that is less than half over is part of the one before it.
        """
        with self._lock:
            n = int(self._end_s / self._interval_s + 0.5)
            if n < MIN_POINTS:
                return None
            return {"interval_s": self._interval_s} | {
                name: [_short(point.mean) for point in _of_length(points, n)] for name, points in self._points.items()
            }

    def _halve(self) -> None:
        self._interval_s *= 2
        for points in self._points.values():
            if len(points) % 2:
                points.append(_Point())
            for kept, other in zip(points[::2], points[1::2], strict=True):
                kept.add(other)
            del points[1::2]


def _of_length(points: list[_Point], n: int) -> list[_Point]:
    """What lies beyond goes into the last one; what lacks is not known."""
    kept = [_Point(total=p.total, known_s=p.known_s) for p in points[:n]]
    for beyond in points[n:]:
        kept[-1].add(beyond)
    return kept + [_Point() for _ in range(n - len(kept))]


def _short(value: float | None) -> float | int | None:
    """Four significant digits: a picture shows no more, and every digit is stored a thousand times."""
    if value is None:
        return None
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() else short
