"""How a task tells the control plane what it does: one JSON line an event, to its event file and to stdout.

Used by the worker and by the kinds it runs; standard library only. Every line is one `write` to a file opened for
appending, so two attempts of a task that overlap cannot tear each other's lines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TextIO

from kd_assets.contract import Event, EventType


class Reporter:
    """Appends events of one attempt of one task. Safe to call from several threads."""

    def __init__(
        self,
        path: Path | None,
        *,
        task: int = 0,
        attempt: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._task, self._attempt, self._clock = task, attempt, clock
        self._stream = sys.stdout if stream is None else stream
        self.say_last: Callable[[Exception], None] = lambda e: None
        """Set by the task: reports that all it has not finished failed with this error, and that it is over. For a
        thread that has to end the process because the main thread is stuck."""
        self._lock = threading.Lock()
        self._fd: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
            self._end_half_written_line()

    def _end_half_written_line(self) -> None:
        """An attempt killed inside a write leaves half a line; ours must not be glued to it."""
        assert self._fd is not None
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            os.write(self._fd, b"\n")

    def emit(self, event_type: EventType, **data: Any) -> None:
        """Append one event. Times are seconds since the epoch; `data` must be JSON."""
        line = Event(type=event_type, time=self._clock(), task=self._task, attempt=self._attempt, data=data).to_line()
        with self._lock:
            try:
                if self._fd is not None:
                    os.write(self._fd, line.encode())
                self._stream.write(line)
                self._stream.flush()
            except OSError as e:  # events inform: a full disk must not stop the work they tell of
                self._complain(e)

    def _complain(self, e: OSError) -> None:
        with contextlib.suppress(OSError):
            print(f"an event could not be written: {e}", file=sys.stderr, flush=True)

    def close(self) -> None:
        with self._lock:
            if self._fd is not None:
                os.close(self._fd)
                self._fd = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class StopFlag:
    """Becomes true when the scheduler asks the task to stop (USR1 before the time limit, TERM on cancel)."""

    def __init__(self) -> None:
        self._signal_name: str | None = None

    def listen(self) -> StopFlag:
        """Install the signal handlers. Main thread only."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signal_name = signal.Signals(number).name

    @property
    def signal_name(self) -> str | None:
        """The signal that asked for the stop; None while nothing did."""
        return self._signal_name

    def __bool__(self) -> bool:
        return self._signal_name is not None
