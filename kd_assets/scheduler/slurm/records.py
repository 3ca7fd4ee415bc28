"""What a submission under SLURM keeps on disk, so that any process can take it up: its arrays and how tasks ended.

Used by the modules of the SLURM scheduler. In the submission's folder: `arrays/0001.json` (the intent: name, tasks,
command line; written before sbatch), `arrays/0001.answer.json` (its job id, or the refusal), `endings.json` (how tasks
ended; squeue forgets it within minutes, and not every site has sacct).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kd_assets.contract import decode
from kd_assets.scheduler.folder import Submission
from kd_assets.scheduler.job import Ending, TaskPhase, TaskState
from kd_assets.scheduler.submissions import names_in, read_json, write_json


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

    absent: bool = False
    """The refusal is our guess: sbatch gave no answer, and the cluster did not know the job for a while."""

    @property
    def may_run(self) -> bool:
        return self.refused is None

    @property
    def is_answered(self) -> bool:
        return self.job_id is not None or self.refused is not None

    def __contains__(self, task: object) -> bool:
        return isinstance(task, int) and self.first_task <= task < self.first_task + self.n_tasks


def read_arrays(submission: Submission) -> list[Array]:
    """In the order they were submitted, each with its answer where there is one."""
    arrays = []
    stems = [name.removesuffix(".json") for name in names_in(submission.arrays_folder)]
    for number in sorted(int(stem) for stem in stems if stem.isdigit()):
        path = submission.intent_file(number)
        intent = {k: v for k, v in (read_json(path) or {}).items() if k != "argv"}
        answer = {k: v for k, v in (read_json(submission.answer_file(number)) or {}).items() if k != "found"}
        arrays.append(decode(Array, intent | answer, where=str(path)))
    return arrays


def write_intent(submission: Submission, array: Array, argv: Sequence[str]) -> None:
    """Before sbatch runs: what is not on disk cannot be found again."""
    intent = {f: getattr(array, f) for f in ("number", "name", "first_task", "n_tasks", "at")}
    write_json(submission.intent_file(array.number), intent | {"argv": list(argv)})


def write_answer(
    submission: Submission,
    array: Array,
    *,
    job_id: int | None = None,
    found: bool = False,
    refused: str | None = None,
    impossible: bool = False,
    absent: bool = False,
) -> None:
    """What became of an array: SLURM's answer, or what was found out later (`found`: by its name)."""
    refusal: dict[str, object] = {"refused": refused, "impossible": impossible, "absent": absent}
    acceptance: dict[str, object] = {"job_id": job_id, "found": found}
    answer = acceptance if refused is None else refusal
    write_json(submission.answer_file(array.number), answer)


def read_endings(submission: Submission) -> dict[int, TaskState]:
    """How tasks ended, as far as any process has seen it."""
    written: Mapping[str, Mapping[str, object]] = read_json(submission.endings_file) or {}
    return {int(task): _state_from_json(record) for task, record in written.items()}


def write_endings(submission: Submission, endings: Mapping[int, TaskState]) -> None:
    """Nothing is written when it is known already."""
    if dict(endings) != read_endings(submission):
        write_json(submission.endings_file, {str(t): _state_json(s) for t, s in endings.items()})


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
