"""Trying again what does not answer: after which waits, and for how long. Knows no dagster."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

LONGEST_BACKOFF_S = 120.0
"""Between two questions to a scheduler that does not answer."""
FIRST_STORAGE_WAIT_S, LONGEST_STORAGE_WAIT_S = 1.0, 60.0
"""Between two looks at a file that could not be reached."""
STORAGE_PATIENCE_S = 600.0
"""How long a file may be out of reach (a server that fails over, a full disk) before that is a result's failure."""


class Log(Protocol):
    """The run's log, for people."""

    def info(self, message: str, /) -> None: ...

    def warning(self, message: str, /) -> None: ...

    def error(self, message: str, /) -> None: ...


@dataclass(slots=True)
class Waits:
    """When to try again: after waits that double with each failure, and never in step with others who try."""

    first_s: float
    longest_s: float
    n_failures: int = 0
    failing_since: float | None = None
    next_at: float = float("-inf")

    def is_due(self, now: float) -> bool:
        return now >= self.next_at

    def failed(self, now: float) -> None:
        if self.failing_since is None:
            self.failing_since = now
        wait_s = min(self.first_s * 2.0 ** min(self.n_failures, 20), self.longest_s)
        self.n_failures += 1
        self.next_at = now + wait_s * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, no secret

    def failing_for_s(self, now: float) -> float:
        return 0.0 if self.failing_since is None else now - self.failing_since


def scheduler_waits(poll_interval_s: float) -> Waits:
    """Between questions to a scheduler that does not answer."""
    return Waits(first_s=2 * poll_interval_s, longest_s=LONGEST_BACKOFF_S)


def storage_waits() -> Waits:
    """Between looks at a file that could not be reached."""
    return Waits(first_s=FIRST_STORAGE_WAIT_S, longest_s=LONGEST_STORAGE_WAIT_S)


class Storage:
    """What of the shared file system cannot be reached at the moment: each thing is tried again after growing waits,
    for `patience_s`. It is logged once when it begins and once when all can be reached again."""

    def __init__(self, log: Log, clock: Callable[[], float], *, patience_s: float = STORAGE_PATIENCE_S) -> None:
        self._log, self._clock, self._patience_s = log, clock, patience_s
        self._waits: dict[Hashable, Waits] = {}

    def is_due(self, what: Hashable) -> bool:
        """Whether to try it now; always, unless it failed a moment ago."""
        waits = self._waits.get(what)
        return waits is None or waits.is_due(self._clock())

    def failed(self, what: Hashable, error: Exception) -> bool:
        """Note that it could not be reached; returns whether it has been so for longer than anybody waits."""
        if not self._waits:
            self._log.warning(
                f"a file cannot be reached ({error}); nothing follows from it, and it is tried again for "
                f"{self._patience_s / 60:g} minutes"
            )
        waits = self._waits.setdefault(what, storage_waits())
        waits.failed(self._clock())
        return waits.failing_for_s(self._clock()) >= self._patience_s

    def reached(self, what: Hashable) -> None:
        """Note that it was reached."""
        if self._waits.pop(what, None) is not None and not self._waits:
            self._log.info("all files can be reached again")

    def forget(self, what: Hashable) -> None:
        """Nobody asks for it any more."""
        self._waits.pop(what, None)
