"""Files that others append to, read as they grow: the event files of a job's tasks, and what tasks print.

Costs follow the tasks that have begun and are not over: a directory listing tells which have begun.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from kd_assets.contract import Event, event_file, read_events
from kd_assets.orchestration.driving.waiting import Storage
from kd_assets.scheduler import Submission

LOG_TAIL_LINES = 12
LOG_LINES_A_LOOK = 20
"""Of one task's log that are passed on at once; the file has them all."""
LOG_BYTES_A_LOOK = 65536
LOG_LINE_CHARACTERS = 500
EVENT_LINE = b'{"v":'
"""How the events in a log begin: a task writes them there, too, and they are read from its event file."""


class EventTail:
    """The events of all tasks of a submission, each once, however often it is asked."""

    def __init__(self, submission: Submission, n_tasks: int, n_processes: int = 1) -> None:
        """`n_processes` of a task, each with an event file of its own."""
        self._folder, self._n_processes = submission.events_folder, n_processes
        self._not_seen = {name: task for task in range(n_tasks) for name in self._names(task)}
        """Name of each event file that was not there at the last look → its task."""
        self._offsets: dict[int, dict[Path, int]] = {}
        """Task that has begun and is not finished with → how far each of its files was read."""

    def new_events(self, storage: Storage | None = None) -> Iterator[Event | str]:
        """Events since the last call, file by file. A line that is no event comes as its text.

        What cannot be reached is passed over and left to `storage`; without one it is an OSError.
        """
        self._look_for_files(storage)
        for offsets in list(self._offsets.values()):
            for path in list(offsets):
                if storage is not None and not storage.is_due(path):
                    continue
                try:
                    for offset, event in read_events(path, offsets[path]):
                        offsets[path] = offset
                        yield event
                except OSError as e:
                    if storage is None:
                        raise
                    storage.failed(path, e)
                else:
                    if storage is not None:
                        storage.reached(path)

    def finish(self, task: int) -> None:
        """Read no more of a task, and look for no more files of it."""
        self._offsets.pop(task, None)
        for name in self._names(task):
            self._not_seen.pop(name, None)

    def _names(self, task: int) -> list[str]:
        return [event_file(self._folder, task, index).name for index in range(self._n_processes)]

    def _look_for_files(self, storage: Storage | None) -> None:
        if not self._not_seen or not (storage is None or storage.is_due(self._folder)):
            return
        try:
            names = os.listdir(self._folder)
        except FileNotFoundError:  # of a job that is about to begin, or that somebody took away
            names = []
        except OSError as e:
            if storage is None:
                raise
            storage.failed(self._folder, e)
            return
        if storage is not None:
            storage.reached(self._folder)
        for name in sorted(self._not_seen.keys() & set(names)):
            self._offsets.setdefault(self._not_seen.pop(name), {})[self._folder / name] = 0


@dataclass(slots=True)
class LogTail:
    """What tasks print beside their events, each line once."""

    _offsets: dict[Path, int] = field(default_factory=dict)

    def new_lines(self, path: Path) -> list[str]:
        """Complete lines since the last call, without events; of many the last LOG_LINES_A_LOOK, and a word on how
        many were left out."""
        try:
            with path.open("rb") as f:
                size = f.seek(0, 2)
                start = self._offsets.get(path, 0)
                first = max(start, size - LOG_BYTES_A_LOOK)
                f.seek(first)
                whole, newline, _ = f.read(size - first).rpartition(b"\n")
        except OSError:  # logs inform
            return []
        if not newline:
            return []
        self._offsets[path] = first + len(whole) + 1
        found = [line for line in whole.split(b"\n") if not line.startswith(EVENT_LINE)]
        lines = [text for line in found if (text := _printable(line))]
        n_left_out = len(lines) - LOG_LINES_A_LOOK
        if n_left_out > 0 or first > start:
            lines = ["… (more in the log)", *lines[-LOG_LINES_A_LOOK:]]
        return lines


def _printable(line: bytes) -> str:
    """What a terminal would show of a line in the end: a progress bar overwrites itself after each carriage return."""
    text = line.decode("utf-8", "replace").rstrip("\r").rpartition("\r")[2].rstrip()
    return "".join(c for c in text if c.isprintable() or c == "\t")[:LOG_LINE_CHARACTERS]


def log_tail(path: Path, n_lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of a task's log that are not event lines; empty when there is no log."""
    try:
        with path.open("rb") as f:
            size = f.seek(0, 2)
            f.seek(max(0, size - LOG_BYTES_A_LOOK))
            lines = f.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    return "\n".join([line for line in lines if not line.startswith(EVENT_LINE.decode())][-n_lines:])
