"""Jobs whose run was killed, and runs whose process was: found by what they no longer hold locked, and settled."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import dagster as dg
import pytest
from dagster._core.events import DagsterEvent
from dagster._core.execution.plan.objects import StepSuccessData

from kd_assets.orchestration.assets import caches_schedule, orphan_sensor
from kd_assets.orchestration.orphans import QUIET_S, alive, is_gone, orphaned_jobs, runs_without_process, settle_orphans
from kd_assets.orchestration.platform import Platform
from kd_assets.scheduler import Profile, Scheduler
from kd_assets.scheduler.submissions import followers
from kd_assets_tests.orchestration.command_line import CommandLine, group_of
from kd_assets_tests.orchestration.deployment import CACHES, SHARDS, Deployment


class Killed:
    """A run over all partitions whose process was killed while its teacher job (now stopped) was at work."""

    def __init__(self, command_line: CommandLine) -> None:
        everything = ("--partition-range", f"{SHARDS[0]}...{SHARDS[2]}")
        assert command_line.run("shards_manifest", partition=everything)[0] == 0
        self.deployment = command_line.deployment
        process = command_line.start(*CACHES, partition=everything)
        self.scheduler, self.submission = command_line.wait_for_task("teacher")
        self.group = group_of(self.submission)
        os.killpg(self.group, signal.SIGSTOP)
        process.kill()
        process.wait()
        (self.run_id,) = followers(self.submission)

    @property
    def jobs_folder(self) -> Path:
        return self.deployment.platform.jobs_folder

    def settle(self) -> list[dg.RunRequest | dg.SkipReason]:
        return list(settle_orphans(self.deployment.instance, self.deployment.recipe, self.scheduler, self.jobs_folder))


@pytest.fixture
def killed(command_line: CommandLine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Killed]:
    monkeypatch.setattr("kd_assets.orchestration.orphans.SETTLING_S", 0.0)
    made = Killed(command_line)
    yield made
    os.killpg(made.group, signal.SIGCONT) if made.scheduler.is_live(made.submission) else None
    made.scheduler.cancel([made.submission])


def test_a_job_whose_run_was_killed_gets_a_run_that_records_it(killed: Killed) -> None:
    killed.settle()
    requests = killed.settle()  # the tick that marks a run leaves its job to the run that Dagster starts again
    assert killed.deployment.instance.get_run_by_id(killed.run_id).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]
    (request,) = requests
    assert isinstance(request, dg.RunRequest)
    assert {key.path[-1] for key in request.asset_selection or ()} == set(CACHES)
    assert (request.tags["dagster/asset_partition_range_start"], request.tags["dagster/asset_partition_range_end"]) == (
        SHARDS[0],
        SHARDS[2],
    )
    os.killpg(killed.group, signal.SIGCONT)
    result = killed.deployment.run(*CACHES, tags=dict(request.tags))
    assert result.success
    assert killed.deployment.n_teacher_loads() == 1
    assert len(killed.deployment.materializations(result.run_id)) == len(SHARDS) * len(CACHES)


def test_the_same_orphan_is_asked_for_under_the_same_key_until_another_run_has_followed_it(killed: Killed) -> None:
    killed.settle()
    first, second = killed.settle(), killed.settle()
    assert isinstance(first[0], dg.RunRequest)
    assert isinstance(second[0], dg.RunRequest)
    assert first[0].run_key == second[0].run_key
    (killed.submission.folder / "followers" / "another").touch()
    third = killed.settle()
    assert isinstance(third[0], dg.RunRequest)
    assert third[0].run_key != first[0].run_key


def test_a_job_whose_run_was_terminated_is_cancelled(killed: Killed) -> None:
    run = killed.deployment.instance.get_run_by_id(killed.run_id)
    assert run is not None
    killed.deployment.instance.report_run_canceled(run)
    os.killpg(killed.group, signal.SIGCONT)
    (reason,) = killed.settle()
    assert isinstance(reason, dg.SkipReason)
    assert "cancelling local job" in str(reason.skip_message)
    deadline = time.monotonic() + 300
    while killed.scheduler.is_live(killed.submission):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_tick_does_not_wait_for_a_job_that_does_not_end_and_the_next_one_asks_again(killed: Killed) -> None:
    """Its processes are stopped, so that TERM does nothing to them."""
    run = killed.deployment.instance.get_run_by_id(killed.run_id)
    assert run is not None
    killed.deployment.instance.report_run_canceled(run)
    for _ in range(2):
        (reason,) = killed.settle()
        assert "cancelling local job" in str(reason.skip_message)  # type: ignore[union-attr]
        assert killed.scheduler.is_live(killed.submission)
    os.utime(killed.submission.folder / "cancelled", (0, 0))  # asked long ago
    killed.settle()
    deadline = time.monotonic() + 300
    while killed.scheduler.is_live(killed.submission):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_sensor_writes_no_secrets(deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[bool] = []
    make_scheduler = Platform.make_scheduler

    def remember(self: Platform, *, submits: bool = True, profile: Profile | None = None) -> Scheduler:
        made.append(submits)
        return make_scheduler(self, submits=submits, profile=profile)

    monkeypatch.setattr(Platform, "make_scheduler", remember)
    sensor = orphan_sensor(deployment.recipe)
    context = dg.build_sensor_context(
        instance=deployment.instance, resources={"kd_assets_platform": deployment.platform}
    )
    (reason,) = cast(Iterator[dg.SkipReason], sensor(context))
    assert "every live job of tiny has its run" in str(reason.skip_message)
    assert made == [False]


def test_a_job_that_a_living_run_follows_is_no_orphan(deployment: Deployment, tmp_path: Path) -> None:
    scheduler = deployment.platform.make_scheduler()
    assert list(orphaned_jobs(deployment.instance, deployment.recipe, scheduler)) == []
    (reason,) = settle_orphans(deployment.instance, deployment.recipe, scheduler, deployment.platform.jobs_folder)
    assert isinstance(reason, dg.SkipReason)
    assert "every live job of tiny has its run" in str(reason.skip_message)


def test_a_run_is_gone_when_its_process_was_killed_and_not_when_it_ended(tmp_path: Path) -> None:
    with alive(tmp_path, "run-1"):
        assert not is_gone(tmp_path, "run-1")
    assert not is_gone(tmp_path, "run-1"), "it ended by itself"
    (tmp_path / ".runs" / "run-2").touch()
    assert is_gone(tmp_path, "run-2")
    assert not is_gone(tmp_path, "never-heard-of")


def started_run(deployment: Deployment, *steps: dg.DagsterEventType) -> dg.DagsterRun:
    """A run of the recipe that Dagster holds for started, with these events of steps, all now."""
    recipe = deployment.recipe
    run = deployment.instance.create_run_for_job(
        deployment.definitions.resolve_job_def(f"{recipe.name}_caches"), status=dg.DagsterRunStatus.STARTED
    )
    deployment.instance.report_engine_event("begun", run)
    for step in steps:
        data = StepSuccessData(1.0) if step is dg.DagsterEventType.STEP_SUCCESS else None  # type: ignore[no-untyped-call]
        event = DagsterEvent(step.value, job_name=run.job_name, step_key="caches", event_specific_data=data)
        deployment.instance.report_dagster_event(event, run.run_id)
    return run


def gone_after(deployment: Deployment, seconds: float) -> list[str]:
    found = runs_without_process(
        deployment.instance, deployment.recipe, deployment.platform.jobs_folder, clock=lambda: time.time() + seconds
    )
    return [run.run_id for run in found]


def test_a_run_whose_process_was_killed_before_or_after_our_code_is_gone_after_a_while(deployment: Deployment) -> None:
    before = started_run(deployment)
    after = started_run(deployment, dg.DagsterEventType.STEP_START, dg.DagsterEventType.STEP_SUCCESS)
    started_run(deployment, dg.DagsterEventType.STEP_START)
    assert gone_after(deployment, QUIET_S - 60) == []
    assert set(gone_after(deployment, QUIET_S + 60)) == {before.run_id, after.run_id}


def test_a_run_of_others_is_left_alone(deployment: Deployment) -> None:
    run = deployment.instance.create_run_for_job(
        deployment.definitions.resolve_job_def(f"{deployment.recipe.name}_plan"), status=dg.DagsterRunStatus.STARTED
    )
    deployment.instance.report_engine_event("begun", run)
    assert gone_after(deployment, QUIET_S + 60) == []
    folder = deployment.platform.jobs_folder / ".runs"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / run.run_id).touch()
    assert gone_after(deployment, 0) == [run.run_id], "unless its process was in our code"


def test_the_sensor_is_on_by_default(deployment: Deployment) -> None:
    assert orphan_sensor(deployment.recipe).default_status is dg.DefaultSensorStatus.RUNNING


def test_the_nightly_schedule_does_not_wait_for_a_run_without_a_process(deployment: Deployment) -> None:
    deployment.plan()
    run = started_run(deployment, dg.DagsterEventType.STEP_START)
    deployment.instance.add_run_tags(
        run.run_id, {"dagster/asset_partition_range_start": SHARDS[0], "dagster/asset_partition_range_end": SHARDS[-1]}
    )
    schedule = caches_schedule(deployment.recipe)

    def asked_for() -> list[type]:
        context = dg.build_schedule_context(
            instance=deployment.instance, resources={"kd_assets_platform": deployment.platform}
        )
        return [type(request) for request in cast(Iterator[object], schedule(context))]

    with alive(deployment.platform.jobs_folder, run.run_id):
        assert asked_for() == [dg.SkipReason]
    (deployment.platform.jobs_folder / ".runs" / run.run_id).touch()
    assert asked_for() == [dg.RunRequest]
    assert deployment.instance.get_run_by_id(run.run_id).status is dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]


def test_a_job_whose_partitions_a_live_run_holds_gets_no_other_run(killed: Killed) -> None:
    killed.settle()
    tags = {"dagster/asset_partition_range_start": SHARDS[0], "dagster/asset_partition_range_end": SHARDS[2]}
    again = started_run(killed.deployment, dg.DagsterEventType.STEP_START)
    killed.deployment.instance.add_run_tags(again.run_id, tags)
    (reason,) = killed.settle()
    assert isinstance(reason, dg.SkipReason)
