"""Writing one result: parts as they come, the manifest last, and exactly where a killed attempt left off.

The order on disk is what makes this safe. A part is renamed into place after its bytes are synced; then its line is
appended to the journal; when all are there, their index and then the manifest are renamed into place: with the manifest
the result exists. Head, audit line
and the removal of the journal follow; a journal beside a manifest says that a kill came between, and the next one to
reuse the result does them. A part without a journal line, or whose hash differs from it, is made again.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from kd_assets.contract import Output
from kd_assets.durable import (
    TEMPORARY_SUFFIX,
    HashingFile,
    atomic_file,
    atomic_write,
    file_sha256,
    listing,
    prepare_folder,
    remove_file,
    size_if_there,
    sweep_beside,
)
from kd_assets.errors import (
    ContractError,
    CorruptPartError,
    NotCommittedError,
    ResultBusyError,
    StorageUnavailableError,
)
from kd_assets.locks import Lease
from kd_assets.store.document_index import DocumentRows
from kd_assets.store.fingerprint import FORMAT_VERSION, data_version, fingerprint, variant_of
from kd_assets.store.layout import (
    HEAD_NAME,
    INDEX_NAME,
    JOURNAL_NAME,
    LEASE_NAME,
    MANIFEST_NAME,
    is_file_name,
    part_name,
    result_folder,
)
from kd_assets.store.manifest import (
    FILES_FACT,
    FileBeside,
    Manifest,
    PartRecord,
    audit_commit,
    is_audited,
    merge_stats,
    read_manifest,
    without_non_finite,
    write_head,
)
from kd_assets.store.partfile import part_suffix, write_table
from kd_assets.store.recorded_checks import failed_check
from kd_assets.store.writing.journal import Journal, occupied
from kd_assets.store.writing.lost_index import has_lost_index, index_of, restore_index


def utc_now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenFile:
    """A file below a result's folder that is to become a part of it."""

    name: str
    """Relative to the folder, with slashes."""
    n_bytes: int
    sha256: str


class ResultWriter:
    """Writes the result that `output` names; a context manager, used by one task at a time.

    Entering creates the folders, takes the lease (ResultBusyError when another live process has it) and verifies what
    earlier attempts left; `finished` then lists the parts that need not be made again. Leaving releases the lease and
    keeps everything. Raises StorageUnavailableError where the file system cannot do it; nothing is lost by that.
    """

    def __init__(
        self,
        output: Output,
        *,
        recipe: str,
        recipe_folder: Path,
        partition_key: str,
        recoded_from: str | None = None,
        clock: Callable[[], datetime.datetime] = utc_now,
    ) -> None:
        """`recoded_from`: the fingerprint of the result that this one is made of; None of one that is computed. Parts
        that were made otherwise are not gone on from: what they say was checked of other numbers."""
        self.folder = result_folder(recipe_folder, output.asset, output.variant, partition_key, output.fingerprint)
        if Path(output.path) != self.folder:
            raise ContractError(f"output path {output.path} is not that of its fingerprint: expected {self.folder}")
        if output.fingerprint != fingerprint(output.identity) or output.variant != variant_of(output.identity):
            raise ContractError(
                f"{self.folder}: fingerprint or variant are not those of the identity: make outputs with plan_output"
            )
        self.fingerprint = output.fingerprint
        self._output, self._recipe, self._partition_key, self._clock = output, recipe, partition_key, clock
        self._lease = Lease(self.folder / LEASE_NAME)
        self._journal = Journal(self.folder / JOURNAL_NAME, output.fingerprint, recoded_from=recoded_from)
        self._recoded_from = recoded_from
        self._finished: dict[int, PartRecord] = {}
        self._committed: Manifest | None = None
        self._beside: dict[str, dict[str, Any]] = {}
        self._rows: dict[int, DocumentRows] = {}
        """Of the parts that were written here: what the index needs of them."""
        self._schema: pa.Schema | None = None
        self.forgotten: tuple[str, ...] = ()
        """Files of earlier attempts that failed verification, or are of another maker, and have to be made again, each
        with the reason."""

    @property
    def finished(self) -> Mapping[int, PartRecord]:
        """The parts on disk by index, verified."""
        return MappingProxyType(self._finished)

    @property
    def committed(self) -> Manifest | None:
        """What was committed of the result before the writer was entered, or by it; None of one that is unfinished."""
        return self._committed

    def forget(self, index: int) -> None:
        """Have a finished part of an unfinished result made anew: what is on disk is not what it should be."""
        assert self._lease.held, "a part is forgotten inside the writer's with block"
        assert self._committed is None, "a part of a committed result"
        self._rows.pop(index, None)
        if self._finished.pop(index, None) is not None:
            self._journal.rewrite(self._finished.values())

    def __enter__(self) -> ResultWriter:
        prepare_folder(self.folder)
        self._lease.acquire(lease_holder())
        try:
            self._resume()
        except BaseException:
            self._lease.release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lease.release()

    def write_part(self, index: int, table: pa.Table, *, n_tokens: int, stats: Mapping[str, float]) -> PartRecord:
        """Write part `index` durably and journal it. A part that is finished already is left as it is.

        `table` comes from an encoder of this output's asset, `stats` from `part_stats`.
        """
        asset = (table.schema.metadata or {}).get(b"kd_assets.asset", b"").decode()
        if asset != self._output.asset:
            raise ValueError(f"a table of {asset or 'no asset'} was handed to the writer of {self._output.asset}")
        counted = int(table["n_tokens"].to_numpy().sum())
        if counted != n_tokens:
            raise ValueError(f"part {index}: n_tokens is {n_tokens}, its documents have {counted}")
        suffix = part_suffix(self._output.asset)
        with self._new_part(
            index, part_name(index, suffix), n_documents=table.num_rows, n_tokens=n_tokens, stats=stats
        ) as file:
            if file is not None:
                write_table(table, suffix, file)
                self._rows[index], self._schema = DocumentRows.of(table), table.schema
        return self._finished[index]

    def write_file(self, index: int, name: str, data: bytes) -> PartRecord:
        """Write `data` as part `index` under a name of its own, for results that are no tables."""
        if not is_file_name(name):
            raise ValueError(f"{name!r} cannot be a file of a result")
        with self._new_part(index, name, n_documents=0, n_tokens=0, stats={}) as file:
            if file is not None:
                file.write(data)
        return self._finished[index]

    def write_beside(self, name: str, data: bytes) -> None:
        """Write a file that goes with the result and is none of its parts; the commit names it, with its hash.

        Nothing of the result's content depends on it: it is in no data version. A result that was committed before is
        left as it is.
        """
        assert self._lease.held, "a file is written inside the writer's with block"
        if not is_file_name(name):
            raise ValueError(f"{name!r} cannot be a file of a result")
        if self._committed is None:
            sha256 = atomic_write(self.folder / name, data)
            self._beside[name] = {"n_bytes": len(data), "sha256": sha256}

    def adopt_files(self, files: Sequence[WrittenFile]) -> None:
        """Make files that somebody has written durably below the result's folder its parts, in the order of their
        names and in the place of all parts there are. A result that was committed before is left as it is.

        Raises CorruptPartError where one is missing or of another size.
        """
        assert self._lease.held, "files are adopted inside the writer's with block"
        if self._committed is not None:
            return
        for file in files:
            if not is_file_name(file.name):
                raise ValueError(f"{file.name!r} cannot be a file of a result")
            if (n_bytes := size_if_there(self.folder / file.name, known=self.folder)) != file.n_bytes:
                found = "missing" if n_bytes is None else f"of {n_bytes} bytes"
                raise CorruptPartError(f"{self.folder / file.name} is {found}, and was written with {file.n_bytes}")
        self._finished = {
            index: PartRecord(
                index=index,
                name=file.name,
                n_documents=0,
                n_tokens=0,
                n_bytes=file.n_bytes,
                sha256=file.sha256,
                stats={},
            )
            for index, file in enumerate(sorted(files, key=lambda file: file.name))
        }
        self._journal.rewrite(self._finished.values())

    def commit(
        self,
        *,
        parts: int,
        checks: Mapping[str, Any],
        provenance: Mapping[str, Any],
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> Manifest:
        """Write the manifest over parts 0 to `parts - 1`: from here on the result exists.

        Returns the manifest that is there when the result was committed before. Raises CorruptPartError unless
        exactly these parts are finished.
        """
        assert self._lease.held, "commit outside the writer's with block"
        if sorted(self._finished) != list(range(parts)):
            missing = sorted(set(range(parts)) - set(self._finished))
            extra = sorted(set(self._finished) - set(range(parts)))
            raise CorruptPartError(
                f"{self.folder}: expected parts 0 to {parts - 1}; missing {missing[:8]}, not expected {extra[:8]}"
            )
        if self._committed is not None:
            _finish_commit(self.folder, self._committed, is_new=False)
            return self._committed
        beside = {FILES_FACT: self._beside} if self._beside else {}
        manifest = self._manifest(checks=checks, provenance=provenance, facts={**facts, **beside})
        if not self._finished:  # a commit needs its journal beside it, and without parts there is none yet
            self._journal.rewrite(self._finished.values())
        if (index := index_of(self.folder, manifest, rows=self._rows, schema=self._schema)) is not None:
            atomic_write(self.folder / INDEX_NAME, index)
        atomic_write(self.folder / MANIFEST_NAME, manifest.to_json().encode())
        self._committed = manifest
        _finish_commit(self.folder, manifest, is_new=True)
        return manifest

    def commit_files(
        self,
        files: Mapping[str, bytes],
        *,
        checks: Mapping[str, Any],
        provenance: Mapping[str, Any],
        facts: Mapping[str, Any] = MappingProxyType({}),
    ) -> Manifest:
        """Commit a few files as the result, in the order of their names; what an unfinished attempt left is replaced.

        Returns the manifest that is there when the result was committed before.
        """
        if self._committed is None:  # files of two attempts do not belong together
            self._finished.clear()
            self._journal.rewrite(self._finished.values())
        for index, name in enumerate(sorted(files)):
            self.write_file(index, name, files[name])
        return self.commit(parts=len(self._finished), checks=checks, provenance=provenance, facts=facts)

    @contextlib.contextmanager
    def _new_part(
        self, index: int, name: str, *, n_documents: int, n_tokens: int, stats: Mapping[str, float]
    ) -> Iterator[HashingFile | None]:
        """The file of a new part, journaled when the block ends well; None when the part is finished already."""
        assert self._lease.held, "a part is written inside the writer's with block"
        assert index >= 0
        if index in self._finished:
            yield None
            return
        merge_stats([stats])  # refuses a statistic that could not be merged at the end
        with atomic_file(self.folder / name) as file:
            yield file
        record = PartRecord(
            index=index,
            name=name,
            n_documents=n_documents,
            n_tokens=n_tokens,
            n_bytes=file.n_bytes,
            sha256=file.sha256,
            stats={key: float(value) for key, value in stats.items()},
        )
        self._journal.append(record)
        self._finished[index] = record

    def _manifest(
        self, *, checks: Mapping[str, Any], provenance: Mapping[str, Any], facts: Mapping[str, Any]
    ) -> Manifest:
        parts = tuple(self._finished[i] for i in sorted(self._finished))
        return Manifest(
            format_version=FORMAT_VERSION,
            asset=self._output.asset,
            recipe=self._recipe,
            partition_key=self._partition_key,
            variant=self._output.variant,
            fingerprint=self._output.fingerprint,
            identity=without_non_finite(self._output.identity),
            data_version=data_version(self._output.asset, [part.sha256 for part in parts]),
            n_documents=sum(part.n_documents for part in parts),
            n_tokens=sum(part.n_tokens for part in parts),
            n_bytes=sum(part.n_bytes for part in parts),
            parts=parts,
            stats=merge_stats(part.stats for part in parts),
            checks=without_non_finite(checks),
            facts=without_non_finite(facts),
            provenance=without_non_finite(provenance),
            created_at=self._clock().isoformat(timespec="seconds"),
        )

    def _resume(self) -> None:
        """Take stock of what earlier attempts left in the folder. Holding the lease, nothing here is in use."""
        for name in listing(self.folder):
            if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX):
                remove_file(self.folder / name)
        try:
            manifest = read_manifest(self.folder)
        except NotCommittedError:
            manifest = None
        if manifest is not None and manifest.fingerprint != self._output.fingerprint:
            raise occupied(self.folder / MANIFEST_NAME, manifest.fingerprint, self._output.fingerprint)
        reasons = []
        records, journal_is_whole, of_others = (
            self._journal.read() if manifest is None else (list(manifest.parts), True, [])
        )
        self._finished.clear()
        for record in records:
            reason = _damage(self.folder, record)
            if reason is None:
                self._finished[record.index] = record
            else:
                reasons.append(f"{record.name}: {reason}")
        reasons += [] if manifest is None else self._damaged_beside(manifest)
        if manifest is not None and reasons and _maker_of(manifest) != self._recoded_from:
            of_others = list(self._finished.values())
            self._finished.clear()
        maker = "recoding" if self._recoded_from is None else "the teacher's pass, or of another source"
        reasons += [f"{record.name}: made by {maker}" for record in of_others]
        self.forgotten = tuple(reasons)
        if manifest is not None and not reasons:
            self._committed = manifest
        elif reasons or not journal_is_whole:
            self._journal.rewrite(self._finished.values())
            if manifest is not None:  # damaged after its commit: from here on it is an unfinished result like others
                remove_file(self.folder / MANIFEST_NAME)

    def _damaged_beside(self, manifest: Manifest) -> list[str]:
        harm = {file.name: _damage(self.folder, file) for file in manifest.files_beside}
        return [f"{name}: {reason}" for name, reason in harm.items() if reason is not None]


def _maker_of(manifest: Manifest) -> object:
    """The fingerprint of the result that a committed one was recoded from; None of one that was computed."""
    source = manifest.provenance.get("recoded_from")
    return source.get("fingerprint") if isinstance(source, dict) else None


def commit_file_result(
    output: Output,
    *,
    recipe: str,
    recipe_folder: Path,
    partition_key: str,
    files: Mapping[str, bytes],
    checks: Mapping[str, Any],
    provenance: Mapping[str, Any],
    facts: Mapping[str, Any] = MappingProxyType({}),
    clock: Callable[[], datetime.datetime] = utc_now,
) -> Manifest:
    """`ResultWriter.commit_files` for files that are at hand."""
    with ResultWriter(
        output, recipe=recipe, recipe_folder=recipe_folder, partition_key=partition_key, clock=clock
    ) as writer:
        return writer.commit_files(files, checks=checks, provenance=provenance, facts=facts)


def set_head(folder: Path, manifest: Manifest | None = None) -> bool:
    """Make a committed result its partition's current one: what reuse does instead of computing. One that has failed a
    check never becomes it.

    Also does what a kill right after the commit left undone (see the module's docstring), unless its task is at it;
    returns whether all is done. An index that is absent or damaged is written anew where that is possible, unless the
    result is a copy that no writer has worked on in this place (there is no lease file); nothing depends on it.
    `manifest` is that of `folder`, where the caller has just read it.
    """
    manifest = manifest or read_manifest(folder)
    if failed_check(manifest) is None:
        write_head(folder, manifest.fingerprint)
    is_finished = size_if_there(folder / JOURNAL_NAME) is None
    is_made_here = size_if_there(folder / LEASE_NAME) is not None
    if is_finished and not (is_made_here and has_lost_index(folder, manifest)):
        return True
    lease = Lease(folder / LEASE_NAME)
    try:
        lease.acquire(lease_holder())
    except ResultBusyError:
        return is_finished
    except StorageUnavailableError:
        if is_finished:  # only the index is missing, and the result is whole without
            return True
        raise
    try:
        _finish_commit(folder, manifest, is_new=False)
    finally:
        lease.release()
    return True


def raise_if_busy(output: Output) -> None:
    """Raise ResultBusyError where another live process is computing this result. Takes nothing and reads nothing."""
    Lease(Path(output.path) / LEASE_NAME).raise_if_busy()


def _finish_commit(folder: Path, manifest: Manifest, *, is_new: bool) -> None:
    """What follows a commit. Runs again after a kill, so each step first looks whether it was done; that the log has no
    line of a new commit, which this process has just made, is known without looking."""
    if failed_check(manifest) is None:
        write_head(folder, manifest.fingerprint)
    if size_if_there(folder / JOURNAL_NAME) is not None:
        if is_new or not is_audited(folder, manifest):
            audit_commit(folder, manifest)
        if not is_new:
            sweep_beside(folder.parent / HEAD_NAME)
        remove_file(folder / JOURNAL_NAME)
    if not is_new:
        restore_index(folder, manifest)


def _damage(folder: Path, record: PartRecord | FileBeside) -> str | None:
    """Why a file of the result in a folder is not the one that was recorded; None when it is. Raises
    StorageUnavailableError where that cannot be told."""
    path = folder / record.name
    n_bytes = size_if_there(path, known=folder)
    if n_bytes is None:
        return "missing"
    if n_bytes != record.n_bytes:
        return f"{n_bytes} bytes, expected {record.n_bytes}"
    digest = file_sha256(path)
    return None if digest == record.sha256 else f"sha256 {digest}, expected {record.sha256}"


def lease_holder() -> dict[str, Any]:
    """What this process says of itself in the leases that it takes."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "slurm_job_id": os.environ.get("SLURM_JOB_ID")}
