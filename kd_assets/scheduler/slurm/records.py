"""What a process knows of a submission under SLURM: its files, which any process can take up, and what was seen of it.

Used by the modules of the SLURM scheduler. In the submission's folder: `arrays/0001.json` (the intent: name, tasks,
command line; written before sbatch), `arrays/0001.answer.json` (its job id, or the refusal), `endings.json` (how tasks
ended; squeue forgets it within minutes, and not every site has sacct), `unseen.json` (since when the cluster does not
know tasks). What never changes once it is written is read once.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_assets.contract import decode
from kd_assets.durable import storage_errors
from kd_assets.errors import StorageUnavailableError
from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import Ending, JobSpec, TaskPhase, TaskState
from kd_assets.scheduler.submissions import names_in, read_json, read_spec, storage_as_no_answer, write_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """One sbatch: some consecutive tasks of a submission. Array index i is task `first_task` + i."""

    number: int
    name: str
    """Of the job; no other array, of whatever submission, has it."""
    first_task: int
    n_tasks: int
    at: float
    """When it was about to be submitted, in seconds since the epoch."""
    job_id: int | None = None
    refused: str | None = None
    """Why it is not and will not be in the queue, in SLURM's words; its tasks are to be submitted again."""
    impossible: bool = False
    """The refusal is one that time will not change."""
    unclear: bool = False
    """The refusal is in words that we do not know: time may change it."""
    absent: bool = False
    """The refusal is our guess: sbatch gave no answer, and the cluster did not know the job for a while."""

    @property
    def is_refused(self) -> bool:
        return self.refused is not None

    @property
    def is_answered(self) -> bool:
        return self.job_id is not None or self.is_refused

    @property
    def tasks(self) -> range:
        return range(self.first_task, self.first_task + self.n_tasks)


class KnownJob:
    """One submission as this process knows it."""

    def __init__(self, submission: Submission) -> None:
        self.submission = submission
        # On disk.
        self._spec: JobSpec | None = None
        self._arrays: dict[int, Array] = {}
        self._accepted: dict[int, Array] = {}
        """Task → the array with it that was accepted last."""
        self.endings: dict[int, TaskState] = {}
        """How tasks ended, as far as any process has seen it."""
        self._endings_version: tuple[int, ...] | None = None
        self._has_unwritten_endings = False
        self.unseen_since: dict[int, float] = {}
        """Task → when a cluster that answered first did not know it, or showed an end that may be taken back."""
        self._unseen_on_disk: dict[int, float] | None = None
        # Seen, lost with the process, and found out again.
        self.states: dict[int, TaskState] = {}
        self.ran_on: dict[int, TaskState] = {}
        """Task → what was known of it when it was last seen running."""
        self.failed_nodes: dict[int, tuple[str, ...]] = {}
        self.keep_from: frozenset[str] = frozenset()
        """Nodes that what waits is to stay away from, beside those that were asked for at submission."""
        self.kept_from: dict[int, frozenset[str]] = {}
        """Task → of `keep_from`, those that SLURM keeps it from."""
        self.released_at: dict[int, float] = {}
        self.is_over = False
        self.notices: list[str] = []
        """What the next poll is to say."""
        self._told: dict[str, str | None] = {}

    # ------------------------------------------------------------------ reading

    @property
    def spec(self) -> JobSpec:
        """Raises SchedulerError when its folder was taken away, JobFilesUnavailableError when it cannot be read now."""
        if self._spec is None:
            self._spec = read_spec(self.submission)
        return self._spec

    @property
    def arrays(self) -> list[Array]:
        """In the order they were submitted, each with its answer where there is one; as `read` found them last."""
        return [self._arrays[number] for number in sorted(self._arrays)]

    @storage_as_no_answer()
    def read(self) -> None:
        """Take in what others wrote since the last time."""
        self._read_arrays()
        self._read_endings()
        if self._unseen_on_disk is None:
            written: Mapping[str, float] = read_json(self.submission.unseen_file) or {}
            self._unseen_on_disk = {int(task): at for task, at in written.items()}
            self.unseen_since = dict(self._unseen_on_disk)

    def array_with(self, task: int) -> Array | None:
        """The array with a task that was accepted last, as far as is known; else as far as is on disk by now."""
        if task not in self._accepted:
            self._read_arrays()
        return self._accepted.get(task)

    @storage_as_no_answer()
    def _read_arrays(self) -> None:
        stems = [name.removesuffix(".json") for name in names_in(self.submission.arrays_folder)]
        for number in (int(stem) for stem in stems if stem.isdigit()):
            known = self._arrays.get(number)
            if known is None or not known.is_answered:
                self._take_in(self._read_array(number))

    def _take_in(self, array: Array) -> None:
        self._arrays[array.number] = array
        for task in array.tasks if array.job_id is not None else ():
            before = self._accepted.get(task)
            if before is None or before.number < array.number:
                self._accepted[task] = array

    def _read_array(self, number: int) -> Array:
        path = self.submission.intent_file(number)
        intent: Mapping[str, Any] = read_json(path) or {}
        answer: Mapping[str, Any] = read_json(self.submission.answer_file(number)) or {}
        record = {name: value for name, value in {**intent, **answer}.items() if name not in ("argv", "found")}
        return decode(Array, record, where=str(path))

    def _read_endings(self) -> None:
        """Where the file is another than the last time; what could not be written yet stays."""
        path = self.submission.endings_file
        with storage_errors(path, "read"):
            try:
                status = os.stat(path)
            except FileNotFoundError:
                return
        version = (status.st_mtime_ns, status.st_size, status.st_ino)
        if version == self._endings_version or self._has_unwritten_endings:
            return
        written: Mapping[str, Mapping[str, object]] = read_json(path) or {}
        self.endings = {int(task): _state_from_json(record) for task, record in written.items()}
        self._endings_version = version

    # ------------------------------------------------------------------ writing

    def write_intent(self, array: Array, argv: Sequence[str]) -> None:
        """Before sbatch runs: what is not on disk cannot be found again. Raises StorageUnavailableError."""
        intent = {f: getattr(array, f) for f in ("number", "name", "first_task", "n_tasks", "at")}
        write_json(self.submission.intent_file(array.number), intent | {"argv": list(argv)})
        self._take_in(array)

    def write_acceptance(self, array: Array, job_id: int, *, found: bool = False) -> None:
        """That an array is in the queue: SLURM's answer, or `found` out later, by its name.

        Raises StorageUnavailableError; the array then counts as one whose answer was lost.
        """
        write_json(self.submission.answer_file(array.number), {"job_id": job_id, "found": found})
        self._take_in(dataclasses.replace(array, job_id=job_id))

    def write_refusal(
        self, array: Array, why: str, *, impossible: bool = False, unclear: bool = False, absent: bool = False
    ) -> None:
        """That an array is not in the queue: in SLURM's words, or `absent`, as we conclude.

        Raises StorageUnavailableError; the array then counts as one whose answer was lost.
        """
        refusal: dict[str, Any] = {
            "refused": why,
            "impossible": impossible,
            "unclear": unclear,
            "absent": absent,
        }
        write_json(self.submission.answer_file(array.number), refusal)
        self._take_in(dataclasses.replace(array, **refusal))

    def remember(self, states: Mapping[int, TaskState]) -> None:
        """Keep the states, and on disk what SLURM forgets.

        A disk that does not take it is told of, and tried again the next time: this process knows it all the same.
        """
        self.states = dict(states)
        endings = {task: state for task, state in states.items() if state.phase is TaskPhase.ENDED}
        self._has_unwritten_endings |= endings != self.endings
        self.endings = endings
        try:
            if self._has_unwritten_endings:
                write_json(self.submission.endings_file, {str(t): _state_json(s) for t, s in endings.items()})
                self._has_unwritten_endings = False
            # A grace must end though nobody looks for long enough: every process goes on counting.
            if self.unseen_since != self._unseen_on_disk:
                write_json(self.submission.unseen_file, self.unseen_since)
                self._unseen_on_disk = dict(self.unseen_since)
        except StorageUnavailableError as e:
            self.tell_once("disk", f"what is known of {self.submission.folder} cannot be kept for other runs: {e}")
        else:
            self.tell_once("disk", None)

    # ------------------------------------------------------------------ telling

    def tell_once(self, about: str, notice: str | None) -> None:
        """A notice for the next poll, unless it is the last one about this; None: there is nothing to say any more."""
        if notice is not None and notice != self._told.get(about):
            self.notices.append(notice)
        self._told[about] = notice

    def take_notices(self) -> list[str]:
        """What there is to say, each once."""
        taken, self.notices = self.notices, []
        return taken


def _state_json(state: TaskState) -> dict[str, object]:
    return dataclasses.asdict(state) | {
        "phase": state.phase.value,
        "ending": None if state.ending is None else state.ending.value,
    }


def _state_from_json(record: Mapping[str, object]) -> TaskState:
    ending = record.get("ending")
    typed: dict[str, object] = {
        "phase": TaskPhase(record["phase"]),
        "ending": None if ending is None else Ending(ending),
        "failed_nodes": tuple(record["failed_nodes"]),  # type: ignore[arg-type]
    }
    return TaskState(**{**record, **typed})  # type: ignore[arg-type]
