"""Every hash and every count of results on disk, compared with what their manifests say, and all that is there compared
with what was committed (`missing`).

Problems name the file and what to do; notes are what a person may want to know and nothing is wrong with: results that
are still being made, files that are not of the format.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Any

from kd_assets.contract import CACHES, EXPORTS, TokenIds
from kd_assets.durable import file_sha256, listing, size_if_there
from kd_assets.errors import (
    CorruptManifestError,
    CorruptPartError,
    CorruptPlanError,
    MissingInputError,
    NotCommittedError,
    ObstructedError,
    StoreError,
    UnknownCodecError,
)
from kd_assets.store.checking.groups import part_difference
from kd_assets.store.checking.indexes import index_difference
from kd_assets.store.checking.report import Note, NoteKind, Problem, ProblemKind, VerifyReport
from kd_assets.store.checking.rows import (
    MissingParameterError,
    expected_schema,
    schema_difference,
)
from kd_assets.store.layout import (
    AUDIT_NAME,
    FOLDER_FINGERPRINT_LENGTH,
    HEAD_NAME,
    INDEX_NAME,
    JOURNAL_NAME,
    LEASE_NAME,
    MANIFEST_NAME,
    count_durable_files,
    folders_below,
    is_partition_folder,
    is_result_folder,
    is_variant_name,
    recipe_folder_of,
    require_folder,
)
from kd_assets.store.manifest import (
    QUARANTINE_EVENT,
    FileBeside,
    Manifest,
    PartRecord,
    audit_record,
    audited_events,
    head_fingerprint,
    read_manifest,
)
from kd_assets.store.partfile import PartFile
from kd_assets.store.reading.chosen import require_place
from kd_assets.store.reading.parts import damage_named
from kd_assets.store.reading.planned import PLAN_FOLDER, PLAN_NAME, planned_partitions
from kd_assets.store.recorded_checks import failed_check
from kd_assets.store.schema import hidden_size_of
from kd_assets.store.vocabulary import vocabulary_of
from kd_assets.store.writing.lost_index import MOST_BYTES, has_index

PARTITIONED = ("shards_manifest", *CACHES, *EXPORTS)
"""Assets whose partitions are those of the plan."""
MOST_NAMED = 5
"""Partitions that a note names one by one."""


def verify(path: Path) -> VerifyReport:
    """Verify all results at or below `path`: a result folder, or any folder above, up to a store's root.

    Raises MissingInputError when there is no such folder, NotCommittedError when it holds nothing of a store.
    """
    require_folder(path)
    verifier = _Verifier()
    recipe_folders = _recipe_folders_above(path)
    for folder, names in folders_below(path, verifier.unreadable):
        if AUDIT_NAME in names:
            recipe_folders.append(folder)
        if is_result_folder(folder, names):
            verifier.result(folder)
        elif HEAD_NAME in names and is_partition_folder(folder):
            verifier.head(folder / HEAD_NAME)
    verifier.partitions()
    for recipe_folder in recipe_folders:
        verifier.missing(recipe_folder, below=path)
        verifier.compare_with_plan(recipe_folder, below=path)
    if not verifier.n_seen and not verifier.problems and not verifier.notes:
        raise NotCommittedError(f"{path} holds no results: give a result folder, a recipe's folder or a store's root")
    return verifier.report(path)


def _recipe_folders_above(path: Path) -> list[Path]:
    """The recipe's folder that `path` is in, if it is."""
    above = [folder for folder in path.absolute().parents[:4] if _size_of(folder / AUDIT_NAME) is not None]
    return above[:1]


def _size_of(path: Path) -> int | None:
    try:
        return size_if_there(path)
    except StoreError:
        return None


class _Verifier:
    """Collects problems, notes and totals over results."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[Note] = []
        self.n_seen = 0
        self._manifests: list[Manifest] = []
        self._audited: dict[Path, dict[str, list[dict[str, Any]]]] = {}
        """Recipe's folder → a result's path from there → the lines of its commits, in order."""
        self._seen: dict[str, bool] = {}
        """Result's folder → whether it is committed, or is damaged and has been said to be."""
        self._partitions: set[Path] = set()
        """Folders of partitions in which something is committed."""
        self._heads: set[Path] = set()
        """Folders of partitions that have one, and be it a damaged one."""

    def report(self, path: Path) -> VerifyReport:
        manifests = self._manifests
        return VerifyReport(
            path=path,
            n_results=len(manifests),
            n_parts=sum(len(m.parts) for m in manifests),
            n_documents=sum(m.n_documents for m in manifests),
            n_tokens=sum(m.n_tokens for m in manifests),
            n_bytes=sum(m.n_bytes for m in manifests),
            problems=tuple(self.problems),
            notes=tuple(self.notes),
        )

    def unreadable(self, path: Path, e: StoreError) -> None:
        self._problem("unreadable", path, str(e))

    def result(self, folder: Path) -> None:
        self.n_seen += 1
        self._seen[str(folder.absolute())] = True
        try:
            manifest = read_manifest(folder)
        except NotCommittedError:
            self._seen[str(folder.absolute())] = False
            n_parts = count_durable_files([folder])
            self._note(
                "unfinished", folder, f"{folder} has {n_parts} part files and no manifest; a rerun goes on from here"
            )
            return
        except CorruptManifestError as e:
            self._problem("corrupt_manifest", folder / MANIFEST_NAME, f"{e}; remove it and materialize again")
            return
        except StoreError as e:
            self._problem("unreadable", folder / MANIFEST_NAME, str(e))
            return
        self._manifests.append(manifest)
        is_in_place, why = self._place(folder, manifest), failed_check(manifest)
        if why is not None:
            self._note("failed_check", folder, f"{folder} is kept to be looked at, and is never current: {why}")
        elif is_in_place:
            self._partitions.add(folder.absolute().parent)
        n_problems = len(self.problems)
        try:
            expected_schema(manifest, 0)
        except MissingParameterError as e:
            path = folder / MANIFEST_NAME
            self._problem("wrong_identity", path, f"{path}: {e}; it was written so: materialize it again elsewhere")
        except UnknownCodecError as e:
            self._problem("unreadable", folder / MANIFEST_NAME, str(e))
        document_ids: set[str] = set()
        for record in manifest.parts:
            self._part(folder, manifest, record, document_ids)
        self._index(folder, manifest, parts_are_whole=len(self.problems) == n_problems)
        for file in manifest.files_beside:
            self._is_whole(folder, file)
        try:
            self._surroundings(folder, manifest)
        except StoreError as e:
            self._problem("unreadable", folder, str(e))

    def head(self, path: Path) -> None:
        self.n_seen += 1
        self._heads.add(path.parent.absolute())
        try:
            current = head_fingerprint(path.parent)
        except CorruptManifestError as e:
            self._problem("corrupt_head", path, f"{e}; materialize the partition again")
            return
        except StoreError as e:
            self._problem("unreadable", path, str(e))
            return
        if current is None:  # a link to nowhere, or removed since it was found
            self._heads.discard(path.parent.absolute())
            return
        folder = path.parent / current[:FOLDER_FINGERPRINT_LENGTH]
        try:
            manifest = read_manifest(folder)
        except NotCommittedError:
            message = f"{path} points to {folder}, which is not committed; materialize the partition again"
            self._problem("dangling_head", path, message)
        except StoreError:
            pass  # what is wrong with the result it points to is reported as that
        else:
            found = manifest.fingerprint
            if found != current:
                self._problem("dangling_head", path, f"{path} points to {current}, and {folder} holds {found}")
            elif (why := failed_check(manifest)) is not None:
                self._problem("failed_current", path, f"{path} points to {folder}, which readers refuse: {why}")

    def partitions(self) -> None:
        """Whether each partition in which something is committed has a current result."""
        for partition in sorted(self._partitions):
            has_head = partition in self._heads or _size_of(partition / HEAD_NAME) is not None
            if is_partition_folder(partition) and not has_head and not self._was_put_aside(partition):
                self._problem(
                    "no_head",
                    partition,
                    f"{partition} has committed results and no {HEAD_NAME}: readers see none of them; materialize the "
                    "partition again, which computes nothing",
                )

    def _was_put_aside(self, partition: Path) -> bool:
        """Whether a result of the partition was, and is not there again: what is left had been replaced by it."""
        if len(partition.parents) < 3:
            return False
        recipe_folder = partition.parents[2]
        return any(
            (recipe_folder / path).parent == partition
            and lines[-1]["event"] == QUARANTINE_EVENT
            and not self._seen.get(str(recipe_folder / path))
            for path, lines in self._audit_of(recipe_folder).items()
        )

    def missing(self, recipe_folder: Path, *, below: Path) -> None:
        """What the audit log says was committed at or below a folder and is not there."""
        root = recipe_folder.absolute()
        for path, lines in self._audit_of(root).items():
            folder = root / path
            if self._seen.get(str(folder)) or not folder.is_relative_to(below.absolute()):
                continue
            if lines[-1]["event"] == QUARANTINE_EVENT:
                if str(folder) not in self._seen:
                    why = f"was put aside on {lines[-1]['time']} ({lines[-1].get('why')})"
                    self._note("quarantined", folder, f"{folder} {why}, and has not been made again")
                continue
            self._problem(
                "missing_result",
                folder,
                f"{folder} was committed on {lines[-1]['time']} and is not there (any more); materialize partition "
                f"{folder.parent.name} again",
            )

    def compare_with_plan(self, recipe_folder: Path, *, below: Path) -> None:
        """Notes on what the recipe's plan names and an asset does not have, and the other way round; of each asset's
        latest variant only, since older ones are of older plans."""
        root = recipe_folder.absolute()
        try:
            plan = planned_partitions(root)
            if plan is not None:
                dict(plan.input_hashes)  # reads every block
        except CorruptPlanError as e:
            self._problem("corrupt_plan", e.path, str(e))
            return
        except StoreError as e:
            self._problem("unreadable", root / PLAN_FOLDER / PLAN_NAME, str(e))
            return
        if plan is None:
            return
        places = [Path(path).parts for path in self._audit_of(root)]
        latest = {parts[0]: parts[1] for parts in places if len(parts) == 4}
        for asset, variant in latest.items():
            folder = root / asset / variant
            if asset not in PARTITIONED or not folder.is_relative_to(below.absolute()):
                continue
            committed = [Path(path) for path, is_there in self._seen.items() if is_there]
            there = {result.parent.name for result in committed if result.parents[1] == folder}
            if missing := [key for key in plan.input_hashes if key not in there]:
                n_planned = len(plan.input_hashes)
                self._note("not_made", folder, f"{folder} lacks {_named(missing)} of the {n_planned} that are planned")
            if others := sorted(there - plan.input_hashes.keys()):
                self._note("not_planned", folder, f"{folder} has {_named(others)} that the plan does not name")

    def _audit_of(self, recipe_folder: Path) -> dict[str, list[dict[str, Any]]]:
        if recipe_folder not in self._audited:
            try:
                self._audited[recipe_folder] = _by_path(audited_events(recipe_folder))
            except StoreError as e:
                self._audited[recipe_folder] = {}
                self._problem("unreadable", recipe_folder / AUDIT_NAME, str(e))
        return self._audited[recipe_folder]

    def _place(self, folder: Path, manifest: Manifest) -> bool:
        """Whether the manifest is of the result that the folders above it name: readers believe the folders."""
        try:
            require_place(folder, manifest)
        except CorruptManifestError as e:
            self._problem("misplaced_result", folder, str(e))
            return False
        return True

    def _part(self, folder: Path, manifest: Manifest, record: PartRecord, document_ids: set[str]) -> None:
        path = folder / record.name
        if not self._is_whole(folder, record):
            return
        try:
            self._rows(path, manifest, record, document_ids)
        except ObstructedError as e:
            self._problem("missing_part", path, f"{e}; then materialize the partition again")
        except StoreError as e:
            self._problem("unreadable", path, str(e))

    def _index(self, folder: Path, manifest: Manifest, *, parts_are_whole: bool) -> None:
        """Whether the index, where there is one, is of this commit and says what the parts say."""
        path = folder / INDEX_NAME
        try:
            difference = index_difference(folder, manifest, with_parts=parts_are_whole)
        except ObstructedError as e:
            difference = str(e)
        except StoreError as e:
            self._problem("unreadable", path, str(e))
            return
        if difference is not None:
            self._problem("corrupt_index", path, difference)
        elif manifest.n_bytes > MOST_BYTES and has_index(manifest) and _size_of(path) is None:
            self._note(
                "no_index",
                path,
                f"{path} is missing: readers ask the parts, only slower; kd-assets index RECIPE writes it",
            )

    def _is_whole(self, folder: Path, record: PartRecord | FileBeside) -> bool:
        """Whether a file of a result has the bytes that its record is of; a problem is noted where it has not."""
        path = folder / record.name
        remedy = "remove this file and materialize the partition again: only what is missing is made"
        try:
            n_bytes = size_if_there(path, known=folder)
            if n_bytes is None:
                self._problem("missing_part", path, f"{path} is missing; materialize the partition again")
                return False
            if n_bytes != record.n_bytes:
                kind: ProblemKind = "truncated_part" if n_bytes < record.n_bytes else "grown_part"
                self._problem(kind, path, f"{path} has {n_bytes} bytes, expected {record.n_bytes}; {remedy}")
                return False
            digest = file_sha256(path)
            if digest != record.sha256:
                self._problem("changed_part", path, f"{path} has sha256 {digest}, expected {record.sha256}; {remedy}")
                return False
        except ObstructedError as e:
            self._problem("missing_part", path, f"{e}; then materialize the partition again")
            return False
        except StoreError as e:
            self._problem("unreadable", path, str(e))
            return False
        return True

    def _rows(self, path: Path, manifest: Manifest, record: PartRecord, document_ids: set[str]) -> None:
        """What the rows of a part say, compared with the manifest and the parts before it. The bytes are those that
        were written, so a difference is a bug of the task that wrote them."""
        remedy = "it was written so: move the result away and materialize the partition again"
        try:
            if expected_schema(manifest, 0) is None:
                return
        except (MissingParameterError, UnknownCodecError):  # reported once, of the manifest
            return
        try:
            with PartFile(path) as part:
                with damage_named(path):  # of columns that no codec makes of these
                    expected = expected_schema(manifest, hidden_size_of(part.schema))
                assert expected is not None
                if difference := schema_difference(expected, part.stored_schema):
                    self._problem("wrong_schema", path, f"{path}: {difference}; {remedy}")
                    return
                if part.n_rows != record.n_documents:
                    message = f"{path} has {part.n_rows} documents, expected {record.n_documents}; {remedy}"
                    self._problem("wrong_documents", path, message)
                    return
                n_tokens, wrong = part_difference(
                    part, manifest, _token_ids(manifest, path.parent), document_ids=document_ids
                )
                if wrong is not None:
                    kind, difference = wrong
                    self._problem(kind, path, f"{path}: {difference}; {remedy}")
                    return
        except CorruptPartError as e:
            self._problem("unreadable_part", path, f"{e}; {remedy}")
            return
        if n_tokens != record.n_tokens:
            self._problem("wrong_tokens", path, f"{path} has {n_tokens} tokens, expected {record.n_tokens}; {remedy}")

    def _surroundings(self, folder: Path, manifest: Manifest) -> None:
        files: tuple[PartRecord | FileBeside, ...] = (*manifest.parts, *manifest.files_beside)
        ours = {MANIFEST_NAME, INDEX_NAME, LEASE_NAME, JOURNAL_NAME, *(file.name for file in files)}
        names = listing(folder)
        for path in _foreign(folder, ours):
            self._note("foreign_file", path, f"{path} is not of this result")
        if JOURNAL_NAME in names:
            self._note(
                "interrupted_commit", folder, f"{folder} was committed and its task killed; reusing it tidies up"
            )
            return
        if len(folder.absolute().parents) < 4 or not is_variant_name(folder.absolute().parent.parent.name):
            return
        recipe_folder = recipe_folder_of(folder.absolute())
        lines = self._audit_of(recipe_folder).get(str(folder.absolute().relative_to(recipe_folder)))
        if lines is None:
            self._note("not_audited", folder, f"{folder} has no line in the audit log of {recipe_folder}")
        elif difference := _difference(lines, audit_record(folder.absolute(), manifest)):
            self._problem(
                "not_as_audited",
                folder / MANIFEST_NAME,
                f"{folder / MANIFEST_NAME} is not what was committed: {difference}; move {folder} away and materialize "
                "the partition again",
            )

    def _problem(self, kind: ProblemKind, path: Path, message: str) -> None:
        self.problems.append(Problem(kind=kind, path=path, message=message))

    def _note(self, kind: NoteKind, path: Path, message: str) -> None:
        self.notes.append(Note(kind=kind, path=path, message=message))


def _token_ids(manifest: Manifest, folder: Path) -> TokenIds | None:
    """Those that a cache is cut to; None of one that is not, or whose file of them is missing, of which others tell."""
    if manifest.params.get("vocabulary") is None:
        return None
    try:
        return vocabulary_of(manifest, folder)
    except MissingInputError:
        return None


def _foreign(folder: Path, ours: Set[str]) -> Iterator[Path]:
    """What is neither one of these files nor a folder that holds some, down to the folders that hold some."""
    holding = {str(above) for name in ours for above in PurePosixPath(name).parents}
    for inside in sorted(holding):
        for name in listing(folder / inside):
            below = str(PurePosixPath(inside) / name)
            if below not in ours and below not in holding:
                yield folder / below


def _by_path(lines: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        found.setdefault(line["path"], []).append(line)
    return found


def _difference(lines: list[dict[str, Any]], record: dict[str, Any]) -> str | None:
    """What a committed result has otherwise than the line of its commit; None where one of its lines is this record."""
    of_then = [line for line in lines if line["time"] == record["time"] and line["event"] == record["event"]]
    if not of_then:
        commits = [line["time"] for line in lines if line["event"] == record["event"]]
        return f"it is of {record['time']}, and was last committed on {commits[-1] if commits else 'no day'}"
    line = of_then[-1]
    for name in sorted(record.keys() & line.keys()):
        if record[name] != line[name]:
            return f"{name} is {record[name]!r:.80}, the audit log has {line[name]!r:.80}"
    return None


def _named(partition_keys: Sequence[str]) -> str:
    n = len(partition_keys)
    shown = ", ".join(partition_keys) if n <= MOST_NAMED else f"{partition_keys[0]} … {partition_keys[-1]}"
    return f"{n} partition{'s' if n > 1 else ''} ({shown})"
