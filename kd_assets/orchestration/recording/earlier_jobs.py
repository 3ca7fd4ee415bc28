"""Which task made a result that is there already: what `job_table.task_facts` said of it when it was made.

Its manifest names the submission and SLURM's (or the local scheduler's) numbers, the submission's folder has the rest.
So it needs no scheduler, and no record in Dagster. It informs: what is not there any more is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_assets.contract import CACHES, EXPORTS, Event
from kd_assets.contract.events import event_file, read_events
from kd_assets.durable import read_if_there, storage_errors
from kd_assets.errors import NO_ANSWER, ContractError, SchedulerError
from kd_assets.orchestration.recording.metadata import is_of_slurm, maker_of, task_id_of
from kd_assets.scheduler import Submission
from kd_assets.scheduler.folder import key_folder
from kd_assets.scheduler.slurm.records import KnownJob
from kd_assets.scheduler.submissions import names_in
from kd_assets.store import Manifest


class EarlierJobs:
    """The jobs of a deployment; each task is looked at once."""

    def __init__(self, jobs_folder: Path) -> None:
        self._jobs_folder = jobs_folder
        self._known: dict[tuple[object, ...], Mapping[str, Any]] = {}

    def task_facts(self, manifest: Manifest) -> dict[str, Any]:
        """Job, node, log and queue wait of the task that made a result; what of it is known."""
        maker = maker_of(manifest)
        facts = {
            "job_id": task_id_of(maker),
            "node": maker.get("slurm_nodelist") or maker.get("host"),
            "restarts": maker.get("attempt"),
        }
        task = (manifest.recipe, _kind_of(manifest), *map(maker.get, ("submission_key", *_NUMBERS)))
        if task not in self._known:
            try:
                self._known[task] = self._of_files(manifest, maker)
            except (SchedulerError, ContractError, *NO_ANSWER):
                self._known[task] = {}
        return {name: value for name, value in (facts | dict(self._known[task])).items() if value is not None}

    def _of_files(self, manifest: Manifest, maker: Mapping[str, Any]) -> dict[str, Any]:
        key, (job_id, index) = maker.get("submission_key"), (_number(maker.get(name)) for name in _NUMBERS)
        if not isinstance(key, str) or job_id is None or index is None:
            return {}
        folder = key_folder(self._jobs_folder, recipe=manifest.recipe, kind=_kind_of(manifest), key=key)
        find = _slurm_task if is_of_slurm(maker) else _local_task
        for number in reversed(names_in(folder)):
            if number.isdigit() and (found := find(Submission(folder=folder / number), job_id, index)):
                return {"job_folder": str(folder / number), **found}
        return {}


_NUMBERS = ("slurm_array_job_id", "slurm_array_task_id")


def _kind_of(manifest: Manifest) -> str:
    if "recoded_by" in manifest.provenance:
        return "recode"
    if manifest.asset in CACHES:
        return "teacher"
    if manifest.asset in EXPORTS:
        return "export"
    return "student" if manifest.asset == "student_smoke" else "shards"


def _slurm_task(submission: Submission, job_id: int, index: int) -> dict[str, Any] | None:
    job = KnownJob(submission)
    job.read()
    array = next((a for a in job.arrays if a.job_id == job_id), None)
    if array is None:
        return None
    facts: dict[str, Any] = {"log": str(submission.slurm_log(job_id, index))}
    if (started_at := _started_at(submission, array.first_task + index)) is not None:
        facts["queue_wait_s"] = round(max(0.0, started_at - min(a.at for a in job.arrays)), 1)
    return facts


def _local_task(submission: Submission, job_id: int, index: int) -> dict[str, Any] | None:
    group = read_if_there(submission.process_group_file)
    if group is None or _number(group.decode(errors="replace")) != job_id:
        return None
    return {"log": str(submission.local_log(index))}


def _started_at(submission: Submission, task: int) -> float | None:
    """When the task began first, by the first lines of its events."""
    path = event_file(submission.events_folder, task)
    with storage_errors(path, "read"):
        for _, event in read_events(path):
            if isinstance(event, Event) and event.type == "task_started":
                return event.time
    return None


def _number(value: object) -> int | None:
    text = str(value).strip()
    return int(text) if text.isdecimal() else None
