"""Made-up telemetry, as a manifest's fact `telemetry` has it: noisy figures from a seed; no machine is behind them."""

from __future__ import annotations

from typing import Any

import numpy as np

_N = 240


def _noisy(level: float, noise: float, *, idle: float, n: int = _N) -> list[float | None]:
    """Idle at both ends, where a shard is read and results are committed."""
    values = np.random.default_rng(int(level)).normal(level, noise, n).round()
    values[: n // 60] = idle
    values[-n // 20 :] = idle
    return [float(value) for value in values]


GPU_SERIES: dict[str, Any] = {
    "interval_s": 4.0,
    "total_gpu_power_watts": _noisy(2650, 60, idle=520),
    "gpu_utilisation_percent": _noisy(96, 1, idle=11),
    "cpu_utilisation_percent": _noisy(14, 2, idle=6),
    "host_memory_gib": _noisy(13, 0.1, idle=13),
    "tokens_per_s": _noisy(13_200, 350, idle=0),
}
"""Sixteen minutes on four GPUs: as long as a series gets."""

CPU_SERIES: dict[str, Any] = {
    "interval_s": 1.0,
    "cpu_utilisation_percent": _noisy(93, 3, idle=50, n=14),
    "host_memory_gib": _noisy(2, 0.1, idle=1, n=14),
    "tokens_per_s": _noisy(812, 30, idle=0, n=14),
}
"""Fourteen seconds on a machine without GPUs."""
