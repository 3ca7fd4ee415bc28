"""One start of a task: where it runs, the lease that keeps a second copy away, whether earlier starts made progress.

Two copies of a task can live at once: a submission whose answer was lost and that was made again, or a node that lost
its slurmd, whose processes run on while SLURM starts the task elsewhere. No result would be damaged (each has a lease
of its own, see `kd_assets.store`), but a teacher would be loaded twice. So a task has a lease, too, beside its events:
a copy from another submission leaves, a later attempt of the same one waits and takes over.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kd_assets.contract import Reporter, parse_event
from kd_assets.durable import prepare_folder
from kd_assets.errors import (
    ContractError,
    InterruptedTaskError,
    NoProgressError,
    ResultBusyError,
    StorageUnavailableError,
)
from kd_assets.locks import Lease
from kd_assets.worker.stop_flag import StopFlag

LEASE_POLL_S = 1.0
"""How often an earlier attempt is looked at again."""
MAX_STARTS_WITHOUT_PROGRESS = 5
"""Starts in a row that added nothing to a task's results, after which it is not tried again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attempt:
    """Where this process runs and as what. Outside SLURM what SLURM would say is None."""

    host: str
    pid: int
    process_index: int
    """Which of the processes that share the task, from 0."""
    n_processes: int
    slurm_job_id: str | None
    """Of this array task alone; kept when it is requeued."""
    slurm_array_job_id: str | None
    slurm_array_task_id: str | None
    slurm_restart_count: int
    slurm_nodelist: str | None
    slurm_partition: str | None
    slurm_cluster: str | None

    @staticmethod
    def of(environment: Mapping[str, str]) -> Attempt:
        """Raises ContractError where the environment does not say a number."""
        attempt = Attempt(
            host=socket.gethostname(),
            pid=os.getpid(),
            process_index=_number(environment, "KD_PROCESS_INDEX", 0),
            n_processes=_number(environment, "KD_N_PROCESSES", 1),
            slurm_job_id=environment.get("SLURM_JOB_ID"),
            slurm_array_job_id=environment.get("SLURM_ARRAY_JOB_ID"),
            slurm_array_task_id=environment.get("SLURM_ARRAY_TASK_ID"),
            slurm_restart_count=_number(environment, "SLURM_RESTART_COUNT", 0),
            slurm_nodelist=environment.get("SLURM_JOB_NODELIST"),
            slurm_partition=environment.get("SLURM_JOB_PARTITION"),
            slurm_cluster=environment.get("SLURM_CLUSTER_NAME"),
        )
        if not 0 <= attempt.process_index < attempt.n_processes:
            raise ContractError(
                f"KD_PROCESS_INDEX is {attempt.process_index} of {attempt.n_processes} processes, expected 0 to n - 1"
            )
        return attempt

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class DuplicateTaskError(Exception):
    """Another submission's process is at this task. Not an error of the work, and never leaves the worker."""

    def __init__(self, holder: Mapping[str, Any]) -> None:
        super().__init__(f"SLURM job {holder.get('slurm_job_id')} is at this task {_whereabouts(holder)}")
        self.holder = holder


def hold_task(path: Path, attempt: Attempt, *, report: Reporter, stop: StopFlag) -> Lease | None:
    """The lease of the task, held until this process ends; waits for an earlier attempt of the same SLURM job.

    Raises DuplicateTaskError when another job's process has it, InterruptedTaskError when asked to stop meanwhile.
    None, with a warning, where the disk gives no leases: the results' own leases then have to do.
    """
    lease, waits = Lease(path), False
    while True:
        try:
            try:
                prepare_folder(path.parent)
                lease.acquire(attempt.facts())
                return lease
            except ResultBusyError:
                # None: it was locked a moment ago, or its holder's words have not come over the network yet.
                holder = lease.holder()
        except StorageUnavailableError as e:
            report.emit("warning", message=f"whether another copy of this task runs cannot be told: {e}")
            return None
        if holder is not None:
            if holder.get("slurm_job_id") is None or holder["slurm_job_id"] != attempt.slurm_job_id:
                raise DuplicateTaskError(holder)
            if not waits:
                waits = True
                report.emit(
                    "warning",
                    message=f"waits for an earlier attempt that still runs {_whereabouts(holder)}",
                    holder=holder,
                )
        stop.sleep(LEASE_POLL_S)
        if stop:
            raise InterruptedTaskError(f"stopped by {stop.signal_name} while it waited for an earlier attempt")


@dataclass(frozen=True, kw_only=True, slots=True)
class EarlierStart:
    """One start of a task before this one, as its event file tells it."""

    n_parts_on_disk: int | None
    """When it began."""
    host: str
    load_s: float | None = None
    """None where it loaded nothing, or did not come so far."""
    ran_s: float | None = None
    """None where it did not say that it ended."""
    signal: str | None = None
    """That asked it to end."""


_TOLD_OF_STARTS = (b'"task_started"', b'"teacher_loaded"', b'"task_finished"')


def starts_of(path: Path) -> list[EarlierStart]:
    """The starts in a task's event file, oldest first. As far as it can be read: events inform."""
    found: list[EarlierStart] = []
    with contextlib.suppress(OSError), path.open("rb") as file:
        for line in file:  # a file of days has 100,000 lines of progress: only those in question are parsed
            if not any(word in line for word in _TOLD_OF_STARTS):
                continue
            try:
                event = parse_event(line.decode("utf-8", "replace"))
            except ContractError:  # half a line of a killed attempt
                continue
            data = event.data
            if event.type == "task_started":
                found.append(EarlierStart(n_parts_on_disk=data.get("n_parts_on_disk"), host=str(data.get("host"))))
            elif event.type == "teacher_loaded" and found:
                found[-1] = replace(found[-1], load_s=data.get("load_s"))
            elif event.type == "task_finished" and found and data.get("status") != "duplicate":
                found[-1] = replace(found[-1], ran_s=data.get("wall_s"), signal=data.get("signal"))
    return found


def no_progress(
    starts: Sequence[EarlierStart], n_parts_on_disk: int | None, environment: Mapping[str, str] = os.environ
) -> NoProgressError | None:
    """Why this start is one too many, given the earlier ones; None when it is not.

    `n_parts_on_disk` is None where the file system did not let us count: starts that all could not are a loop, too.
    """
    last = starts[-MAX_STARTS_WITHOUT_PROGRESS:]
    if len(last) < MAX_STARTS_WITHOUT_PROGRESS or any(s.n_parts_on_disk != n_parts_on_disk for s in last):
        return None
    n = 0
    for start in reversed(starts):
        if start.n_parts_on_disk != n_parts_on_disk:
            break
        n += 1
    hosts = ", ".join(sorted({s.host for s in last}))
    return NoProgressError(
        f"this task was started {n} times (last on {hosts}) and no start added a file to its results, which "
        f"have {n_parts_on_disk}: it is not tried again. {_why_no_progress(last, environment)}"
    )


def _why_no_progress(starts: Sequence[EarlierStart], environment: Mapping[str, str]) -> str:
    """Where the time limit ended all of them: the times, and what to do. Else where to look."""
    times = [s.ran_s for s in starts if s.signal == "SIGUSR1" and s.ran_s is not None]
    if len(times) < len(starts):
        return "Its log says how each start ended: look for what kills it; then materialize again"
    loads = [s.load_s for s in starts if s.load_s is not None]
    words = f"Each was told by the time limit to stop, the longest after {max(times):.0f} s"
    if loads:
        words += f", of which loading took {max(loads):.0f} s, so a part takes more than the other "
        words += f"{max(0.0, max(times) - max(loads)):.0f} s"
    else:
        words += ", so loading and one part take more than that"
    limit, warning = environment.get("KD_TIME_LIMIT_S"), environment.get("KD_SIGNAL_S")
    if limit and warning:
        words += f". The time limit is {limit} s, and a task is told {warning} s before"
    return f"{words}. Give the job more `time` (or the profile a smaller `signal_s`), and materialize again"


def gpus_of_process(visible: str | None, process_index: int, n_processes: int, *, n_gpus: int) -> str | None:
    """What CUDA_VISIBLE_DEVICES must be for one of several processes; `visible` is what it is for the whole task.

    Each gets an equal, contiguous share (neighbours are the best connected); where there are fewer GPUs than processes,
    one that others have, too. Where `visible` is None the node's `n_gpus` are dealt out; None where there are none.
    """
    gpus = [str(i) for i in range(n_gpus)] if visible is None else [g for g in visible.split(",") if g.strip()]
    if not gpus:
        return visible
    share = len(gpus) // n_processes
    return (
        ",".join(gpus[process_index * share : (process_index + 1) * share])
        if share
        else gpus[process_index % len(gpus)]
    )


def _whereabouts(holder: Mapping[str, Any]) -> str:
    node = holder.get("slurm_nodelist") or holder.get("host")
    return f"on {node} (process {holder.get('pid')}, restart {holder.get('slurm_restart_count')})"


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ContractError(f"{name} is {text!r} in the environment, expected a number")
    return int(text)
