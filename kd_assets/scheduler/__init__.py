"""Jobs: what is submitted, what a scheduler answers about it, and how work is spread over its tasks.

May be imported by the control plane; imports the standard library and `kd_assets.contract` only. The invariant of every
scheduler here: a job is named by a submission key made from the work itself, equal work finds the live job instead of
starting another, and nothing a scheduler says ever proves success; only a committed result does.
"""

from kd_assets.scheduler.job import JobSpec, Submission, TaskPhase, TaskState, submission_key, task_environment
from kd_assets.scheduler.local import LocalScheduler
from kd_assets.scheduler.spread import spread

__all__ = [
    "JobSpec",
    "LocalScheduler",
    "Submission",
    "TaskPhase",
    "TaskState",
    "spread",
    "submission_key",
    "task_environment",
]
