"""An export's folder: what it says of itself (`export.json`, written last), and how a killed export goes on.

A folder without `export.json` is no export. While one is made, `.export-journal.jsonl` has a line for each section
whose files are whole, with their sizes and hashes: what is not in it is made again. The invariant: nothing is written
into a folder that holds anything else than this very export, and what `export.json` says of its files is true.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kd_assets.contract import parse_json
from kd_assets.durable import (
    TEMPORARY_SUFFIX,
    append_line,
    atomic_write,
    file_sha256,
    listing,
    mode_if_there,
    prepare_folder,
    read_if_there,
    remove_file,
    size_if_there,
    storage_errors,
)
from kd_assets.errors import CorruptPartError, ExportFolderError, NotCommittedError, StoreError
from kd_assets.export.format import LeftOut
from kd_assets.store import fingerprint
from kd_assets.store.computing_versions import EXPORT_VERSION

EXPORT_NAME = "export.json"
JOURNAL_NAME = ".export-journal.jsonl"
LEASE_NAME = ".export.lease"
_OWN = (EXPORT_NAME, JOURNAL_NAME, LEASE_NAME)

_SELF_HASH = "export_sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportedFile:
    """One file of an export."""

    n_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """A whole export: what its `export.json` says."""

    folder: Path
    export_format: str
    recipe: str
    fingerprint: str
    """Of format, options and the content of the caches: equal ones have equal files."""
    n_documents: int
    n_tokens: int
    files: Mapping[str, ExportedFile]
    """By name relative to the folder, sorted."""
    said: Mapping[str, Any] = field(repr=False)
    """All of the file."""

    @property
    def n_bytes(self) -> int:
        return sum(file.n_bytes for file in self.files.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class JournalLine:
    """A section whose files are whole."""

    split: str
    index: int
    partition_key: str
    n_documents: int
    n_tokens: int
    files: dict[str, ExportedFile]
    """By name relative to the folder of the split."""
    left_out: dict[str, LeftOut] = field(default_factory=dict)
    """By reason."""


def read_export(folder: Path) -> Exported:
    """What is in the folder. Raises NotCommittedError where there is no export, StoreError where it is damaged."""
    path = folder / EXPORT_NAME
    data = read_if_there(path)
    if data is None:
        raise NotCommittedError(f"{folder} has no {EXPORT_NAME}: it is no export, or one that is not finished yet")
    try:
        raw = parse_json(data)
        claimed = raw.pop(_SELF_HASH, None)
        if claimed != fingerprint(raw) or raw["export_version"] != EXPORT_VERSION:
            raise ValueError("its hash is not that of its content, or it is of another version")
        return Exported(
            folder=folder,
            export_format=raw["format"],
            recipe=raw["recipe"],
            fingerprint=raw["fingerprint"],
            n_documents=raw["n_documents"],
            n_tokens=raw["n_tokens"],
            files={name: ExportedFile(**file) for name, file in sorted(raw["files"].items())},
            said=raw,
        )
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise StoreError(f"{path} is not what was written ({e}): export into another folder") from e


def write_export(folder: Path, said: Mapping[str, Any]) -> None:
    """Write `export.json`: from here on the folder is an export."""
    raw = json.loads(json.dumps(said))
    text = json.dumps(raw | {_SELF_HASH: fingerprint(raw)}, indent=1, sort_keys=True)
    atomic_write(folder / EXPORT_NAME, text.encode() + b"\n")


def verify_export(folder: Path) -> Exported:
    """The export, every file read and compared. Raises CorruptPartError for the first that is not what was written."""
    exported = read_export(folder)
    for name, file in exported.files.items():
        if why := damage(folder / name, file):
            raise CorruptPartError(f"{folder / name}: {why}; export into another folder")
    return exported


def damage(path: Path, file: ExportedFile) -> str | None:
    """Why the file is not the one that was written; None when it is."""
    n_bytes = size_if_there(path) if mode_if_there(path.parent) is not None else None
    if n_bytes is None:
        return "it is missing"
    if n_bytes != file.n_bytes:
        return f"it has {n_bytes} bytes, expected {file.n_bytes}"
    digest = file_sha256(path)
    return None if digest == file.sha256 else f"it has sha256 {digest}, expected {file.sha256}"


def found_in(folder: Path, expected: str) -> Exported | None:
    """The export of this fingerprint that is whole in the folder already; None where it is to be made or to go on.

    Raises ExportFolderError where anything else is in the folder, and where it is no folder.
    """
    mode = mode_if_there(folder)
    names = listing(folder)
    if mode is not None and not folder.is_dir():
        raise ExportFolderError(f"{folder} is no folder: choose another one")
    if EXPORT_NAME in names:
        exported = read_export(folder)
        if exported.fingerprint != expected:
            raise ExportFolderError(
                f"{folder} holds another export ({exported.export_format} of recipe {exported.recipe}, fingerprint "
                f"{exported.fingerprint[:12]}; this would be {expected[:12]}): choose another folder"
            )
        return exported
    if (found := _journal_fingerprint(folder)) is not None:
        if found != expected:
            raise ExportFolderError(
                f"{folder} holds an unfinished export of fingerprint {found[:12]}, this would be {expected[:12]}: "
                "the caches or the options are others than when it was begun; remove it, or choose another folder"
            )
        return None
    if foreign := [name for name in names if name not in _OWN]:
        raise ExportFolderError(f"{folder} holds other files, such as {foreign[0]!r}: choose an empty folder")
    return None


class Journal:
    """The journal of an export that is being made; `open` begins it, or goes on with it."""

    def __init__(self, folder: Path, export_fingerprint: str) -> None:
        self._folder, self._path, self._fingerprint = folder, folder / JOURNAL_NAME, export_fingerprint
        self.finished: dict[tuple[str, int], JournalLine] = {}
        """By split and index; every file of theirs was verified."""
        self._is_new = False

    def open(self) -> None:
        """Take stock of what an earlier attempt left: its whole sections stand, temporary files go."""
        prepare_folder(self._folder)
        if _journal_fingerprint(self._folder) is None:  # none, or a kill or a full disk cut its first line off
            self._is_new = True
            remove_file(self._path)
            append_line(self._path, {"fingerprint": self._fingerprint})
            return
        for path in _files_below(self._folder):
            if path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX):
                remove_file(path)
        for line in self._lines():
            folder = self._folder / line.split if line.split else self._folder
            if all(damage(folder / name, file) is None for name, file in line.files.items()):
                self.finished[line.split, line.index] = line

    def append(self, line: JournalLine) -> None:
        # A list: a line's keys are sorted, and a format may go by the order of its names.
        files = [[name, file.n_bytes, file.sha256] for name, file in line.files.items()]
        left_out = {why: asdict(left_out) for why, left_out in line.left_out.items()}
        append_line(
            self._path,
            {
                "split": line.split,
                "index": line.index,
                "partition_key": line.partition_key,
                "n_documents": line.n_documents,
                "n_tokens": line.n_tokens,
                "files": files,
                "left_out": left_out,
            },
        )
        self.finished[line.split, line.index] = line

    def close(self) -> None:
        """The export is whole: its own word is in `export.json`."""
        remove_file(self._path)

    def abandon(self) -> None:
        """Leave the folder as it was found, empty, where this attempt began it and no section is whole yet."""
        if not self.finished:
            self.take_back()

    def take_back(self) -> None:
        """Leave the folder as it was found, empty, where this attempt began it: nothing came of its sections."""
        if not self._is_new:
            return
        for path in _files_below(self._folder):
            if path.name != LEASE_NAME:
                remove_file(path)
        folders = sorted((path for path in self._folder.rglob("*") if path.is_dir()), reverse=True)
        for folder in folders:
            folder.rmdir()

    def _lines(self) -> Iterator[JournalLine]:
        """Whole records; what a kill left of one is passed over."""
        for text in (read_if_there(self._path) or b"").splitlines()[1:]:
            try:
                raw = parse_json(text)
                files = {name: ExportedFile(n_bytes=n, sha256=sha256) for name, n, sha256 in raw["files"]}
                left_out = {why: LeftOut(**said) for why, said in raw.get("left_out", {}).items()}
                yield JournalLine(**{**raw, "files": files, "left_out": left_out})
            except (ValueError, LookupError, TypeError, AttributeError):
                continue


def hashed(
    folder: Path, names: Sequence[str], known: Mapping[str, str] = MappingProxyType({})
) -> dict[str, ExportedFile]:
    """Size and hash of these files; those whose hash is not known are read whole. Raises StoreError where one is
    missing."""
    found = {}
    for name in names:
        n_bytes = size_if_there(folder / name)
        if n_bytes is None:
            raise StoreError(f"{folder / name} was to be written, and is not there")
        found[name] = ExportedFile(n_bytes=n_bytes, sha256=known.get(name) or file_sha256(folder / name))
    return found


def sweep(folder: Path) -> None:
    """Remove what a kill has left beside a whole export: its journal, its lease, and writes that were cut off."""
    for path in _files_below(folder):
        if path.name.startswith(".") and path.name.endswith(TEMPORARY_SUFFIX):
            remove_file(path)
    for name in (JOURNAL_NAME, LEASE_NAME):
        remove_file(folder / name)


def discard(folder: Path) -> None:
    """Remove an export, its journal and its `export.json` last: what a kill leaves of it is known for an export."""
    with storage_errors(folder, "remove"):
        for name, is_folder in listing(folder).items():
            path = folder / name
            if is_folder and not path.is_symlink():
                shutil.rmtree(path)
            elif name not in (JOURNAL_NAME, EXPORT_NAME):
                path.unlink()
        for name in (JOURNAL_NAME, EXPORT_NAME):
            (folder / name).unlink(missing_ok=True)
        if folder.exists():
            folder.rmdir()


def is_begun(folder: Path) -> bool:
    """Whether an export in the folder is whole, or can be gone on with."""
    return EXPORT_NAME in listing(folder) or _journal_fingerprint(folder) is not None


def _journal_fingerprint(folder: Path) -> str | None:
    """None where there is no journal, and where its first line is not whole: nothing was written after it then."""
    first, end, _ = (read_if_there(folder / JOURNAL_NAME) or b"").partition(b"\n")
    try:
        return str(parse_json(first)["fingerprint"]) if end else None
    except (ValueError, LookupError, TypeError):
        return None


def _files_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]
