"""The results that one kind of work of a run wants: which are open, in whose hands they are, what became of them.

The rule it keeps: each wanted result is recorded once or given up once. Knows no dagster.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from kd_assets.contract import Output, WorkUnit
from kd_assets.errors import NO_ANSWER, StoreError
from kd_assets.orchestration.driving.callbacks import CommittedResult
from kd_assets.orchestration.driving.following import FollowedJob
from kd_assets.orchestration.driving.progress import Progress
from kd_assets.orchestration.driving.waiting import Storage
from kd_assets.orchestration.planning.planned_work import PlannedWork, damaged_in_words
from kd_assets.orchestration.retries import FailureClass
from kd_assets.scheduler import Submission
from kd_assets.store import committed


@dataclass(frozen=True, kw_only=True, slots=True)
class FailedResult:
    """A result that is not there, and will not be by anything this run does."""

    partition_key: str
    asset: str
    failure: FailureClass
    cause: str
    log_file: Path | None = None
    log_tail: str = ""
    """Its last lines when the task had ended."""


class Look(enum.Enum):
    """What a look at a wanted result came to."""

    RECORDED = "it is there, and recorded"
    MISSING = "it is not there"
    UNREACHABLE = "nobody can tell: its files cannot be reached"
    GIVEN_UP = "what is there is damaged, or could not be reached for too long"


class Results:
    """Wanted results by the folder that each lies in (`path`)."""

    def __init__(
        self, work: PlannedWork, record: Callable[[CommittedResult], None], storage: Storage, progress: Progress
    ) -> None:
        self._record, self._storage, self._progress = record, storage, progress
        self._open: dict[str, tuple[WorkUnit, Output]] = {o.path: (u, o) for u in work.units for o in u.outputs}
        self._hands: dict[str, tuple[Submission, int]] = {}
        """Open result → the job that is to make it, and the task."""
        self._of_task: dict[tuple[Submission, int], dict[str, None]] = {}
        """The same the other way round; the inner dict is an ordered set."""
        self._n_of_job: Counter[Submission] = Counter()
        self.failed: list[FailedResult] = []

    # ------------------------------------------------------------------ which are open

    def is_open(self, path: str) -> bool:
        return path in self._open

    def are_open(self) -> bool:
        """Whether any is."""
        return bool(self._open)

    def partition_of(self, path: str) -> str:
        return self._open[path][0].partition_key

    # ------------------------------------------------------------------ in whose hands

    def take_up(self, path: str, submission: Submission, task: int) -> None:
        """A task is to make this result."""
        self.let_go(path)
        self._hands[path] = (submission, task)
        self._of_task.setdefault((submission, task), {})[path] = None
        self._n_of_job[submission] += 1

    def let_go(self, path: str) -> None:
        """Nobody makes it any more."""
        if (hands := self._hands.pop(path, None)) is not None:
            del self._of_task[hands][path]
            self._n_of_job[hands[0]] -= 1

    def is_in_hand(self, path: str) -> bool:
        return path in self._hands

    def of_task(self, submission: Submission, task: int) -> list[str]:
        """The open results that a task is to make."""
        return list(self._of_task.get((submission, task), ()))

    def has_open(self, submission: Submission) -> bool:
        """Whether a job is to make any that is open."""
        return self._n_of_job[submission] > 0

    # ------------------------------------------------------------------ what became of them

    def look(self, path: str, job: FollowedJob | None = None, task: int | None = None) -> Look:
        """Record an open result if it is there, as made by a task of a followed job or by nobody of this run."""
        if not self._storage.is_due(path):
            return Look.UNREACHABLE
        unit, output = self._open[path]
        try:
            manifest = committed(Path(path), output.fingerprint)
            if manifest is not None:
                self._record(CommittedResult(unit=unit, output=output, manifest=manifest, job=job, task=task))
        except NO_ANSWER as e:
            if not self._storage.failed(path, e):
                return Look.UNREACHABLE
            self.give_up(path, FailureClass.WORK, str(e))
            return Look.GIVEN_UP
        except StoreError as e:
            self.give_up(path, FailureClass.WORK, damaged_in_words(output, e))
            return Look.GIVEN_UP
        self._storage.reached(path)
        if manifest is None:
            return Look.MISSING
        self._close(path, is_made=True)
        return Look.RECORDED

    def give_up(
        self, path: str, failure: FailureClass, cause: str, *, log_file: Path | None = None, log_tail: str = ""
    ) -> None:
        unit, output = self._open[path]
        self.failed.append(
            FailedResult(
                partition_key=unit.partition_key,
                asset=output.asset,
                failure=failure,
                cause=cause,
                log_file=log_file,
                log_tail=log_tail,
            )
        )
        self._close(path, is_made=False)

    def give_up_all(self, paths: Iterable[str], failure: FailureClass, cause: str) -> None:
        for path in paths:
            self.give_up(path, failure, cause)

    def _close(self, path: str, *, is_made: bool) -> None:
        unit, output = self._open.pop(path)
        self._progress.on_closed(unit, output, is_made=is_made)
        self.let_go(path)
        self._storage.forget(path)
