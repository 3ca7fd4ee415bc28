"""One question to squeue for all jobs and all processes of a deployment.

The file that shares it only saves questions: where it cannot be locked, read or written, squeue is asked all the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from kd_assets.durable import atomic_write, prepare_folder
from kd_assets.errors import StorageUnavailableError
from kd_assets.locks import locked
from kd_assets.scheduler.slurm.commands.client import Slurm
from kd_assets.scheduler.slurm.commands.parsing import QueueRow, parse_queue
from kd_assets.scheduler.slurm.records import Array


@dataclass(frozen=True, kw_only=True, slots=True)
class Queue:
    """One answer of squeue."""

    at: float
    """When it was asked for."""
    rows: Mapping[str, Mapping[int | None, QueueRow]]
    """Name of an array → array index → row."""

    def find(self, array: Array, task: int) -> QueueRow | None:
        """The row of a task; that without an index stands for all cancelled ones that have none of their own."""
        rows = self.rows.get(array.name, {})
        return rows.get(task - array.first_task) or rows.get(None)


class SharedQueue:
    """squeue's answer, in a file that all runs of the deployment read: one query an interval for all their jobs."""

    def __init__(self, folder: Path, name: str, slurm: Slurm, clock: Callable[[], float]) -> None:
        """`name`: of the cluster, as far as this deployment tells clusters apart."""
        self._folder, self._slurm, self._clock = folder, slurm, clock
        self._file, self._lock = folder / f"{name}.json", folder / f"{name}.lock"

    def ask(self, *, max_age_s: float) -> Queue:
        """An answer of at most this age. Raises SchedulerUnreachableError, or SchedulerMisusedError."""
        with self._one_asks():
            answer = self._shared_answer(max_age_s)
            if answer is None:
                at = self._clock()
                answer = at, self._slurm.queue_texts()
                self._share(*answer)
        at, texts = answer
        rows: dict[str, dict[int | None, QueueRow]] = {}
        for row in parse_queue(*texts):
            rows.setdefault(array_name(row), {})[row.index] = row
        return Queue(at=at, rows=rows)

    @contextmanager
    def _one_asks(self) -> Iterator[None]:
        """Whoever else wants to know waits for the answer, where the file system has locks."""
        with ExitStack() as held:
            with suppress(StorageUnavailableError):
                prepare_folder(self._folder)
                held.enter_context(locked(self._lock))
            yield

    def _shared_answer(self, max_age_s: float) -> tuple[float, list[str]] | None:
        try:
            asked = json.loads(self._file.read_bytes())
            at, texts = float(asked["at"]), [str(text) for text in asked["texts"]]
        except (OSError, ValueError, LookupError, TypeError):  # there is none, or it is damaged
            return None
        # A clock that was set back must not make an answer last for ever.
        return (at, texts) if 0 <= self._clock() - at < max_age_s else None

    def _share(self, at: float, texts: list[str]) -> None:
        with suppress(StorageUnavailableError):
            atomic_write(self._file, json.dumps({"at": at, "texts": texts}).encode())


def array_name(row: QueueRow) -> str:
    """The name of the array that a row is of. Its comment has it, too, in case that somebody renamed the job."""
    match = re.fullmatch(r"kd_assets [0-9a-f]{32} (\S+)", row.comment)
    return match[1] if match else row.name
