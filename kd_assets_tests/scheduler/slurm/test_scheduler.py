"""Which array a task is in, where there was more than one sbatch for it; the rest is tested on real clusters."""

from __future__ import annotations

import pytest

from kd_assets.scheduler.slurm.parsing import QueueRow
from kd_assets.scheduler.slurm.queue import Queue
from kd_assets.scheduler.slurm.records import Array
from kd_assets.scheduler.slurm.scheduler import array_of

LATE = Array(number=1, name="kd-late", first_task=0, n_tasks=2, at=0.0, refused="sbatch gave no answer", absent=True)
SECOND = Array(number=2, name="kd-second", first_task=0, n_tasks=2, at=60.0, job_id=8)


def queue(state: str | None) -> Queue:
    """The late array's first task in this state; None: it never turned up."""
    if state is None:
        return Queue(at=100.0, rows={})
    row = QueueRow(
        job_id=7,
        index=0,
        name=LATE.name,
        comment="",
        state=state,
        reason="None",
        node="n1",
        restarts=0,
        exit_code=None,
        submitted_at=None,
        started_at=None,
        ended_at=None,
    )
    return Queue(at=100.0, rows={LATE.name: {0: row}})


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "COMPLETING"])
def test_a_job_that_was_taken_for_lost_and_is_at_work_after_all_has_its_tasks(state: str) -> None:
    assert array_of(0, [LATE, SECOND], queue(state)) == LATE
    assert array_of(1, [LATE, SECOND], queue(state)) == SECOND, "of the other task it knows nothing"


@pytest.mark.parametrize("state", [None, "COMPLETED", "CANCELLED by 0"])
def test_otherwise_the_last_array_that_stands_has_them(state: str | None) -> None:
    assert array_of(0, [LATE, SECOND], queue(state)) == SECOND
    assert array_of(0, [LATE], queue(state)) is None
