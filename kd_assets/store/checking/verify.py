"""Every hash and every count of results on disk, compared with what their manifests say.

Problems name the file and what to do; notes are what a person may want to know and nothing is wrong with: results that
are still being made, files that are not of the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd_assets.durable import file_sha256, listing, size_if_there
from kd_assets.errors import (
    CorruptManifestError,
    CorruptPartError,
    NotCommittedError,
    StorageUnavailableError,
    StoreError,
)
from kd_assets.store.checking.rows import (
    MissingParameterError,
    draws_difference,
    expected_schema,
    part_documents,
    schema_difference,
)
from kd_assets.store.layout import (
    FOLDER_FINGERPRINT_LENGTH,
    JOURNAL_NAME,
    LEASE_NAME,
    MANIFEST_NAME,
    count_durable_files,
    head_files,
    is_variant_name,
    recipe_folder_of,
    require_folder,
    result_folders,
)
from kd_assets.store.manifest import Manifest, PartRecord, audited_commits, head_fingerprint, read_manifest
from kd_assets.store.partfile import PartFile
from kd_assets.store.recorded_checks import draws_of
from kd_assets.store.schema import hidden_size_of

ProblemKind = Literal[
    "missing_part",  # a file the manifest lists is not there
    "truncated_part",  # it is shorter than recorded
    "grown_part",  # it is longer
    "changed_part",  # its size is right and its hash is not
    "unreadable_part",  # its hash is right and it is no table
    "wrong_schema",  # it is a table of other columns
    "wrong_documents",  # it has another number of documents than recorded
    "wrong_tokens",  # it has another number of tokens, or they contradict each other
    "wrong_draws",  # its random draws are not what the cache's parameters ask for
    "corrupt_manifest",  # not JSON, changed, or contradicting itself
    "wrong_identity",  # a manifest whose identity lacks what tells the columns
    "misplaced_result",  # a manifest under a folder name of another result
    "corrupt_head",  # a head.json that is none
    "dangling_head",  # a head.json that points to no committed result
    "unreadable",  # the file system does not let us look
]
NoteKind = Literal[
    "unfinished",  # no manifest: still being made, or killed
    "interrupted_commit",  # committed, and killed before head, audit line or clean-up
    "foreign_file",  # not of the format, in a folder of the format
    "not_audited",  # committed without a line in the recipe's audit log
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """Something that is wrong with a file."""

    kind: ProblemKind
    path: Path
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """Something that is not wrong, and worth a line."""

    kind: NoteKind
    path: Path
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyReport:
    """What was looked at and what was found. Totals are of committed results."""

    path: Path
    n_results: int
    n_parts: int
    n_documents: int
    n_tokens: int
    n_bytes: int
    problems: tuple[Problem, ...]
    notes: tuple[Note, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(path: Path) -> VerifyReport:
    """Verify all results at or below `path`: a result folder, or any folder above, up to a store's root.

    Raises MissingInputError when there is no such folder, NotCommittedError when it holds nothing of a store.
    """
    require_folder(path)
    verifier = _Verifier()
    for folder in result_folders(path):
        verifier.result(folder)
    for head in head_files(path):
        verifier.head(head)
    if not verifier.n_seen and not verifier.problems:
        raise NotCommittedError(f"{path} holds no results: give a result folder, a recipe's folder or a store's root")
    return verifier.report(path)


class _Verifier:
    """Collects problems, notes and totals over results."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.notes: list[Note] = []
        self.n_seen = 0
        self._manifests: list[Manifest] = []
        self._audited: dict[Path, set[tuple[str, str]]] = {}

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

    def result(self, folder: Path) -> None:
        self.n_seen += 1
        try:
            manifest = read_manifest(folder)
        except NotCommittedError:
            n_parts = count_durable_files([folder])
            self._note(
                "unfinished", folder, f"unfinished: {n_parts} part files and no manifest; a rerun goes on from here"
            )
            return
        except CorruptManifestError as e:
            self._problem("corrupt_manifest", folder / MANIFEST_NAME, f"{e}; remove it and materialize again")
            return
        except StorageUnavailableError as e:
            self._problem("unreadable", folder / MANIFEST_NAME, str(e))
            return
        self._manifests.append(manifest)
        self._place(folder, manifest)
        try:
            expected_schema(manifest, 0)
        except MissingParameterError as e:
            path = folder / MANIFEST_NAME
            self._problem("wrong_identity", path, f"{path}: {e}; it was written so: materialize it again elsewhere")
        for record in manifest.parts:
            self._part(folder, manifest, record)
        try:
            self._surroundings(folder, manifest)
        except StorageUnavailableError as e:
            self._problem("unreadable", folder, str(e))

    def head(self, path: Path) -> None:
        self.n_seen += 1
        try:
            current = head_fingerprint(path.parent)
        except CorruptManifestError as e:
            self._problem("corrupt_head", path, f"{e}; materialize the partition again")
            return
        except StorageUnavailableError as e:
            self._problem("unreadable", path, str(e))
            return
        if current is None:  # removed since it was found
            return
        folder = path.parent / current[:FOLDER_FINGERPRINT_LENGTH]
        try:
            found = read_manifest(folder).fingerprint
        except NotCommittedError:
            message = f"{path} points to {folder}, which is not committed; materialize the partition again"
            self._problem("dangling_head", path, message)
        except StoreError:
            pass  # what is wrong with the result it points to is reported as that
        else:
            if found != current:
                self._problem("dangling_head", path, f"{path} points to {current}, and {folder} holds {found}")

    def _place(self, folder: Path, manifest: Manifest) -> None:
        """The manifest must be of the result that the folders above it name: readers believe the folders."""
        absolute = folder.absolute()
        expected = [
            manifest.fingerprint[:FOLDER_FINGERPRINT_LENGTH],
            manifest.partition_key,
            manifest.variant,
            manifest.asset,
        ]
        found = [absolute.name, *(parent.name for parent in absolute.parents[:3])]
        if not is_variant_name(found[2]):  # a copy outside a store: only its own name can be compared
            expected, found = expected[:1], found[:1]
        if expected != found:
            place = "/".join(reversed(expected))
            self._problem("misplaced_result", folder, f"{folder} holds the result {place}; move it there")

    def _part(self, folder: Path, manifest: Manifest, record: PartRecord) -> None:
        path = folder / record.name
        remedy = "remove this file and materialize the partition again: only what is missing is made"
        try:
            n_bytes = size_if_there(path)
            if n_bytes is None:
                self._problem("missing_part", path, f"{path} is missing; materialize the partition again")
                return
            if n_bytes != record.n_bytes:
                kind: ProblemKind = "truncated_part" if n_bytes < record.n_bytes else "grown_part"
                self._problem(kind, path, f"{path} has {n_bytes} bytes, expected {record.n_bytes}; {remedy}")
                return
            digest = file_sha256(path)
            if digest != record.sha256:
                self._problem("changed_part", path, f"{path} has sha256 {digest}, expected {record.sha256}; {remedy}")
                return
            self._rows(path, manifest, record)
        except StorageUnavailableError as e:
            self._problem("unreadable", path, str(e))

    def _rows(self, path: Path, manifest: Manifest, record: PartRecord) -> None:
        """What the rows of a part say, compared with the manifest. The bytes are those that were written, so a
        difference is a bug of the task that wrote them."""
        remedy = "it was written so: move the result away and materialize the partition again"
        try:
            if expected_schema(manifest, 0) is None:
                return
        except MissingParameterError:  # reported once, of the manifest
            return
        try:
            with PartFile(path) as part:
                expected = expected_schema(manifest, hidden_size_of(part.schema))
                assert expected is not None
                if difference := schema_difference(expected, part.schema):
                    self._problem("wrong_schema", path, f"{path}: {difference}; {remedy}")
                    return
                if part.n_rows != record.n_documents:
                    message = f"{path} has {part.n_rows} documents, expected {record.n_documents}; {remedy}"
                    self._problem("wrong_documents", path, message)
                    return
                n_tokens = int(part_documents(part)[1].sum())
                if (draws := draws_of(manifest)) and (
                    difference := draws_difference(part, draws, manifest.facts.get("vocab_size"))
                ):
                    self._problem("wrong_draws", path, f"{path}: {difference}; {remedy}")
                    return
        except CorruptPartError as e:
            kind: ProblemKind = "wrong_tokens" if "n_tokens differs" in str(e) else "unreadable_part"
            self._problem(kind, path, f"{e}; {remedy}")
            return
        if n_tokens != record.n_tokens:
            self._problem("wrong_tokens", path, f"{path} has {n_tokens} tokens, expected {record.n_tokens}; {remedy}")

    def _surroundings(self, folder: Path, manifest: Manifest) -> None:
        ours = {MANIFEST_NAME, LEASE_NAME, JOURNAL_NAME, *(record.name for record in manifest.parts)}
        names = listing(folder)
        for name in names:
            if name not in ours:
                self._note("foreign_file", folder / name, f"{folder / name} is not of this result")
        if JOURNAL_NAME in names:
            self._note(
                "interrupted_commit", folder, f"{folder} was committed and its task killed; reusing it tidies up"
            )
            return
        if len(folder.absolute().parents) < 4 or not is_variant_name(folder.absolute().parent.parent.name):
            return
        recipe_folder = recipe_folder_of(folder.absolute())
        if recipe_folder not in self._audited:
            self._audited[recipe_folder] = audited_commits(recipe_folder)
        line = (str(folder.absolute().relative_to(recipe_folder)), manifest.created_at)
        if line not in self._audited[recipe_folder]:
            self._note("not_audited", folder, f"{folder} has no line in the audit log of {recipe_folder}")

    def _problem(self, kind: ProblemKind, path: Path, message: str) -> None:
        self.problems.append(Problem(kind=kind, path=path, message=message))

    def _note(self, kind: NoteKind, path: Path, message: str) -> None:
        self.notes.append(Note(kind=kind, path=path, message=message))
