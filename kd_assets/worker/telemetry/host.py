"""What this process and its children use: CPU time and resident memory.

Used by `kd_assets.worker.telemetry.sampler`, whose thread asks once a second. Standard library, and psutil where it is
installed (accelerate brings it along): without it, children that still run are not counted, and how much memory is in
use is not known. The invariant: nothing here raises or waits; what cannot be read is None.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from kd_assets.worker.usage import cpu_s

SHARE_OF_A_PROCESSOR = 0.01
"""Most that looking for children may take: psutil reads an entry of /proc for every process of the node."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HostReading:
    """One moment; None is not known."""

    cpu_s: float
    """Of this process, its children and theirs: only differences mean anything."""
    memory_gib: float | None = None
    """Resident memory of all of them; pages that they share count for each."""


class HostReader:
    """Reads this process and its children."""

    def __init__(self) -> None:
        self._psutil = _import_psutil()
        self._process = None if self._psutil is None else self._psutil.Process()
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
        return HostReading(cpu_s=used_s, memory_gib=memory_bytes / 2**30 if memory_bytes else None)

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


def _import_psutil() -> Any:
    try:
        import psutil  # type: ignore[import-untyped]
    except ImportError:
        return None
    return psutil
