"""Whether the scheduler has asked this task to stop. Standard library only."""

from __future__ import annotations

import signal
import time
from types import FrameType

_LONGEST_SLEEP_S = 0.2


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

    def sleep(self, seconds: float) -> None:
        """Sleep, but not into a request to stop: a signal's handler does not end `time.sleep` (PEP 475)."""
        deadline = time.monotonic() + seconds
        while not self and (left := deadline - time.monotonic()) > 0:
            time.sleep(min(left, _LONGEST_SLEEP_S))

    def __bool__(self) -> bool:
        return self._signal_name is not None
