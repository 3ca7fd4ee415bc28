"""How far a command is, in lines on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from kd_assets.commands.base import show

EVERY_S = 2.0


class Progress:
    """A line every so often, however often there is one to be said."""

    def __init__(self, *, every_s: float = EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._every_s, self._clock = every_s, clock
        self._started = self._last = clock()

    def tell(self, words: Callable[[float], str], *, is_last: bool = False) -> None:
        """`words`: the line, of the seconds since the command began. The last line is always said."""
        now = self._clock()
        if now - self._last >= self._every_s or is_last:
            self._last = now
            show(words(now - self._started), stream=sys.stderr)
