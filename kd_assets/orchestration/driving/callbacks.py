"""What driving asks of the run it works for. Dagster is behind it in a run, lists are in a test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kd_assets.contract import Output, WorkUnit
from kd_assets.orchestration.driving.waiting import Log
from kd_assets.orchestration.retries import FailureClass
from kd_assets.store import Manifest

if TYPE_CHECKING:
    from kd_assets.orchestration.driving.following import FollowedJob


@dataclass(frozen=True, kw_only=True, slots=True)
class CommittedResult:
    """A wanted result that is there, with the job and the task that made it; None where no job of this run did."""

    unit: WorkUnit
    output: Output
    manifest: Manifest
    job: FollowedJob | None = None
    task: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Callbacks:
    """What driving asks of the run it works for."""

    run_id: str
    log: Log
    record: Callable[[CommittedResult], None]
    """Called once for each result that is there."""
    flush: Callable[[], None]
    """Called after each look, so that what `record` has collected is written."""
    observe: Callable[[FollowedJob, Counter[FailureClass]], None]
    """Called for each followed job at the end, with why partitions were left without a result by its tasks."""
    is_terminated: Callable[[], bool]
    """Whether an interrupt of this process means the run, and so its jobs."""
    is_canceled: Callable[[], bool] = lambda: False
    """Whether the run is cancelled already, of which no interrupt may have reached this process."""
    interrupts: tuple[type[BaseException], ...] = (KeyboardInterrupt,)
    """How an interrupt shows, first as it is raised here. Any other end of this process leaves its jobs running, to be
    found again."""
    raise_lost_interrupt: Callable[[], None] = lambda: None
    """Called in each look: raises an interrupt that has come and was not seen."""
