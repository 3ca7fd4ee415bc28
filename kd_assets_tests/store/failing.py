"""A file system that fails for a while. A fake: no real one does that on demand.

It stands before the calls by which Python and pyarrow reach the file system, for paths at or below one folder.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from kd_assets import durable

CALLS = ((os, "stat"), (os, "scandir"), (os, "open"), (io, "open"), (pa, "OSFile"), (pa, "memory_map"))
FOR_EVER = 10**9


class FailingStorage:
    """Counts the calls for paths at or below `folder`, and fails some of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder = folder
        self._number, self._failing = 0, range(0)
        self.n_calls = 0
        monkeypatch.setattr(durable, "READ_WAITS_S", (0.0, 0.0, 0.0))
        for owner, name in CALLS:
            monkeypatch.setattr(owner, name, self._before(getattr(owner, name)))

    def fail(self, number: int, *, first: int = 0, n_failures: int = FOR_EVER) -> None:
        """From now on let `first` calls through, and fail the next ones with this error number."""
        self._number, self._failing, self.n_calls = number, range(first, first + n_failures), 0

    def recover(self) -> None:
        self._failing, self.n_calls = range(0), 0

    def _before(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(path: Any = ".", *arguments: Any, **named: Any) -> Any:
            if isinstance(path, (str, bytes, os.PathLike)) and Path(os.fsdecode(path)).is_relative_to(self._folder):
                self.n_calls += 1
                if self.n_calls - 1 in self._failing:
                    raise OSError(self._number, os.strerror(self._number), str(path))
            return call(path, *arguments, **named)

        return asked
