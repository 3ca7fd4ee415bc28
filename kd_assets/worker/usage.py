"""What a process used of its node: time, processors, memory. Standard library only.

Used by the worker and by telemetry. Figures are of this process and of those children that it has waited for.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any


def max_rss_gib() -> float:
    """The largest resident set so far, of this process or of one of its children."""
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return max(resource.getrusage(w).ru_maxrss for w in who) * unit / 2**30


def n_cpus(environment: Mapping[str, str] = os.environ, *, n_processes: int = 1) -> int:
    """This process's share of the processors that the task was given.

    The smaller of what it may run on and what SLURM gave, which differ where SLURM does not bind tasks.
    """
    n = len(os.sched_getaffinity(0))
    given = environment.get("SLURM_CPUS_ON_NODE", "")
    if given.isdecimal() and int(given) > 0:
        n = min(n, int(given))
    return max(1, n // n_processes)


def cpu_s() -> float:
    """Processor time used so far, by this process and by its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


class UsageMeter:
    """Time and processor time since it was made."""

    def __init__(self, *, n_cpus: int) -> None:
        self._n_cpus = n_cpus
        self._started_s, self._cpu_started_s = time.monotonic(), cpu_s()

    def usage(self) -> dict[str, Any]:
        """`wall_s`, `cpu_s`, `n_cpus`, `cpu_efficiency` (cpu_s / (wall_s x n_cpus)), and `max_rss_gib` since the
        process began."""
        wall_s, used_s = time.monotonic() - self._started_s, cpu_s() - self._cpu_started_s
        return {
            "wall_s": round(wall_s, 3),
            "cpu_s": round(used_s, 3),
            "n_cpus": self._n_cpus,
            "cpu_efficiency": round(used_s / max(wall_s * self._n_cpus, 1e-9), 4),
            "max_rss_gib": round(max_rss_gib(), 3),
        }
