"""Making an export: all that can be wrong is looked for before a byte is written, then section after section.

`export_recipe` takes a recipe's folder in a store, `export_to_folder` result folders by asset: a job, or an asset of
one partition, has these. Both end with a folder that has an `export.json`, or with an error that says what to do.
Killed anywhere and called again they go on from the last whole section, and end with the same bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_assets.contract import Asset
from kd_assets.durable import prepare_folder, remove_file
from kd_assets.errors import (
    CorruptPartError,
    NothingToExportError,
    RecipeError,
    StorageUnavailableError,
)
from kd_assets.export.ahead import SectionsAhead
from kd_assets.export.folder import (
    EXPORT_NAME,
    LEASE_NAME,
    Exported,
    ExportedFile,
    Journal,
    JournalLine,
    damage,
    discard,
    found_in,
    hashed,
    read_export,
    write_export,
)
from kd_assets.export.format import ExportFormat, ExportOptions, ExportWriter, LeftOut, Needs, SectionFiles, Source
from kd_assets.export.formats import FORMATS
from kd_assets.export.identity import export_fingerprint, options_as_json, sources_as_json
from kd_assets.export.joined import JoinedPartition, joined_partition
from kd_assets.export.known_ids import KnownIds
from kd_assets.export.planning import (
    ExportPlan,
    PlannedSection,
    check_options,
    plan_export,
    require_can_pack,
    require_room,
    rows_of,
    say_what_is_cut,
)
from kd_assets.export.source import FolderCaches, RecipeCaches, choose_needed, source_of
from kd_assets.locks import Lease
from kd_assets.store import Chosen
from kd_assets.store.computing_versions import EXPORT_VERSION


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportProgress:
    """Where an export stands after a section."""

    n_sections: int
    of_sections: int
    n_documents: int
    of_documents: int
    n_bytes: int
    partition_key: str
    n_tokens: int = 0
    of_tokens: int = 0


OnProgress = Callable[[ExportProgress], None]


def export_recipe(
    format_name: str,
    recipe_folder: Path,
    to: Path,
    *,
    options: ExportOptions | None = None,
    partition_keys: Sequence[str] | None = None,
    variants: Mapping[Asset, str] | None = None,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Export what the current plan of a recipe names (`partition_keys`: only these) into the folder `to`.

    Raises RecipeError for what cannot be asked of the format, NotCommittedError, FailedCheckError or
    VariantConflictError for caches that cannot be exported, ExportFolderError for what is in the folder, and
    StorageUnavailableError where there is no room: all before anything is written.
    """
    keys = None if partition_keys is None else tuple(partition_keys)
    caches = RecipeCaches(recipe_folder=recipe_folder, partition_keys=keys, variants=variants)
    return _export(format_name, caches, to, options or ExportOptions(), on_progress)


def export_to_folder(
    format_name: str,
    folders: Mapping[Asset, Sequence[Path]],
    to: Path,
    *,
    options: ExportOptions | None = None,
    leave_out_empty: bool = False,
    on_progress: OnProgress | None = None,
) -> Exported:
    """Export these committed results (asset → one folder a partition, in the order of the export) into `to`.

    Of a format that counts tokens `folders` has those of shards_manifest besides. `leave_out_empty`: a split without a
    document is left out, and an export without any has no file, where others are refused: of one partition of many.
    Raises as `export_recipe` does.
    """
    caches = FolderCaches(folders=folders)
    return _export(format_name, caches, to, options or ExportOptions(), on_progress, leave_out_empty=leave_out_empty)


def format_of(name: str) -> ExportFormat:
    """The format of this name. Raises RecipeError, which lists all."""
    if name not in FORMATS:
        raise RecipeError(f"there is no export format {name!r}; there are {', '.join(FORMATS)}")
    return FORMATS[name]


def _export(
    format_name: str,
    caches: RecipeCaches | FolderCaches,
    to: Path,
    options: ExportOptions,
    on_progress: OnProgress | None,
    *,
    leave_out_empty: bool = False,
) -> Exported:
    export_format = format_of(format_name)
    check_options(options)
    needs = export_format.needs(source_of(caches.there(), unclear=caches.unclear()), options)
    require_can_pack(export_format.name, needs, options)
    chosen = choose_needed(caches, needs)
    source = source_of(chosen)
    digest = export_fingerprint(export_format.name, chosen, needs, options)
    if (whole := found_in(to, digest)) is not None:
        _require_whole(whole)
        return whole
    plan = plan_export(chosen, needs, options, leave_out_empty=leave_out_empty)
    require_room(to, chosen, needs, plan, hidden_size=source.hidden_size)
    say_what_is_cut(plan, chosen)
    is_new = not to.exists()
    prepare_folder(to)
    lease = Lease(to / LEASE_NAME)
    lease.acquire({"host": socket.gethostname(), "pid": os.getpid()})
    try:
        if (whole := found_in(to, digest)) is not None:  # another process finished it meanwhile
            return whole
        return _Export(
            export_format=export_format,
            chosen=chosen,
            source=source,
            needs=needs,
            options=options,
            plan=plan,
            to=to,
            digest=digest,
            journal=Journal(to, digest),
            known_ids=KnownIds.of(chosen, source),
            leave_out_empty=leave_out_empty,
        ).make(on_progress)
    finally:
        lease.release()
        with contextlib.suppress(OSError, StorageUnavailableError):
            remove_file(to / LEASE_NAME)
            if is_new and not any(to.iterdir()):  # nothing came of it
                to.rmdir()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Export:
    """One export being made, by the one process that holds its lease."""

    export_format: ExportFormat
    chosen: Mapping[Asset, Chosen]
    source: Source
    needs: Needs
    options: ExportOptions
    plan: ExportPlan
    to: Path
    digest: str
    journal: Journal
    known_ids: KnownIds
    leave_out_empty: bool

    def make(self, on_progress: OnProgress | None) -> Exported:
        try:
            self.journal.open()
            for folder in map(self._folder_of, self.plan.splits):
                prepare_folder(folder)
            with SectionsAhead(
                self.plan.sections, open_partition=self._partition, is_finished=self._is_finished
            ) as ahead:
                writers = {
                    split: self.export_format.writer(self._folder_of(split), self.source, self.options)
                    for split in self.plan.splits
                }
                self._write_sections(ahead, writers, on_progress)
            files, refused = self._finish(writers)
        except NothingToExportError:
            self.journal.take_back()
            raise
        except BaseException:
            self.journal.abandon()
            raise
        write_export(self.to, self._said(files, refused))
        self.journal.close()
        return read_export(self.to)

    def _write_sections(
        self, ahead: SectionsAhead, writers: Mapping[str, ExportWriter], on_progress: OnProgress | None
    ) -> None:
        n_documents = n_tokens = n_bytes = 0
        for at, (section, partition) in enumerate(ahead, start=1):
            if partition is None:
                line = self.journal.finished[section.split, section.index]
            else:
                line = self._write_section(writers[section.split], section, partition)
            n_documents += line.n_documents
            n_tokens += line.n_tokens
            n_bytes += sum(file.n_bytes for file in line.files.values())
            if on_progress is not None:
                on_progress(
                    ExportProgress(
                        n_sections=at,
                        of_sections=len(self.plan.sections),
                        n_documents=n_documents,
                        of_documents=sum(self.plan.n_documents.values()),
                        n_tokens=n_tokens,
                        of_tokens=self.plan.n_tokens,
                        n_bytes=n_bytes,
                        partition_key=section.partition_key,
                    )
                )

    def _partition(self, key: str) -> JoinedPartition:
        return joined_partition(self.chosen, key, states=self.needs.states, max_length=self.options.max_length)

    def _is_finished(self, section: PlannedSection) -> bool:
        return (section.split, section.index) in self.journal.finished

    def _write_section(self, writer: ExportWriter, section: PlannedSection, partition: JoinedPartition) -> JournalLine:
        rows = rows_of(partition, partition.parts[section.part], self.needs, self.options)[section.split]
        documents = partition.documents(section.part, rows.tolist(), first_number=section.first_number)
        documents = self.known_ids.checked(documents)
        written = writer.section(section.index, section.partition_key, documents)
        line = JournalLine(
            split=section.split,
            index=section.index,
            partition_key=section.partition_key,
            n_documents=written.n_documents,
            n_tokens=written.n_tokens,
            files=hashed(self._folder_of(section.split), written.names, written.sha256),
            left_out={why: _left_out(section.partition_key, ids) for why, ids in written.left_out.items()},
        )
        self.journal.append(line)
        return line

    def _finish(
        self, writers: Mapping[str, ExportWriter]
    ) -> tuple[dict[str, dict[str, ExportedFile]], dict[str, NothingToExportError]]:
        """Split → all its files by their names in its folder; and split → why it is left out, which has no folder.

        Raises NothingToExportError, which names the split.
        """
        files: dict[str, dict[str, ExportedFile]] = {}
        refused: dict[str, NothingToExportError] = {}
        for split, writer in writers.items():
            try:
                files[split] = self._finish_split(split, writer)
            except NothingToExportError as e:
                refused[split] = e
        if refused and not (self.leave_out_empty and files):
            raise self._named(refused)
        for split in refused:
            discard(self._folder_of(split))
        return files, refused

    def _finish_split(self, split: str, writer: ExportWriter) -> dict[str, ExportedFile]:
        lines = [line for (of_split, _), line in sorted(self.journal.finished.items()) if of_split == split]
        found = {name: file for line in lines for name, file in line.files.items()}
        once = writer.finish([_section_files(line) for line in lines])
        return found | hashed(self._folder_of(split), list(once))

    def _named(self, refused: Mapping[str, NothingToExportError]) -> NothingToExportError:
        split, e = next(iter(refused.items()))
        message = str(e)
        if split:
            message = (
                f"the split {split!r}: {e}; choose another validation_share or seed, leave validation_share out, or "
                "export more partitions"
            )
        left_out = {why: dataclasses.asdict(left_out) for why, left_out in self._left_out(refused).items()}
        return NothingToExportError(message, left_out=left_out)

    def _left_out(self, refused: Mapping[str, NothingToExportError]) -> dict[str, LeftOut]:
        """By reason: documents that the plan leaves out, those that the writers did, and those of refused splits."""
        found: dict[str, LeftOut] = {}

        def add(why: str, n_documents: int, first: Sequence[str] = ()) -> None:
            if n_documents:
                found.setdefault(why, LeftOut()).add(n_documents, first)

        for why, left_out in self.plan.left_out.items():
            add(why, left_out.n_documents, left_out.first)
        for (split, _), line in sorted(self.journal.finished.items()):
            for why, left_out in line.left_out.items():
                add(why, left_out.n_documents, left_out.first)
            if split in refused:
                add(str(refused[split]), line.n_documents)
        return found

    def _said(
        self, files: Mapping[str, Mapping[str, ExportedFile]], refused: Mapping[str, NothingToExportError]
    ) -> dict[str, Any]:
        lines = [line for (split, _), line in self.journal.finished.items() if split in files]
        n_documents = dict.fromkeys(files, 0)
        for line in lines:
            n_documents[line.split] += line.n_documents
        return {
            "export_version": EXPORT_VERSION,
            "format": self.export_format.name,
            "format_version": self.needs.version,
            "recipe": self.source.recipe,
            "fingerprint": self.digest,
            "options": options_as_json(self.options),
            "states": list(self.needs.states),
            "sources": sources_as_json(self.chosen),
            "splits": {split: n for split, n in n_documents.items() if split},
            "n_documents": sum(n_documents.values()),
            "n_tokens": sum(line.n_tokens for line in lines),
            "n_cut_to_the_shortest_cache": self.plan.n_cut,
            "left_out": {why: dataclasses.asdict(left_out) for why, left_out in self._left_out(refused).items()},
            "files": {
                f"{split}/{name}" if split else name: dataclasses.asdict(file)
                for split, of_split in files.items()
                for name, file in of_split.items()
            },
        }

    def _folder_of(self, split: str) -> Path:
        return self.to / split if split else self.to


def _left_out(partition_key: str, document_ids: Sequence[str]) -> LeftOut:
    left_out = LeftOut()
    left_out.add(len(document_ids), [f"{partition_key}/{document_id}" for document_id in document_ids])
    return left_out


def _section_files(line: JournalLine) -> SectionFiles:
    return SectionFiles(
        index=line.index,
        partition_key=line.partition_key,
        n_documents=line.n_documents,
        n_tokens=line.n_tokens,
        names=tuple(line.files),
        sha256={name: file.sha256 for name, file in line.files.items()},
    )


def _require_whole(exported: Exported) -> None:
    """Raise CorruptPartError where a file of a whole export is missing or of another size. Hashes nothing."""
    for name, file in exported.files.items():
        path = exported.folder / name
        if not path.is_file() or path.stat().st_size != file.n_bytes:
            raise CorruptPartError(f"{path}: {damage(path, file)}, though {EXPORT_NAME} names it: export elsewhere")
