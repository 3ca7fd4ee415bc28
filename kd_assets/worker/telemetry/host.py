"""What this process, its children and the node's processors use: CPU time, resident memory, energy.

Used by `kd_assets.worker.telemetry.sampler`, whose thread asks once a second. Standard library, and psutil where it is
installed (accelerate brings it along): without it, children that still run are not counted, and how much memory is in
use is not known. The invariant: nothing here raises or waits; what cannot be read is None.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.worker.usage import cpu_s

POWERCAP = Path("/sys/class/powercap")
SHARE_OF_A_PROCESSOR = 0.01
"""Most that looking for children may take: psutil reads an entry of /proc for every process of the node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostReading:
    """One moment; None is not known."""

    cpu_s: float
    """Of this process, its children and theirs: only differences mean anything."""
    memory_gib: float | None = None
    """Resident memory of all of them; pages that they share count for each."""
    package_joules: float | None = None
    """Of all processors of the *node*, whoever uses them, since the reader was made."""


class HostReader:
    """Reads this process and its node."""

    def __init__(self, *, powercap: Path = POWERCAP) -> None:
        self._psutil = _import_psutil()
        self._process = None if self._psutil is None else self._psutil.Process()
        self._packages = PackageEnergy(powercap)
        self._children: list[Any] = []
        self._look_again_s = 0.0

    def read(self) -> HostReading:
        used_s, memory_bytes = cpu_s(), 0
        if self._process is not None:
            self._find_children(self._process)
            for process in (self._process, *self._children):
                try:
                    memory_bytes += process.memory_info().rss
                    if process is not self._process:
                        used_s += sum(process.cpu_times()[:4])  # user, system, and those of its own ended children
                except (self._psutil.Error, OSError):  # it has ended, and its time counts as its parent's
                    continue
        return HostReading(
            cpu_s=used_s,
            memory_gib=memory_bytes / 2**30 if memory_bytes else None,
            package_joules=self._packages.joules(),
        )

    def _find_children(self, process: Any) -> None:
        started_s = time.monotonic()
        if started_s < self._look_again_s:
            return
        try:
            self._children = process.children(recursive=True)
        except (self._psutil.Error, OSError):
            self._children = []
        took_s = time.monotonic() - started_s
        self._look_again_s = started_s + took_s / SHARE_OF_A_PROCESSOR


class PackageEnergy:
    """The energy counters of the node's processor packages (RAPL, by Linux's powercap).

    A package's own domain includes its cores and graphics, which have domains below it; `psys`, where there is one,
    includes the packages. So only packages are added up. Most kernels let only root read the counters (since
    CVE-2020-8694). Ask more often than a counter goes round: about 262 kJ, many minutes.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._counters = [_Counter(domain) for domain in sorted(powercap.glob("intel-rapl:*")) if _is_package(domain)]
        self._joules: float | None = 0.0 if self._counters else None

    def joules(self) -> float | None:
        """Used by all packages since this was made; None for good once one of them cannot be told."""
        if self._joules is not None:
            used = [counter.used_since_last_asked() for counter in self._counters]
            self._joules = None if None in used else self._joules + sum(u for u in used if u is not None)
        return self._joules


class _Counter:
    """One package's `energy_uj`, which begins anew at `max_energy_range_uj`."""

    def __init__(self, domain: Path) -> None:
        self._file = domain / "energy_uj"
        self._range = _number(domain / "max_energy_range_uj")
        self._before = _number(self._file)

    def used_since_last_asked(self) -> float | None:
        """In joules."""
        now, before = _number(self._file), self._before
        self._before = now
        if now is None or before is None:
            return None
        if now < before:
            if self._range is None:
                return None
            now += self._range
        return (now - before) / 1e6


def _is_package(domain: Path) -> bool:
    """Named `package-0` or `package-0-die-1`; AMD's, too."""
    try:
        return (domain / "name").read_text().startswith("package")
    except (OSError, ValueError):
        return False


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _import_psutil() -> Any:
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return None
    return psutil
