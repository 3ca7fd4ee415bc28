"""Sums over a span of time of what was read of a task's GPUs and processors.

Used by `sampler`; no input or output.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kd_assets.worker.telemetry.gpu import THROTTLE_REASONS, GpuReading
from kd_assets.worker.telemetry.host import HostReading


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What a task's GPUs and processors did in a span of time; None is not known. Names and units as in manifests."""

    n_gpus: int | None = None
    joules: float | None = None
    """Of all GPUs: by their energy counters, else power integrated over time."""
    gpu_utilisation_percent: float | None = None
    """Mean over time and GPUs."""
    gpu_memory_gib: float | None = None
    """Most in use on the fullest GPU."""
    gpu_power_watts: float | None = None
    """Mean of one GPU."""
    gpu_temperature_celsius: float | None = None
    """Of the hottest."""
    gpu_sm_clock_mhz: float | None = None
    """Mean of one GPU."""
    gpu_memory_clock_mhz: float | None = None
    """Mean of one GPU."""
    gpu_throttle_reasons: tuple[str, ...] | None = None
    """Every reason that was seen on any of them."""
    cpu_utilisation_percent: float | None = None
    """Mean of this process, its children included, over the processors that it was given."""
    host_memory_gib: float | None = None
    """Most resident memory of this process and its children that was seen."""

    def facts(self) -> dict[str, Any]:
        return asdict(self)


def usage_of(gpus: Sequence[GpuSums], host: HostSums) -> Usage:
    """The sums of one span. Of GPUs nothing is known until each was read."""
    if not gpus or not all(gpu.n for gpu in gpus):
        return Usage(**host.sum())
    reasons = [gpu.throttle_bits for gpu in gpus if gpu.throttle_bits is not None]
    bits = functools.reduce(operator.or_, reasons, 0)
    return Usage(
        n_gpus=len(gpus),
        joules=all_or_none([gpu.joules for gpu in gpus]),
        gpu_utilisation_percent=mean([gpu.utilisation.mean for gpu in gpus]),
        gpu_memory_gib=largest([gpu.memory.largest for gpu in gpus]),
        gpu_power_watts=mean([gpu.power.mean for gpu in gpus]),
        gpu_temperature_celsius=largest([gpu.temperature.largest for gpu in gpus]),
        gpu_sm_clock_mhz=mean([gpu.sm_clock.mean for gpu in gpus]),
        gpu_memory_clock_mhz=mean([gpu.memory_clock.mean for gpu in gpus]),
        gpu_throttle_reasons=tuple(n for bit, n in THROTTLE_REASONS.items() if bits & bit) if reasons else None,
        **host.sum(),
    )


class _Sum:
    """Mean and maximum of what was read."""

    def __init__(self) -> None:
        self._n, self._total = 0, 0.0
        self.largest: float | None = None

    def add(self, value: float | None) -> None:
        if value is not None:
            self._n, self._total = self._n + 1, self._total + value
            self.largest = value if self.largest is None else max(self.largest, value)

    @property
    def mean(self) -> float | None:
        return self._total / self._n if self._n else None


class GpuSums:
    """One GPU over a span."""

    def __init__(self) -> None:
        self.n = 0
        self.utilisation, self.memory, self.power, self.temperature = (_Sum() for _ in range(4))
        self.sm_clock, self.memory_clock = _Sum(), _Sum()
        self.throttle_bits: int | None = None
        self._first: GpuReading | None = None
        self._last: tuple[float, GpuReading] | None = None
        self._integral_joules: float | None = 0.0

    def add(self, now_s: float, reading: GpuReading) -> None:
        self.n += 1
        self.memory.add(reading.memory_gib)
        if self._last is None:
            self._first = reading
        else:  # what the first reading tells of load is from before the span
            self.utilisation.add(reading.utilisation_percent)
            self.power.add(reading.power_watts)
            self.temperature.add(reading.temperature_celsius)
            self.sm_clock.add(reading.sm_clock_mhz)
            self.memory_clock.add(reading.memory_clock_mhz)
            if reading.throttle_bits is not None:
                self.throttle_bits = (self.throttle_bits or 0) | reading.throttle_bits
            before_s, before = self._last
            if self._integral_joules is None or reading.power_watts is None or before.power_watts is None:
                self._integral_joules = None
            else:
                self._integral_joules += (before.power_watts + reading.power_watts) / 2 * (now_s - before_s)
        self._last = now_s, reading

    @property
    def joules(self) -> float | None:
        if self._first is None or self._last is None or self.n < 2:
            return None
        first, last = self._first.energy_joules, self._last[1].energy_joules
        if first is not None and last is not None and last >= first:  # less: the driver was loaded again
            return last - first
        return self._integral_joules


class HostSums:
    """This process and its node over a span."""

    def __init__(self, n_cpus: int) -> None:
        self._n_cpus = n_cpus
        self._memory = _Sum()
        self._first: tuple[float, HostReading] | None = None
        self._last: tuple[float, HostReading] | None = None

    def add(self, now_s: float, reading: HostReading) -> float | None:
        """Returns the CPU utilisation in percent since the reading before; None where there was none."""
        before, self._last = self._last, (now_s, reading)
        self._first = self._first or self._last
        self._memory.add(reading.memory_gib)
        return None if before is None else self._percent(before, self._last)

    def sum(self) -> dict[str, Any]:
        first, last = self._first, self._last
        if first is None or last is None or first is last:
            return {}
        return {
            "cpu_utilisation_percent": mean([self._percent(first, last)]),
            "host_memory_gib": largest([self._memory.largest]),
        }

    def _percent(self, before: tuple[float, HostReading], after: tuple[float, HostReading]) -> float | None:
        """Never negative: the time of a child that ended may be lost where another process waited for it."""
        elapsed_s, used_s = after[0] - before[0], after[1].cpu_s - before[1].cpu_s
        return 100 * max(0.0, used_s) / (elapsed_s * self._n_cpus) if elapsed_s > 0 else None


def all_or_none(values: list[float | None]) -> float | None:
    """The sum, unless one is not known."""
    known = [value for value in values if value is not None]
    return round(sum(known), 3) if values and len(known) == len(values) else None


def mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 1) if known else None


def largest(values: list[float | None]) -> float | None:
    return max((round(value, 3) for value in values if value is not None), default=None)
