"""The worker's kind `export`: the caches of a partition in the files of other tools, as results of the store.

Used by `kd_assets.worker`. The files of an export lie in `data/` of its result, made by the very code of `kd-assets
export`, and become the result's parts once all are there. The invariant: a killed task goes on after its last whole
section, and the manifest names the bytes that an uninterrupted one would have written. One format that cannot be made
keeps no other from its turn.
"""

from __future__ import annotations

import itertools
import logging
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_assets.contract import Asset, ExportParams, JobFile, Output, Reporter, WorkUnit
from kd_assets.durable import listing, storage_errors
from kd_assets.errors import (
    ContractError,
    InputError,
    InterruptedTaskError,
    KdAssetsError,
    NothingToExportError,
    ResultBusyError,
    StorageUnavailableError,
    StorageUnreachableError,
    StoreError,
)
from kd_assets.export.exporting import ExportProgress, export_to_folder
from kd_assets.export.folder import (
    EXPORT_NAME,
    JOURNAL_NAME,
    LEASE_NAME,
    Exported,
    ExportedFile,
    discard,
    hashed,
    is_begun,
    sweep,
    verify_export,
)
from kd_assets.export.format import options_of
from kd_assets.export.planning import TRAIN, VALIDATION
from kd_assets.store import ResultWriter, WrittenFile, read_manifest
from kd_assets.worker.output_progress import OutputProgress
from kd_assets.worker.provenance import task_provenance
from kd_assets.worker.stop_flag import StopFlag

log = logging.getLogger(__name__)

DATA_FOLDER = "data"
"""In a result: the export, which nothing of the store's own lies in."""

_PASSED_ON = (InterruptedTaskError, ResultBusyError, StorageUnreachableError, MemoryError)
"""Errors that say when to come back, or of the machine, and nothing of a format."""


class ExportRunner:
    """Makes the exports of a task's partitions."""

    def __init__(self, job: JobFile, report: Reporter, stop: StopFlag) -> None:
        if not job.exports:
            raise ContractError(f"job {job.key} is of kind export and has no parameters of exports")
        self._job, self._report, self._stop = job, report, stop
        self._params: dict[Asset, ExportParams] = {params.asset: params for params in job.exports}

    def run(self, unit: WorkUnit) -> dict[str, Any]:
        """Make and commit every export of `unit` from its caches; those that can be made, where another cannot.

        Raises what the exports that failed did, of several in one error; InterruptedTaskError, after a whole section,
        when asked to stop.
        """
        summary: dict[str, Any] = {}
        failed: dict[Asset, Exception] = {}
        for output in unit.outputs:
            if self._stop:
                raise InterruptedTaskError(f"stopped by {self._stop.signal_name} before {output.asset}")
            try:
                summary[output.asset] = self._export(unit, output)
            except _PASSED_ON:
                raise
            except KdAssetsError as e:
                failed[output.asset] = e
            except Exception as e:  # noqa: BLE001 - what was not foreseen of one format keeps no other from its turn
                traceback.print_exc()
                failed[output.asset] = e
            if output.asset in failed:
                traceback.clear_frames(failed[output.asset].__traceback__)  # they keep the arrays of a section
        if failed:
            raise _as_one(failed)
        return summary

    def close(self) -> None:
        """Nothing is held open between units."""

    def _export(self, unit: WorkUnit, output: Output) -> dict[str, Any]:
        params = self._params_of(output)
        folders = {asset: [Path(f) for f in unit.inputs[asset]] for asset in output.identity["caches"]}
        started = time.monotonic()
        with ResultWriter(
            output,
            recipe=self._job.recipe,
            recipe_folder=Path(self._job.recipe_folder),
            partition_key=unit.partition_key,
        ) as writer:
            make_way(writer)
            progress = _Progress(unit, params, self._report, self._stop)
            exported, said = self._made(params, folders, writer.folder / DATA_FOLDER, progress)
            files = {} if exported is None else files_of(exported)
            writer.adopt_files(
                [
                    WrittenFile(name=f"{DATA_FOLDER}/{name}", n_bytes=file.n_bytes, sha256=file.sha256)
                    for name, file in files.items()
                ]
            )
            facts = facts_of(params, said)
            wall_s = time.monotonic() - started
            writer.commit(
                parts=len(files),
                checks={},
                provenance=self._job.provenance
                | task_provenance()
                | {
                    "device": "cpu",
                    "gpu": None,
                    "joules": None,
                    "wall_s": round(wall_s, 3),
                    "tokens_per_s": round(facts["n_tokens"] / max(wall_s, 1e-9), 1),
                },
                facts=facts,
            )
        for message in warnings_of(params, facts):
            self._report.emit("warning", partition_key=unit.partition_key, message=f"{output.asset}: {message}")
        return {"n_documents": facts["n_documents"], "n_tokens": facts["n_tokens"]}

    def _params_of(self, output: Output) -> ExportParams:
        """Raises ContractError for an output that the job has no parameters of."""
        if output.asset not in self._params:
            raise ContractError(f"job {self._job.key} has no parameters of {output.asset}")
        return self._params[output.asset]

    def _made(
        self, params: ExportParams, folders: Mapping[Asset, list[Path]], to: Path, progress: _Progress
    ) -> tuple[Exported | None, Mapping[str, Any]]:
        """The export in the folder `to`, gone on with or made, and what it says; None where there is no document that
        it can hold, as in caches without any, which have none of the columns that a format asks for."""
        if not any(read_manifest(folder).n_documents for of_asset in folders.values() for folder in of_asset):
            return None, {}
        try:
            exported = export_to_folder(
                params.format_name,
                folders,
                to,
                options=options_of(params),
                leave_out_empty=True,
                on_progress=progress.section,
            )
        except NothingToExportError as e:  # of one partition of many that is no failure
            discard(to)
            return None, {"left_out": e.left_out}
        sweep(to)
        return exported, exported.said


class _Progress:
    """Tells of an export's sections, and ends it between two of them when the task is to stop."""

    def __init__(self, unit: WorkUnit, params: ExportParams, report: Reporter, stop: StopFlag) -> None:
        self._asset, self._stop = params.asset, stop
        self._progress = OutputProgress(report, partition_key=unit.partition_key, asset=params.asset)

    def section(self, progress: ExportProgress) -> None:
        """Raises InterruptedTaskError."""
        is_last = progress.n_sections == progress.of_sections
        self._progress.tell(progress, is_last=is_last)
        if self._stop and not is_last:
            raise InterruptedTaskError(
                f"stopped by {self._stop.signal_name} after {progress.n_sections} of {progress.of_sections} sections "
                f"of {self._asset}"
            )


def files_of(exported: Exported) -> dict[str, ExportedFile]:
    """All files of an export by name, `export.json` among them."""
    return {**exported.files, **hashed(exported.folder, [EXPORT_NAME])}


def facts_of(params: ExportParams, said: Mapping[str, Any]) -> dict[str, Any]:
    """What a result tells of its export, which says this; of caches without a document that it has none."""
    return {
        "format": params.format_name,
        "n_documents": said.get("n_documents", 0),
        "n_tokens": said.get("n_tokens", 0),
        "n_cut_to_the_shortest_cache": said.get("n_cut_to_the_shortest_cache", 0),
        "left_out": said.get("left_out", {}),
        "splits": said.get("splits", {}),
        "states": said.get("states", []),
    }


def warnings_of(params: ExportParams, facts: Mapping[str, Any]) -> list[str]:
    """What is not in an export and may be missed."""
    found = []
    if cut := facts["n_cut_to_the_shortest_cache"]:
        found.append(f"{cut:,} documents are cut to the tokens that all caches of the export have")
    reasons = "; ".join(f"{said['n_documents']:,} left out, {why}" for why, said in facts["left_out"].items())
    if not facts["n_documents"]:
        found.append(f"it has no document: {reasons or 'its caches have none'}")
    elif params.validation_share:
        found += [
            f"it has no split {split!r}: {reasons or 'the partition has no document of it'}"
            for split in (TRAIN, VALIDATION)
            if split not in facts["splits"]
        ]
    return found


def make_way(writer: ResultWriter) -> None:
    """Take away an export that was whole and is not what was written any more: it is made again from the beginning, as
    no journal says of which section its files are.

    One that was never whole stays: its own journal says what of it stands. Files that are of no export that is known
    are put aside, since they may be anybody's.
    """
    folder = writer.folder / DATA_FOLDER
    was_whole = writer.finished or writer.forgotten or EXPORT_NAME in listing(folder)
    if was_whole and not _is_whole(folder):
        discard(folder)
        writer.adopt_files([])
    elif not is_begun(folder) and any(name not in (JOURNAL_NAME, LEASE_NAME) for name in listing(folder)):
        _put_aside(folder)


def _put_aside(folder: Path) -> None:
    """Rename the folder to the first of `data.unknown-1`, `data.unknown-2` … that is not there."""
    numbered = (folder.with_name(f"{folder.name}.unknown-{n}") for n in itertools.count(1))
    aside = next(path for path in numbered if not path.exists())
    log.warning("%s holds files of no export that is known: they are kept in %s", folder, aside)
    with storage_errors(folder, "rename"):
        folder.rename(aside)


def _is_whole(folder: Path) -> bool:
    try:
        verify_export(folder)
    except StorageUnavailableError:  # says nothing about the export
        raise
    except StoreError:
        return False
    return True


def _as_one(failed: Mapping[Asset, Exception]) -> Exception:
    """The one error, or one that has the words of all, each once: one damaged cache fails all that are made of it."""
    if len(failed) == 1:
        return next(iter(failed.values()))
    kind = InputError if all(isinstance(e, InputError) for e in failed.values()) else KdAssetsError
    of_words: dict[str, list[Asset]] = {}
    for asset, e in failed.items():
        of_words.setdefault(_words(e), []).append(asset)
    return kind("; ".join(f"{', '.join(assets)}: {words}" for words, assets in of_words.items()))


def _words(e: Exception) -> str:
    return str(e) if isinstance(e, KdAssetsError) else f"{type(e).__name__}: {e}"
