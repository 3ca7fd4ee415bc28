"""What Dagster is told of a job: a few facts beside each result it made, and one table of its tasks at its end.

Queue waits and usage come from what tasks say of themselves, so they are there without accounting; where the site keeps
accounts, its figures stand beside them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from kd_assets.orchestration.driving.following import FollowedJob
from kd_assets.orchestration.retries import FailureClass
from kd_assets.recipes.recipe import Recipe
from kd_assets.scheduler import AccountedAttempt, Scheduler

USAGE = ("cpu_efficiency", "max_rss_gib", "gpu_utilisation_percent", "gpu_memory_gib", "joules")


def task_facts(scheduler: Scheduler, job: FollowedJob, task: int) -> dict[str, Any]:
    """Which task made a result, where, and what that has cost so far: JSON, for a materialization's metadata."""
    report, state = job.reports[task], job.state(task)
    facts: dict[str, Any] = {
        "job_id": state.task_id or report.task_id,
        "job_folder": str(job.submission.folder),
        "log": str(scheduler.log_file(job.submission, task)),
        "node": state.node or report.node,
        "restarts": max(report.attempt, 0),
        "queue_wait_s": queue_wait_s(scheduler, job, task),
        **{f"task_{name}": report.usage.get(name) for name in USAGE},
    }
    return {name: value for name, value in facts.items() if value not in ("", None)}


def queue_wait_s(scheduler: Scheduler, job: FollowedJob, task: int) -> float | None:
    """From submission to the first start of a task; None before it started."""
    started = job.reports[task].started_at
    return round(max(0.0, started[0] - scheduler.submitted_at(job.submission)), 1) if started else None


def job_observation(
    recipe: Recipe, scheduler: Scheduler, job: FollowedJob, failures: Mapping[FailureClass, int]
) -> dg.AssetObservation:
    """One line a task: where it ran, how long it waited and ran, what it used, how often and why it was interrupted.

    `failures`: how many partitions it left without a result, and why.
    """
    accounts = scheduler.accounting(job.submission)
    rows = [_row(scheduler, job, task, accounts.get(task, ())) for task in job.reports]
    interruptions = Counter(why for task in job.reports for why in job.interruptions(task))
    asset = next(o.asset for _, _, o in job.outputs())
    return dg.AssetObservation(
        recipe.key(asset),
        description=f"{job.job.kind} job: {scheduler.describe(job.submission)}",
        metadata={
            "job": scheduler.describe(job.submission),
            "tasks": _table(rows),
            "interruptions": failures_in_words(interruptions) or "none",
            "failures": failures_in_words(failures) or "none",
            "nodes_at_fault": ", ".join(f"{node} × {n}" for node, n in sorted(job.faulty_nodes.items())) or "none",
            "job_folder": dg.MetadataValue.path(str(job.submission.folder)),
            "logs": dg.MetadataValue.path(str(job.submission.log_folder)),
        },
    )


def failures_in_words(failures: Mapping[FailureClass, int]) -> str:
    """`node failure × 1, preempted × 2`."""
    return ", ".join(f"{failure.value} × {n}" for failure, n in sorted(failures.items(), key=lambda f: f[0].value))


def _row(
    scheduler: Scheduler, job: FollowedJob, task: int, attempts: tuple[AccountedAttempt, ...] | Any
) -> dict[str, str | int | float]:
    report, state = job.reports[task], job.state(task)
    usage = report.usage
    row: dict[str, str | int | float | None] = {
        "task": task,
        "job_id": state.task_id or report.task_id,
        "partitions": len(job.job.tasks[task]),
        "node": state.node or report.node,
        "ended": report.last_word or state.reason,
        "exit_code": state.exit_code,
        "restarts": max(report.attempt, 0),
        "interruptions": failures_in_words(Counter(job.interruptions(task))),
        "queue_wait_s": queue_wait_s(scheduler, job, task),
        "wall_s": usage.get("wall_s"),
        **{name: usage.get(name) for name in USAGE},
    }
    if attempts:
        last = attempts[-1]
        cpu_time_s = last.elapsed_s * last.n_cpus
        row |= {
            "accounting": " → ".join(a.state for a in attempts),
            "elapsed_s": sum(a.elapsed_s for a in attempts),
            "accounted_cpu_efficiency": round(last.cpu_s / cpu_time_s, 3) if cpu_time_s else None,
            "accounted_max_rss_gib": None if last.max_rss_gib is None else round(last.max_rss_gib, 3),
        }
    return {name: value for name, value in row.items() if value is not None}


def _table(rows: Sequence[Mapping[str, str | int | float]]) -> dg.TableMetadataValue:
    """Dagster wants the same columns in every row, and accounting may know some tasks and not yet others."""
    columns = dict.fromkeys(name for row in rows for name in row)
    return dg.MetadataValue.table([dg.TableRecord({name: row.get(name, "") for name in columns}) for row in rows])
