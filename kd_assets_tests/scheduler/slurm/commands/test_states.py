"""SLURM's state words. The list is squeue(1)'s and sacct(1)'s, of 22.05 and 24.11."""

from __future__ import annotations

import pytest

from kd_assets.scheduler.job import Ending
from kd_assets.scheduler.slurm.commands.states import (
    ENDED_STATES,
    LIVE_STATES,
    REQUEUEABLE,
    ending_of,
    is_bad_node,
    is_held_launch,
    is_impossible_wait,
    may_come_back,
)

MANUAL = [
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "CONFIGURING", "COMPLETING", "DEADLINE",
    "FAILED", "LAUNCH_FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PENDING", "POWER_UP_NODE",
    "PREEMPTED", "RECONFIG_FAIL", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING",
    "RESV_DEL_HOLD", "REVOKED", "RUNNING", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT",
    "STOPPED", "SUSPENDED", "TIMEOUT", "UPDATE_DB",
]  # fmt: skip


def test_every_state_is_either_live_or_ended() -> None:
    once = [*LIVE_STATES, *ENDED_STATES]
    assert sorted(MANUAL) == sorted(once)
    assert not REQUEUEABLE - set(MANUAL)


@pytest.mark.parametrize("state", MANUAL)
def test_only_ended_states_have_an_ending(state: str) -> None:
    assert (ending_of(state, "", 0) is None) == (state in LIVE_STATES)


@pytest.mark.parametrize("state", ["HIBERNATING", "", "R", "CD", "completed?"])
def test_a_word_that_nobody_knows_yet_is_live(state: str) -> None:
    assert ending_of(state, "", None) is None
    assert not may_come_back(state)


# State, reason and exit code as they were seen in squeue; where sacct says something else, as in sacct.
@pytest.mark.parametrize(
    ("state", "reason", "exit_code", "ending"),
    [
        ("COMPLETED", "", 0, Ending.EXITED),
        ("FAILED", "NonZeroExitCode", 3, Ending.EXITED),
        ("FAILED", "NonZeroExitCode", 137, Ending.EXITED),
        ("FAILED", "JobLaunchFailure", -9, Ending.KILLED),  # kill -9 of the batch script
        ("FAILED", "RaisedSignal:9(Killed)", -9, Ending.KILLED),
        ("FAILED", "", -9, Ending.KILLED),  # the same in sacct
        ("FAILED", "RaisedSignal:53(Real-time signal 19)", -53, Ending.LAUNCH_FAILURE),  # 24.11, no log
        ("FAILED", "RaisedSignal:53(Real-time signal 19)", None, Ending.LAUNCH_FAILURE),
        ("FAILED", "JobLaunchFailure", -53, Ending.LAUNCH_FAILURE),  # no folder for the log
        ("FAILED", "JobLaunchFailure", 0, Ending.LAUNCH_FAILURE),
        ("FAILED", "JobLaunchFailure", None, Ending.LAUNCH_FAILURE),
        ("FAILED", "BadConstraints", None, Ending.IMPOSSIBLE),
        ("FAILED", "TimeLimit", 0, Ending.TIME_LIMIT),
        ("FAILED", "NodeDown", 0, Ending.NODE_FAILURE),
        ("FAILED", "", -125, Ending.HOST_MEMORY),
        ("OUT_OF_MEMORY", "OutOfMemory", -125, Ending.HOST_MEMORY),
        ("TIMEOUT", "TimeLimit", 0, Ending.TIME_LIMIT),
        ("DEADLINE", "DeadLine", 0, Ending.TIME_LIMIT),
        ("CANCELLED", "", -15, Ending.CANCELLED),
        ("CANCELLED by 0", "", None, Ending.CANCELLED),
        ("CANCELLED by 1000", "launch failed requeued held", None, Ending.CANCELLED),
        ("NODE_FAIL", "NodeDown", None, Ending.NODE_FAILURE),
        ("BOOT_FAIL", "", None, Ending.NODE_FAILURE),
        ("PREEMPTED", "", None, Ending.PREEMPTED),
    ],
)
def test_why_a_job_is_over(state: str, reason: str, exit_code: int | None, ending: Ending) -> None:
    assert ending_of(state, reason, exit_code) is ending


def test_states_that_a_requeue_may_follow() -> None:
    assert may_come_back("PREEMPTED")
    assert may_come_back("NODE_FAIL")
    assert may_come_back("REQUEUED")
    assert not may_come_back("CANCELLED by 0")
    assert not may_come_back("TIMEOUT")


@pytest.mark.parametrize(
    ("reason", "held"),
    [
        ("launch failed requeued held", True),
        ("launch_failed_requeued_held", True),  # scontrol's way to write it
        ("JobHoldMaxRequeue", True),
        ("JobHeldUser", False),
        ("JobHeldAdmin", False),
        ("job requeued in held state", False),  # scontrol requeuehold: somebody meant it
        ("BeginTime", False),
        ("", False),
    ],
)
def test_a_held_launch_is_told_from_a_job_that_somebody_holds(reason: str, held: bool) -> None:
    assert is_held_launch(reason) is held


@pytest.mark.parametrize(
    ("reason", "impossible"),
    [
        ("PartitionTimeLimit", True),
        ("PartitionConfig", True),
        ("InvalidQOS", True),
        ("InvalidAccount", True),
        ("BadConstraints", True),
        ("QOSMaxWallDurationPerJobLimit", True),
        ("AssocMaxCpuPerJobLimit", True),
        ("QOSMaxCpuPerNode", True),
        ("QOSMinCpuNotSatisfied", True),
        ("PartitionNodeLimit", False),  # squeue(1): also said while nodes are down
        ("PartitionDown", False),
        ("QOSMaxJobsPerUserLimit", False),
        ("QOSMaxCpuPerUserLimit", False),
        ("QOSGrpCpuLimit", False),
        ("AssocMaxJobsLimit", False),
        ("AssocGrpCPUMinutesLimit", False),
        ("ReqNodeNotAvail, UnavailableNodes:n1", False),
        ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions", False),
        ("Resources", False),
        ("Priority", False),
        ("JobArrayTaskLimit", False),
        ("", False),
    ],
)
def test_a_wait_that_no_other_jobs_end_would_end(reason: str, impossible: bool) -> None:
    assert is_impossible_wait(reason) is impossible


@pytest.mark.parametrize(
    ("state", "bad"),
    [
        ("down", True),
        ("down*", True),
        ("idle*", True),  # does not answer
        ("drained", True),
        ("draining", True),
        ("failing", True),
        ("fail", True),
        ("error", True),
        ("idle", False),
        ("idle~", False),  # switched off to save power
        ("mixed", False),
        ("allocated", False),
        ("completing", False),
        ("maint", False),
        ("", False),
    ],
)
def test_nodes_that_no_task_should_go_back_to(state: str, bad: bool) -> None:
    assert is_bad_node(state) is bad
