"""A thread that takes work off its producer's hands, in the order it was put.

Used by `kd_assets.teacher` only. The invariants: an error in the thread reaches the producer, as the exception it was,
at the next `put`, at `flush` or at the end; and no order of events can hang either side. The thread goes on taking from
the queue after it failed, and drops what it takes, so that a producer that waits for room always gets it.
"""

from __future__ import annotations

import queue
import threading
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Generic, Self, TypeVar

from kd_assets.errors import InterruptedTaskError

Item = TypeVar("Item")


class BackgroundQueue(ABC, Generic[Item]):
    """A context manager: leaving it waits until everything that was put is done.

    Leaving because of an exception still does what was put, so that a restart need not do it again. The thread's error
    then gives way to that exception, unless it was only a request to stop.
    """

    def __init__(self, *, name: str, size: int) -> None:
        """`size`: how many items may wait while one is being done."""
        self._queue: queue.Queue[Item | None] = queue.Queue(maxsize=size)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    @abstractmethod
    def do(self, item: Item) -> None:
        """In the thread: what an item is put for."""

    def drop(self, item: Item) -> None:
        """In the thread: what has to be done all the same with an item that comes after an error."""

    def put(self, item: Item) -> None:
        """Have the item done after all before it; waits while the queue is full. Raises the thread's error."""
        self.raise_error()
        self._queue.put(item)

    def flush(self) -> None:
        """Wait until everything that was put is done and let go. Raises the thread's error."""
        self._queue.join()
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what the thread ran into, if it did."""
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if e is None or isinstance(e, InterruptedTaskError):
            self.raise_error()

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self.do(item)
                else:
                    self.drop(item)
            except BaseException as e:  # noqa: BLE001 - whatever it is, it belongs to the producer
                self._error = self._error or e
            del item  # before waiting for the next one: it may hold memory of a device
            self._queue.task_done()
