"""SLURM's state words: which mean that a job lives, which that it has ended, and why.

The words are those of squeue(1) and sacct(1), 22.05 to 24.11, in their long form. Each is in exactly one table, and a
word in neither counts as live: a newer SLURM must never make us call a job ended that is not.
"""

from __future__ import annotations

import re

from kd_assets.scheduler.job import Ending

LIVE_STATES = frozenset(
    {
        "PENDING",
        "RUNNING",
        "SUSPENDED",
        "COMPLETING",  # its processes are still being collected; the final state comes next
        "CONFIGURING",
        "LAUNCH_FAILED",  # a flag beside PENDING: requeued and held
        "POWER_UP_NODE",
        "RECONFIG_FAIL",
        "REQUEUED",
        "REQUEUE_FED",
        "REQUEUE_HOLD",
        "RESIZING",
        "RESV_DEL_HOLD",
        "REVOKED",  # in a federation: it runs on another cluster
        "SIGNALING",
        "SPECIAL_EXIT",  # requeued and held with a mark
        "STAGE_OUT",
        "STOPPED",
        "UPDATE_DB",
    }
)

RUNNING_STATES = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED"}
)
"""Live states of a task that has a node."""

ENDED_STATES = {
    "BOOT_FAIL": Ending.NODE_FAILURE,
    "CANCELLED": Ending.CANCELLED,
    "COMPLETED": Ending.EXITED,
    "DEADLINE": Ending.TIME_LIMIT,
    "FAILED": Ending.EXITED,  # unless the reason or the exit code knows better: see `ending_of`
    "NODE_FAIL": Ending.NODE_FAILURE,
    "OUT_OF_MEMORY": Ending.HOST_MEMORY,
    "PREEMPTED": Ending.PREEMPTED,
    "TIMEOUT": Ending.TIME_LIMIT,
}

REQUEUEABLE = frozenset({"BOOT_FAIL", "NODE_FAIL", "PREEMPTED", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT"})
"""The last word of one attempt, not of the job: wherever it is seen, the same id may live again."""

_FAILED_BECAUSE = {
    "BadConstraints": Ending.IMPOSSIBLE,
    "InvalidAccount": Ending.IMPOSSIBLE,
    "InvalidQOS": Ending.IMPOSSIBLE,
    "NodeDown": Ending.NODE_FAILURE,
    "SystemFailure": Ending.NODE_FAILURE,
    "OutOfMemory": Ending.HOST_MEMORY,
    "TimeLimit": Ending.TIME_LIMIT,
    "DeadLine": Ending.TIME_LIMIT,
}

# Not signals of the kernel's but SLURM's marks for what happened around the script.
_FAILED_BY_SIGNAL = {
    53: Ending.LAUNCH_FAILURE,  # `0:53`, `RaisedSignal:53(Real-time signal 19)`: its log could not be opened
    125: Ending.HOST_MEMORY,  # `0:125`: the kernel killed something in its cgroup
}

_IMPOSSIBLE_WAITS = frozenset(
    {
        "BadConstraints",
        "InvalidAccount",
        "InvalidQOS",
        "PartitionConfig",  # more than its nodes have; of nodes that are down SLURM says ReqNodeNotAvail
        "PartitionTimeLimit",  # PartitionNodeLimit is not here: it may also mean that nodes are down
        "QOSNotAllowed",
    }
)

# "job requeued in held state" is not among them: `scontrol requeuehold` says it, so somebody meant to hold the job.
_HELD_LAUNCHES = ("launch failed requeued held", "JobHoldMaxRequeue")


def base_state(state: str) -> str:
    """SLURM's word alone: `CANCELLED by 0` is CANCELLED, and of flags the base state comes first."""
    words = state.split()
    return words[0].split(",")[0].rstrip("+").upper() if words else ""


def ending_of(state: str, reason: str, exit_code: int | None) -> Ending | None:
    """Why a job is over; None while it lives, or when the word is new to us.

    `exit_code` is negative for a signal. The state decides, then for FAILED SLURM's reason, then the signal.
    """
    word, cause = base_state(state), re.split("[:,]", reason)[0].strip()
    if word != "FAILED":
        return ENDED_STATES.get(word)
    if cause in _FAILED_BECAUSE:
        return _FAILED_BECAUSE[cause]
    if (raised := re.match(r"RaisedSignal:(\d+)", reason)) is not None:  # `RaisedSignal:9(Killed)`
        return _FAILED_BY_SIGNAL.get(int(raised[1]), Ending.KILLED)
    if exit_code is not None and exit_code < 0:
        # 22.05's squeue calls them JobLaunchFailure, too.
        return _FAILED_BY_SIGNAL.get(-exit_code, Ending.KILLED)
    return Ending.LAUNCH_FAILURE if cause == "JobLaunchFailure" else Ending.EXITED


def may_come_back(state: str) -> bool:
    """Whether the same id may live again after this state."""
    return base_state(state) in REQUEUEABLE


def is_impossible_wait(reason: str) -> bool:
    """Whether a pending task waits for what no end of other jobs brings.

    Where a site does not refuse such requests (EnforcePartLimits=NO, the default), they wait for ever.
    """
    cause = reason.split(",", maxsplit=1)[0].strip()
    return cause in _IMPOSSIBLE_WAITS or bool(
        re.fullmatch(r"(Assoc|QOS)M(ax|in)\w*?(Per(Job|Node)|NotSatisfied)(Limit)?", cause)
    )


def is_bad_node(state: str) -> bool:
    """Whether sinfo's word for a node says that it does not answer, or is not to be given jobs: `down*`, `drained`."""
    word = state.strip().lower()
    return word.endswith("*") or word.rstrip("~#!%$@^-+").startswith(("down", "drain", "fail", "error", "inval"))


def is_held_launch(reason: str) -> bool:
    """Whether a pending task waits for somebody to release it, since starting it failed."""
    words = reason.replace("_", " ")
    return any(text in words for text in _HELD_LAUNCHES)
