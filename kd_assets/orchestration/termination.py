"""Whether an interrupt means the run, and so its jobs, or only the process: a job of 48 hours hangs on the answer.

A run that was launched (by the web UI, a schedule, a sensor, `dagster job launch`, through whichever launcher) is
terminated by Dagster, which says so in the run's status before it sends anything; any other signal is its code server,
its container or its machine going down. A run that a user started in a process of their own, by `dagster asset
materialize` for instance, has only Ctrl-C: that is SIGINT. SIGTERM is what a machine that shuts down sends.

Dagster tells its runs the two apart by this: it gives only those that are launched a `remote_job_origin`, since the
launcher has to find their code.
"""

from __future__ import annotations

import signal

import dagster as dg
import sqlalchemy as sa

ENDED_ON_PURPOSE = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


def is_terminated(run: dg.DagsterRun | None, interrupt: int | None) -> bool:
    """Whether somebody wants to end this run.

    `run` as Dagster has it now, None when it was deleted; `interrupt` is the signal that reached this process, None
    where it was none (a notebook's stop button raises KeyboardInterrupt).
    """
    if run is not None and run.status in ENDED_ON_PURPOSE:
        return True
    was_launched = run is None or run.remote_job_origin is not None
    return not was_launched and interrupt != signal.SIGTERM


def is_canceled(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether Dagster has a run for cancelled that goes on: a signal that was sent has not come, or none could be sent,
    since the run's code server is gone and its termination was forced. No answer is no.

    A run that is still being cancelled gets its signal in a moment, and one that was given up as failed may live: its
    jobs go on, as the next run's.
    """
    try:
        run = instance.get_run_by_id(run_id)
    except sa.exc.SQLAlchemyError:  # it is asked again
        return False
    return run is not None and run.status is dg.DagsterRunStatus.CANCELED
