"""Results on their way from the device to the window they belong to, in a thread, while the next batch runs.

Used by `kd_assets.teacher` only. The producer launches a step and submits its result. On a CUDA device the result is
copied to pinned memory by a stream of its own, which waits for the step and keeps nothing else waiting; the collector's
thread waits for the copy, and only then calls what the result was submitted with. On a CPU it is the same path without
the copy.

The invariants: things are done in the order they were submitted. An error in the thread reaches the producer, as the
exception it was, at the next `submit` or at the end, and no order of events can hang either side: the thread goes on
taking from the queue after it failed, and drops what it takes. A result's memory on the device is kept until its copy
is complete, whatever happens.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import TracebackType

import torch
from torch import Tensor

from kd_assets.errors import InterruptedTaskError
from kd_assets.teacher.batch.engine import StepResult

QUEUED_RESULTS = 2
"""Results that wait while one is put in its place. Each holds its arrays, on the device until they are copied."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Copy:
    """A result on its way."""

    result: StepResult
    """In host memory; complete once `wait` has returned."""
    wait: Callable[[], object]


StartCopy = Callable[[StepResult], Copy]
"""Starts to copy a result of the current stream, and returns without waiting for it."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Item:
    wait: Callable[[], object]
    work: Callable[[], None]
    source: StepResult | None = None
    """What is copied from, kept until it has arrived."""


class Collector:
    """Takes results off a device. A context manager: leaving it waits until everything submitted is done.

    Leaving because of an exception still does what was submitted, so that whole windows reach the disk. The thread's
    error then gives way to that exception, unless it was only a request to stop.
    """

    def __init__(self, start_copy: StartCopy, *, queued_results: int = QUEUED_RESULTS) -> None:
        self._start_copy = start_copy
        self._queue: queue.Queue[_Item | None] = queue.Queue(maxsize=queued_results)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._collect, name="collector", daemon=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def submit(self, result: StepResult, keep: Callable[[StepResult], None]) -> None:
        """Have `keep` called with the result in host memory; waits while the queue is full. Raises the thread's error.

        To be called on the stream that the result is computed on.
        """
        self._raise_error()
        copy = self._start_copy(result)
        self._queue.put(_Item(wait=copy.wait, work=partial(keep, copy.result), source=result))

    def then(self, work: Callable[[], None]) -> None:
        """Have `work` called after everything that was submitted before. Raises the thread's error."""
        self._raise_error()
        self._queue.put(_Item(wait=_nothing, work=work))

    def flush(self) -> None:
        """Wait until everything submitted is done and its memory is free. Raises the thread's error."""
        self._queue.join()
        self._raise_error()

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self._queue.put(None)
        self._thread.join()
        if e is None or isinstance(e, InterruptedTaskError):
            self._raise_error()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def _collect(self) -> None:
        while (item := self._queue.get()) is not None:
            try:
                item.wait()
                if self._error is None:
                    item.work()
            except BaseException as e:  # noqa: BLE001 - whatever it is, it belongs to the producer
                self._error = self._error or e
            del item  # before waiting for the next one: it holds memory of the device
            self._queue.task_done()


def copier(device: torch.device) -> StartCopy:
    """How results of this device come to host memory: on CUDA by a stream of their own, on a CPU they are there."""
    if device.type != "cuda":
        return lambda result: Copy(result=result, wait=_nothing)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(result: StepResult) -> Copy:
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            on_host = result.moved(pinned_copy)
            arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # the thread sleeps meanwhile
            arrived.record(stream)
        return Copy(result=on_host, wait=arrived.synchronize)

    return start


def pinned_copy(tensor: Tensor) -> Tensor:
    """A copy of a CUDA tensor in pinned memory, complete once the current stream has come this far.

    torch keeps pinned memory for reuse, and gives it out again only when the copy is complete.
    """
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def _nothing() -> None:
    pass
