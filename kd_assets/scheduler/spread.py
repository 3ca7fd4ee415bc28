"""Spreading a job's partitions over its array tasks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def spread(sizes: Sequence[int], n_tasks: int) -> tuple[tuple[int, ...], ...]:
    """Indexes of `sizes` for each task, balanced by total size (longest processing time first: Graham 1969, whose
    largest task is at most 4/3 of the best possible).

    At most `n_tasks` tasks, never an empty one; each task's indexes ascend. Equal input gives equal output.
    """
    if n_tasks < 1:
        raise ValueError(f"a job needs at least one task, not {n_tasks}")
    loads: list[tuple[int, int]] = [(0, task) for task in range(min(n_tasks, len(sizes)))]
    tasks: list[list[int]] = [[] for _ in loads]
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        load, task = heapq.heappop(loads)
        tasks[task].append(index)
        # A unit of unknown size (0) still counts, so that such units are dealt out evenly.
        heapq.heappush(loads, (load + max(sizes[index], 1), task))
    return tuple(sorted((tuple(sorted(t)) for t in tasks), key=lambda t: t[0]))
