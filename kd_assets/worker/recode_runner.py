"""The worker's kind `recode`: caches of a partition made of results that differ from them by their codec alone.

Numpy and pyarrow: neither the teacher nor a GPU is asked for. One cache that cannot be made keeps no other from its
turn.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd_assets.contract import Asset, JobFile, Output, Reporter, WorkUnit
from kd_assets.errors import (
    ContractError,
    InputError,
    InterruptedTaskError,
    KdAssetsError,
    ResultBusyError,
    StorageUnreachableError,
)
from kd_assets.store.recoding.recode import RecodingProgress, recode, source_in
from kd_assets.worker.output_progress import OutputProgress
from kd_assets.worker.provenance import task_provenance
from kd_assets.worker.stop_flag import StopFlag

_PASSED_ON = (InterruptedTaskError, ResultBusyError, StorageUnreachableError)
"""Errors that say when to come back, and nothing of a cache."""

_OWN_PROVENANCE = ("code_commit", "dagster_run_id", "submission_key")
"""What the control plane says of this job: the rest of it is of a teacher, and the source says that itself."""


class RecodeRunner:
    """Recodes what a task's partitions ask for."""

    def __init__(self, job: JobFile, report: Reporter, stop: StopFlag) -> None:
        self._job, self._report, self._stop = job, report, stop

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Make and commit every output of `unit` from the result that its inputs name; those that can be made, where
        another cannot.

        Raises what the caches that failed did, of several in one error; InterruptedTaskError, after a whole part, when
        asked to stop.
        """
        summary: dict[str, Any] = {}
        failed: dict[Asset, KdAssetsError] = {}
        for output in unit.outputs:
            self._raise_if_stopped(f"before {output.asset}")
            try:
                summary[output.asset] = self._recode(unit, output)
            except _PASSED_ON:
                raise
            except KdAssetsError as e:
                traceback.clear_frames(e.__traceback__)  # they keep the arrays of a part
                failed[output.asset] = e
        if len(failed) == 1:
            raise next(iter(failed.values()))
        if failed:
            kind = InputError if all(isinstance(e, InputError) for e in failed.values()) else KdAssetsError
            raise kind("; ".join(f"{asset}: {e}" for asset, e in failed.items()))
        return summary

    def close(self) -> None:
        """Nothing is held open between units."""

    def _recode(self, unit: WorkUnit, output: Output) -> dict[str, Any]:
        try:
            (folder,) = unit.inputs[output.asset]
        except (KeyError, ValueError) as e:
            raise ContractError(f"job {self._job.key} names no source of {output.asset} of {unit.partition_key}") from e
        own = {name: self._job.provenance[name] for name in _OWN_PROVENANCE if name in self._job.provenance}
        manifest = recode(
            source_in(Path(folder), output),
            output,
            made_by={**own, **task_provenance(), "job_key": self._job.key},
            on_part=_Progress(unit, output, self._report, self._raise_if_stopped).part,
        )
        return {"n_documents": manifest.n_documents, "n_tokens": manifest.n_tokens, "n_bytes": manifest.n_bytes}

    def _raise_if_stopped(self, when: str) -> None:
        if self._stop:
            raise InterruptedTaskError(f"stopped by {self._stop.signal_name} {when}; what is finished is on disk")


class _Progress:
    """Tells of a result's parts, and ends it between two of them when the task is to stop."""

    def __init__(
        self, unit: WorkUnit, output: Output, report: Reporter, raise_if_stopped: Callable[[str], None]
    ) -> None:
        self._asset, self._raise_if_stopped = output.asset, raise_if_stopped
        self._progress = OutputProgress(report, partition_key=unit.partition_key, asset=output.asset)

    def part(self, progress: RecodingProgress) -> None:
        """Raises InterruptedTaskError."""
        is_last = progress.n_parts == progress.of_parts
        self._progress.tell(progress, is_last=is_last)
        if not is_last:
            self._raise_if_stopped(f"after {progress.n_parts} of {progress.of_parts} parts of {self._asset}")
