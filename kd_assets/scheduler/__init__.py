"""Jobs: what is submitted, what a scheduler answers about it, and how work is spread over its tasks.

May be imported by the control plane; imports the standard library, `kd_assets.contract` and `kd_assets.durable` only.
The invariant of every scheduler here: a job is named by a submission key made from the work itself, equal work finds
the live job instead of starting another, and nothing a scheduler says ever proves success; only a committed result
does.
"""

from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import (
    AccountedAttempt,
    Ending,
    JobSpec,
    Poll,
    Resources,
    Scheduler,
    TaskPhase,
    TaskState,
    submission_key,
)
from kd_assets.scheduler.local.scheduler import LocalScheduler
from kd_assets.scheduler.slurm.profile import Profile
from kd_assets.scheduler.slurm.scheduler import SlurmScheduler
from kd_assets.scheduler.spread import spread

__all__ = [
    "AccountedAttempt",
    "Ending",
    "JobSpec",
    "LocalScheduler",
    "Poll",
    "Profile",
    "Resources",
    "Scheduler",
    "SlurmScheduler",
    "Submission",
    "TaskPhase",
    "TaskState",
    "spread",
    "submission_key",
]
