"""The folder of a submission, and the name of every file in it.

Every module that reads or writes one of these files asks `Submission` where it is. What a task itself writes, its
events and its lease, is named in `kd_assets.contract.events`: a worker is told its events folder, and knows no
scheduler.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SLURM_LOG_PATTERN = "slurm-%A_%a.log"
"""sbatch's words for `Submission.slurm_log`."""


def key_folder(jobs_folder: Path, *, recipe: str, kind: str, key: str) -> Path:
    """Where the submissions of a key are, in folders named by their number."""
    return jobs_folder / recipe / f"{kind}-{key}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """A job that was handed to the scheduler once; its folder holds everything about it and is never deleted.

    The folder is `<jobs folder>/<recipe>/<kind>-<key>/<number>/`: the same work submitted again after an end is the
    next number.
    """

    folder: Path

    @property
    def job_file(self) -> Path:
        """What the workers are told."""
        return self.folder / "job.json"

    @property
    def spec_file(self) -> Path:
        """What was asked of the scheduler; where it is missing, nothing was submitted."""
        return self.folder / "spec.json"

    @property
    def events_folder(self) -> Path:
        return self.folder / "events"

    @property
    def log_folder(self) -> Path:
        return self.folder / "logs"

    @property
    def cancelled_mark(self) -> Path:
        return self.folder / "cancelled"

    @property
    def followers_folder(self) -> Path:
        """One file for each run that ever waited for it, locked while that run lives."""
        return self.folder / "followers"

    # ------------------------------------------------------------------ of the local scheduler

    @property
    def start_file(self) -> Path:
        """What its supervisor starts each task with."""
        return self.folder / "start.json"

    @property
    def state_file(self) -> Path:
        """The states of its tasks, as its supervisor saw them last."""
        return self.folder / "state.json"

    @property
    def process_group_file(self) -> Path:
        """The process group of all its processes, which is also its SLURM_ARRAY_JOB_ID."""
        return self.folder / "group"

    @property
    def job_lock(self) -> Path:
        """Locked for as long as any of its processes lives."""
        return self.folder / "job.lock"

    @property
    def supervisor_log(self) -> Path:
        return self.log_folder / "supervisor.log"

    def local_log(self, task: int) -> Path:
        return self.log_folder / f"task-{task:05d}.log"

    # ------------------------------------------------------------------ of SLURM

    @property
    def arrays_folder(self) -> Path:
        """One file for each sbatch, written before it runs, and one for its answer."""
        return self.folder / "arrays"

    def intent_file(self, array: int) -> Path:
        return self.arrays_folder / f"{array:04d}.json"

    def answer_file(self, array: int) -> Path:
        return self.arrays_folder / f"{array:04d}.answer.json"

    @property
    def endings_file(self) -> Path:
        """How tasks ended, which SLURM forgets."""
        return self.folder / "endings.json"

    @property
    def unseen_file(self) -> Path:
        """Since when the cluster does not know tasks."""
        return self.folder / "unseen.json"

    @property
    def environment_file(self) -> Path:
        """Bash that every task sources first."""
        return self.folder / "environment.sh"

    @property
    def submit_lock(self) -> Path:
        """Locked by the process that submits more of it."""
        return self.folder / "submit.lock"

    def released_mark(self, task: int) -> Path:
        """That a held task was released; its time is that of the release."""
        return self.folder / f"released-{task}"

    def slurm_log(self, job_id: int, index: int) -> Path:
        """Of an array task."""
        return self.log_folder / f"slurm-{job_id}_{index}.log"
