"""What a check of `kd-assets doctor` has found: one line each, and a finding that is no `ok` names what to do."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from kd_assets.errors import KdAssetsError


class Status(enum.Enum):
    OK = "ok"
    WARN = "warn"
    """It works, or could not be looked at."""
    FAIL = "FAIL"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    status: Status
    what: str
    found: str
    fix: str = ""

    def __str__(self) -> str:
        """One line."""
        fix = f" → {self.fix}" if self.fix else ""
        return " ".join(f"{self.status.value:<4} {self.what}: {self.found}{fix}".split("\n"))


def ok(what: str, found: str) -> Finding:
    return Finding(status=Status.OK, what=what, found=found)


def warn(what: str, found: str, fix: str = "") -> Finding:
    return Finding(status=Status.WARN, what=what, found=found, fix=fix)


def fail(what: str, found: str, fix: str = "") -> Finding:
    return Finding(status=Status.FAIL, what=what, found=found, fix=fix)


def safely(what: str, check: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """The findings of a check; an error of ours is a finding, and says itself what to do."""
    try:
        yield from check()
    except (KdAssetsError, OSError) as e:
        yield fail(what, str(e))
