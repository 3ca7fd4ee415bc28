"""The machine goes down in the middle of a run and comes up again, and nobody helps."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import dagster as dg
import pytest

from kd_assets.store import verify
from kd_assets_tests.orchestration.command_line import CommandLine, group_of
from kd_assets_tests.orchestration.machine import Machine, everything_is_recorded


@pytest.fixture
def machine(command_line: CommandLine) -> Iterator[Machine]:
    made = Machine(command_line)
    yield made
    made.close()


@pytest.mark.slow
def test_after_a_hard_reboot_everything_is_done_and_nobody_helped(command_line: CommandLine, machine: Machine) -> None:
    deployment = machine.deployment
    deployment.plan()
    machine.start("daemon")
    machine.launch("tiny_caches")
    _, submission = command_line.wait_for_task("teacher")
    os.killpg(group_of(submission), signal.SIGKILL)
    machine.power_off()
    assert not everything_is_recorded(deployment)
    (run,) = deployment.instance.get_runs(dg.RunsFilter(job_name="tiny_caches"))
    assert run.status is dg.DagsterRunStatus.STARTED

    machine.start("daemon")
    deadline = time.monotonic() + 240
    while not everything_is_recorded(deployment):
        assert time.monotonic() < deadline, machine.said()[-4000:]
        time.sleep(0.5)
    while deployment.instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED])):
        assert time.monotonic() < deadline, machine.said()[-4000:]
        time.sleep(0.5)
    again, first = deployment.instance.get_runs(dg.RunsFilter(job_name="tiny_caches"))
    assert (again.status, first.status) == (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE)
    assert verify(deployment.platform.recipe_folder("tiny")).problems == ()
