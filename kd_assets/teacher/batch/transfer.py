"""Results on their way from the device to the window they belong to, in a thread, while the next batch runs.

Used by `kd_assets.teacher` only. The producer launches a step and submits its result. On a CUDA device the result is
copied to pinned memory by a stream of its own, which waits for the step and keeps nothing else waiting; the collector's
thread waits for the copy, and only then calls what the result was submitted with. On a CPU it is the same path without
the copy.

The invariant, beside those of `background_queue`: a result's memory on the device is kept until its copy is complete,
whatever happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from kd_assets.teacher.background_queue import BackgroundQueue
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


class Collector(BackgroundQueue[_Item]):
    """Takes results off a device."""

    def __init__(self, start_copy: StartCopy, *, queued_results: int = QUEUED_RESULTS) -> None:
        super().__init__(name="collector", size=queued_results)
        self._start_copy = start_copy

    def submit(self, result: StepResult, keep: Callable[[StepResult], None]) -> None:
        """Have `keep` called with the result in host memory; waits while the queue is full. Raises the thread's error.

        To be called on the stream that the result is computed on.
        """
        self.raise_error()
        copy = self._start_copy(result)
        self.put(_Item(wait=copy.wait, work=partial(keep, copy.result), source=result))

    def then(self, work: Callable[[], None]) -> None:
        """Have `work` called after everything that was submitted before. Raises the thread's error."""
        self.put(_Item(wait=_nothing, work=work))

    def do(self, item: _Item) -> None:
        item.wait()
        item.work()

    def drop(self, item: _Item) -> None:
        item.wait()


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
