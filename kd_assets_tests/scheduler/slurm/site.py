"""A deployment on a fake cluster: schedulers as several processes have them, over one folder of jobs and one clock."""

from __future__ import annotations

from pathlib import Path

from kd_assets.scheduler import Profile, SlurmScheduler, Submission, TaskState
from kd_assets.scheduler.job import Poll
from kd_assets.scheduler.slurm.commands.runners import CommandRunner
from kd_assets_tests.scheduler.jobs import KEY, job_spec, write_job_file
from kd_assets_tests.scheduler.slurm.fake_cluster import Clock, FakeCluster

GRACE_S = 60.0
POLL_S = 1.0


class Site:
    """One cluster as one deployment uses it."""

    def __init__(
        self, folder: Path, *, accounting: bool = True, max_array_size: int = 1001, concurrency: int | None = None
    ) -> None:
        self.clock = Clock()
        self.cluster = FakeCluster(self.clock, accounting=accounting, max_array_size=max_array_size)
        self.jobs_folder = folder / "jobs"
        folder.mkdir(exist_ok=True)
        self.script = folder / "task.sbatch"
        self.script.write_text("#!/bin/bash\n")
        self._concurrency = concurrency
        self.scheduler = self.process()

    def process(self, runner: CommandRunner | None = None) -> SlurmScheduler:
        """A scheduler that has seen nothing yet, as another process has it."""
        return SlurmScheduler(
            self.jobs_folder,
            profile=Profile(name="site", poll_interval_s=POLL_S, absence_grace_s=GRACE_S),
            script=self.script,
            python="/usr/bin/python3",
            runner=runner or self.cluster,
            clock=self.clock,
            sleep=self.clock.sleep,
        )

    def submit(self, n_tasks: int = 1, key: str = KEY, scheduler: SlurmScheduler | None = None) -> Submission:
        with self.scheduler.deciding("demo", "teacher"):
            return (scheduler or self.scheduler).submit(
                job_spec(n_tasks, concurrency=self._concurrency, key=key), write_job_file
            )

    def look(self, submission: Submission, *, after_s: float = POLL_S, scheduler: SlurmScheduler | None = None) -> Poll:
        """A poll after some time."""
        self.clock.now += after_s
        return (scheduler or self.scheduler).poll([submission])

    def states(
        self, submission: Submission, *, after_s: float = POLL_S, scheduler: SlurmScheduler | None = None
    ) -> list[TaskState]:
        """The states of all tasks after some time, from a cluster that answers."""
        poll = self.look(submission, after_s=after_s, scheduler=scheduler)
        assert poll.unreachable is None, poll.unreachable
        return list(poll.states[submission].values())

    def state(
        self, submission: Submission, *, after_s: float = POLL_S, scheduler: SlurmScheduler | None = None
    ) -> TaskState:
        """Of the first task."""
        return self.states(submission, after_s=after_s, scheduler=scheduler)[0]
