"""The process that stands for one local job: starts its tasks, restarts those that ask, writes their states.

Run by `LocalScheduler` as `python -m kd_assets.scheduler.local.supervisor FOLDER LOCK_FD`, in a session of its own.
Standard library only. Its state file informs; the lock it inherited says whether the job lives. A full disk neither
ends it nor the tasks it looks after: what cannot be written or started is tried again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from kd_assets.durable import atomic_write
from kd_assets.errors import EXIT_RESUMABLE, StorageUnavailableError
from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import TaskPhase
from kd_assets.scheduler.submissions import read_json, read_spec, write_json

POLL_S = 0.05
AGAIN_S = 2.0
"""Until what failed for want of space or processes is tried again."""
LAST_WORDS_S = 60.0
"""How long it tries to write how its last tasks ended."""
MAX_RESTARTS = 1000
"""A task that stops on request again and again is somebody's loop, not progress."""


@dataclass(slots=True)
class _Task:
    phase: TaskPhase = TaskPhase.PENDING
    exit_code: int | None = None
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = None


class Supervisor:
    def __init__(self, folder: Path, lock_fd: int) -> None:
        self._submission = Submission(folder=folder)
        self._lock_fd = lock_fd
        start_with = read_json(self._submission.start_file)
        assert start_with is not None, "it is written before the supervisor starts"
        self._start_with: dict[str, Any] = start_with
        self._spec = read_spec(self._submission)
        self._tasks = [_Task() for _ in range(self._spec.n_tasks)]
        self._cancelled = False
        self._is_written = False
        """Whether the state file says what is known."""
        self._not_before: dict[str, float] = {}
        """What failed → when it is tried again."""

    def run(self) -> None:
        """Work through all tasks; after a TERM start none and wait for those that run."""
        signal.signal(signal.SIGTERM, self._on_term)
        # USR1 to the whole group is for the tasks. A handler and not SIG_IGN, which they would inherit.
        signal.signal(signal.SIGUSR1, lambda number, frame: None)
        self._write_states()
        while any(t.phase is not TaskPhase.ENDED for t in self._tasks):
            if self._reap() | self._start_or_give_up():
                self._is_written = False
            self._write_states()
            time.sleep(POLL_S)
        deadline = time.monotonic() + LAST_WORDS_S
        while not (self._is_written or self._cancelled) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            self._write_states()

    def _on_term(self, number: int, frame: FrameType | None) -> None:
        self._cancelled = True

    def _start_or_give_up(self) -> bool:
        changed = False
        for index, task in enumerate(self._tasks):
            if task.phase is not TaskPhase.PENDING:
                continue
            if self._cancelled:
                task.phase, changed = TaskPhase.ENDED, True
            elif sum(t.phase is TaskPhase.RUNNING for t in self._tasks) < self._spec.concurrency:
                changed |= self._try("start a task", partial(self._start, index))
        return changed

    def _start(self, index: int) -> None:
        submission, task = self._submission, self._tasks[index]
        environment = task_environment(
            job_id=os.getpgrp(),
            name=self._start_with["name"],
            task_index=index,
            n_tasks=len(self._tasks),
            restarts=task.restarts,
            node=socket.gethostname(),
            cpus=os.cpu_count() or 1,
            folder=submission.folder,
        )
        with submission.local_log(index).open("ab") as log:
            task.process = subprocess.Popen(
                ["bash", self._start_with["script"], str(submission.job_file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=submission.folder,
                env={**os.environ, **environment},
                pass_fds=(self._lock_fd,),
            )
        task.phase = TaskPhase.RUNNING

    def _reap(self) -> bool:
        changed = False
        for index, task in enumerate(self._tasks):
            if task.process is None or (exit_code := task.process.poll()) is None:
                continue
            kill_leftovers(index)
            task.process, task.exit_code, changed = None, exit_code, True
            if exit_code == EXIT_RESUMABLE and not self._cancelled and task.restarts < MAX_RESTARTS:
                task.phase, task.restarts = TaskPhase.PENDING, task.restarts + 1
            else:
                task.phase = TaskPhase.ENDED
        return changed

    def _write_states(self) -> None:
        if self._is_written:
            return
        states = {
            str(i): {"phase": t.phase.value, "exit_code": t.exit_code, "restarts": t.restarts}
            for i, t in enumerate(self._tasks)
        }
        if self._try("write the states", lambda: write_json(self._submission.state_file, states)):
            self._is_written = True

    def _try(self, doing: str, action: Callable[[], None]) -> bool:
        """Do it, unless it failed a moment ago; returns whether it was done."""
        if time.monotonic() < self._not_before.get(doing, 0.0):
            return False
        try:
            action()
        except (OSError, StorageUnavailableError) as e:
            if not self._submission.folder.exists():
                raise  # somebody took it away: there is nothing to come back to
            self._not_before[doing] = time.monotonic() + AGAIN_S
            with contextlib.suppress(OSError):  # its log may be on the same full disk
                print(f"cannot {doing}: {e}", file=sys.stderr, flush=True)
            return False
        return True


def task_environment(
    *, job_id: int, name: str, task_index: int, n_tasks: int, restarts: int, node: str, cpus: int, folder: Path
) -> dict[str, str]:
    """The variables SLURM gives an array task (sbatch(1), OUTPUT ENVIRONMENT VARIABLES)."""
    return {
        "SLURM_JOB_ID": str(job_id),
        "SLURM_JOB_NAME": name,
        "SLURM_JOB_NODELIST": node,
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_CLUSTER_NAME": "local",
        "SLURM_NODEID": "0",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_CPUS_ON_NODE": str(cpus),
        "SLURMD_NODENAME": node,
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_ARRAY_JOB_ID": str(job_id),
        "SLURM_ARRAY_TASK_ID": str(task_index),
        "SLURM_ARRAY_TASK_COUNT": str(n_tasks),
        "SLURM_ARRAY_TASK_MIN": "0",
        "SLURM_ARRAY_TASK_MAX": str(n_tasks - 1),
        "SLURM_RESTART_COUNT": str(restarts),
    }


def kill_leftovers(task_index: int) -> None:
    """End what an ended task's batch script left behind, as SLURM does: a script that was killed leaves its worker."""
    mark = f"SLURM_ARRAY_TASK_ID={task_index}".encode()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            pid = int(entry.name)
            if os.getpgid(pid) == os.getpgrp() and mark in (entry / "environ").read_bytes().split(b"\0"):
                os.kill(pid, signal.SIGKILL)
        except OSError:  # it has ended meanwhile
            continue


def main(folder: Path, lock_fd: int) -> None:
    """Note the process group, let go of whoever started this, and supervise."""
    os.umask(0o027)  # logs may quote documents
    atomic_write(Submission(folder=folder).process_group_file, str(os.getpgrp()).encode())
    if os.fork() == 0:
        Supervisor(folder, lock_fd).run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
