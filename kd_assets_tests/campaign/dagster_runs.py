"""Whole runs of Dagster over a home, in this process, whose jobs run at once and in a child of it.

The scheduler is a fake, and says so: it has the worker's program run in a forked child, with a teacher that remembers,
where the local one starts three programs that import for seconds. Planning, submitting, following, recording and
checking are the product's own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from kd_assets.contract import JobFile, Reporter
from kd_assets.orchestration.assets import recipe_definitions
from kd_assets.orchestration.platform import BATCH_SCRIPT, Platform
from kd_assets.scheduler import JobSpec, LocalScheduler, Profile, Scheduler, Submission
from kd_assets.scheduler.local.supervisor import task_environment
from kd_assets.worker.main import main as worker
from kd_assets.worker.stop_flag import StopFlag
from kd_assets.worker.task import Runner, RunnerFactory, runner_for
from kd_assets_tests.campaign.children import fork, wait
from kd_assets_tests.campaign.production import ASSETS, KEYS, Home, RememberingTeacher
from kd_assets_tests.orchestration.deployment import Deployment, failure_text

TASK_S = 150.0
"""How long a task may take; less than a run may."""


def remembering(remembered: Mapping[str, Path], computed: Path | None) -> RunnerFactory:
    """Runners as the worker makes them, but for the teacher."""

    def make_runner(job: JobFile, report: Reporter, stop: StopFlag) -> Runner:
        if job.kind != "teacher":
            return runner_for(job, report, stop)
        return RememberingTeacher(job, report, stop, remembered=remembered, computed=computed)

    return make_runner


class InlineScheduler(LocalScheduler):
    """Tasks have run when a job is submitted."""

    def __init__(self, home: Home, make_runner: RunnerFactory) -> None:
        super().__init__(home.folder / "jobs", script=BATCH_SCRIPT)
        self._make_runner = make_runner

    def _start(self, spec: JobSpec, submission: Submission, lock: int) -> None:
        states = {}
        submission.process_group_file.write_text(str(os.getpid()))
        for index in range(spec.n_tasks):
            child = fork(lambda index=index: self._task(spec, submission, index), log=submission.local_log(index))  # type: ignore[misc]
            status = wait(child, TASK_S)
            assert status is not None, f"task {index} of {submission.folder} goes on after {TASK_S:g} s"
            states[str(index)] = {"phase": "ended", "exit_code": os.waitstatus_to_exitcode(status), "restarts": 0}
        submission.state_file.write_text(json.dumps(states))

    def _task(self, spec: JobSpec, submission: Submission, index: int) -> None:
        environment = task_environment(
            job_id=os.getpid(),
            name=spec.name,
            task_index=index,
            n_tasks=spec.n_tasks,
            restarts=0,
            node="here",
            cpus=1,
            folder=submission.folder,
        )
        raise SystemExit(
            worker(["worker", str(submission.job_file)], {**os.environ, **environment}, make_runner=self._make_runner)
        )


class CampaignDeployment(Deployment):
    """The recipe of a home, on a Dagster instance in memory."""

    def __init__(self, home: Home, instance: dg.DagsterInstance, scheduler: Scheduler) -> None:
        class WithScheduler(Platform):
            def make_scheduler(self, *, submits: bool = True, profile: Profile | None = None) -> Scheduler:
                return scheduler

        self.home, self.instance, self.recipe = home.folder, instance, home.recipe
        self.platform = WithScheduler(home=str(home.folder))
        self.definitions = dg.Definitions.merge(
            recipe_definitions(self.recipe),
            dg.Definitions(resources={"kd_assets_platform": self.platform}, executor=dg.in_process_executor),
        )


@contextmanager
def inline_deployment(home: Home, make_runner: RunnerFactory) -> Iterator[CampaignDeployment]:
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(str(home.recipe.partitions.name), list(KEYS))
        yield CampaignDeployment(home, instance, InlineScheduler(home, make_runner))


def materialize_all(deployment: CampaignDeployment) -> dg.ExecuteInProcessResult:
    return deployment.run(*ASSETS, partition_range=(KEYS[0], KEYS[-1]))


def failure_of(result: dg.ExecuteInProcessResult) -> tuple[str, bool]:
    """What a failed run says, and whether it is an answer to a user: a `dg.Failure` is, a traceback of ours is not."""
    steps = [event.step_failure_data for event in result.all_events if event.is_step_failure]
    answers = [step.user_failure_data is not None for step in steps]
    return failure_text(result), bool(answers) and all(answers)


def recorded(deployment: CampaignDeployment, run_id: str) -> set[tuple[str, str]]:
    """(asset, partition) that a run recorded."""
    return {(asset, str(key)) for asset, key in deployment.materializations(run_id)}
