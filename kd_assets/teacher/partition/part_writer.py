"""Encoding and writing parts in a thread of its own, so that the device never waits for the disk.

Used by `kd_assets.teacher` only. The invariant: an error of the disk reaches the producer, as the exception it was, at
the next `put` or at the end; and no order of events can hang either side. The thread goes on taking parts from the
queue after it failed (and drops them), so that a producer that waits for room always gets it.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import pyarrow as pa

from kd_assets.contract import Asset
from kd_assets.errors import InterruptedTaskError
from kd_assets.store import ResultWriter, part_stats
from kd_assets.teacher.partition.budgets import BUDGET_STAT

QUEUED_PARTS = 2
"""Parts that wait while one is written. Each holds its arrays: 2 GB for 131,072 tokens of one block of 8,192 states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartToWrite:
    """One part of one cache, not yet encoded."""

    result: ResultWriter
    asset: Asset
    index: int
    n_tokens: int
    token_budget: int
    """What its batches were planned with; kept with the part (see `budgets`)."""
    encode: Callable[[], pa.Table]


class PartWriter:
    """Writes parts in the order they are put. A context manager: leaving it waits until all are on disk.

    Leaving because of an exception still writes what was put, so that a restart need not make it again. A writer's
    error then gives way to that exception, unless it was only a request to stop.
    """

    def __init__(self, *, queued_parts: int = QUEUED_PARTS) -> None:
        self._queue: queue.Queue[PartToWrite | None] = queue.Queue(maxsize=queued_parts)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="part-writer", daemon=True)

    def __enter__(self) -> PartWriter:
        self._thread.start()
        return self

    def put(self, part: PartToWrite) -> None:
        """Queue a part; waits while the queue is full. Raises what the thread ran into, if it did."""
        self._raise_error()
        self._queue.put(part)

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if e is None or isinstance(e, InterruptedTaskError):
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (part := self._queue.get()) is not None:
            if self._error is None:
                try:
                    _write(part)
                except BaseException as e:  # noqa: BLE001 - whatever it is, it belongs to the producer
                    self._error = e


def _write(part: PartToWrite) -> None:
    table = part.encode()
    stats = part_stats(part.asset, table) | {BUDGET_STAT: float(part.token_budget)}
    part.result.write_part(part.index, table, n_tokens=part.n_tokens, stats=stats)
