"""A job to submit, for tests of schedulers: what its workers are told does not matter."""

from __future__ import annotations

from kd_assets.contract import JobFile
from kd_assets.scheduler import JobSpec, Resources, Submission

KEY = "0123456789abcdef" * 2


def job_spec(
    n_tasks: int = 1, *, concurrency: int | None = None, key: str = KEY, resources: Resources | None = None
) -> JobSpec:
    """`concurrency`: all tasks, if left out."""
    return JobSpec(
        key=key,
        recipe="demo",
        kind="teacher",
        n_tasks=n_tasks,
        concurrency=concurrency or n_tasks,
        resources=resources or Resources(),
    )


def write_job_file(submission: Submission) -> None:
    job = JobFile(
        kind="teacher",
        recipe="demo",
        key=KEY,
        recipe_folder="/store/demo",
        events_folder=str(submission.events_folder),
        tasks=(),
        units=(),
    )
    submission.job_file.write_text(job.to_json())
