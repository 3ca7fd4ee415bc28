"""The manifest: what a result is, written last. A result exists when its manifest does, and never before.

Also the head (which result of a partition is current) and the audit log (one line a commit). A manifest carries the
hash of itself, so that a changed byte anywhere in a result is found.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from kd_assets.contract import decode, parse_json
from kd_assets.durable import append_line, open_file, read_if_there, read_patiently, replace_file, size_if_there
from kd_assets.errors import ContractError, CorruptManifestError, NotCommittedError
from kd_assets.store.fingerprint import FORMAT_VERSION, data_version, fingerprint
from kd_assets.store.layout import (
    AUDIT_NAME,
    FOLDER_FINGERPRINT_LENGTH,
    HEAD_NAME,
    MANIFEST_NAME,
    is_file_name,
    recipe_folder_of,
)

T = TypeVar("T")

_SELF_HASH = "manifest_sha256"
FILES_FACT = "files"
"""The fact that names files beside the parts: name → `n_bytes` and `sha256`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartRecord:
    """One file of a result."""

    index: int
    name: str
    n_documents: int
    n_tokens: int
    n_bytes: int
    sha256: str
    stats: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class FileBeside:
    """A file that goes with a result and is none of its parts: nothing of its content depends on it."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A committed result."""

    format_version: int
    asset: str
    recipe: str
    partition_key: str
    variant: str
    fingerprint: str
    identity: dict[str, Any]
    data_version: str
    """Hash of the content; equal content has an equal one, whoever computed it and when."""
    n_documents: int
    n_tokens: int
    n_bytes: int
    """Of all part files."""
    parts: tuple[PartRecord, ...]
    stats: dict[str, float]
    """Of all parts: `max_…` the largest, `min_…` the smallest, `n_…` the sum."""
    checks: dict[str, Any]
    facts: dict[str, Any]
    """What the runner wants to tell about the result, such as counts of records that were kept out."""
    provenance: dict[str, Any]
    created_at: str
    """UTC, ISO 8601."""

    @property
    def params(self) -> dict[str, Any]:
        """The parameters that made the result, as its identity has them."""
        params = self.identity.get("params")
        return params if isinstance(params, dict) else {}

    @property
    def files_beside(self) -> tuple[FileBeside, ...]:
        """The files that its fact `files` names, in the order of their names; results of earlier versions have none."""
        files = self.facts.get(FILES_FACT)
        if not isinstance(files, dict):
            return ()
        named = ({**(said if isinstance(said, dict) else {}), "name": name} for name, said in sorted(files.items()))
        return tuple(decode(FileBeside, file, where=f"facts.{FILES_FACT}") for file in named)

    def to_json(self) -> str:
        raw = without_non_finite(dataclasses.asdict(self))
        return json.dumps(raw | {_SELF_HASH: fingerprint(raw)}, indent=1, sort_keys=True) + "\n"


def merge_stats(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Statistics of all parts from those of each. Raises ValueError for a name that does not say how to merge it."""
    merged: dict[str, float] = {}
    for stats in parts:
        for name, value in stats.items():
            if name.startswith("n_"):
                merged[name] = merged.get(name, 0.0) + value
            elif name.startswith("max_"):
                merged[name] = max(merged.get(name, value), value)
            elif name.startswith("min_"):
                merged[name] = min(merged.get(name, value), value)
            else:
                raise ValueError(f"statistic {name!r}: the name must start with n_, max_ or min_")
    return merged


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a result folder.

    Raises NotCommittedError where there is none, CorruptManifestError where it is not one of this format or
    contradicts itself.
    """
    path = folder / MANIFEST_NAME
    data = read_if_there(path)
    if data is None:
        raise NotCommittedError(
            f"{folder} has no {MANIFEST_NAME}: its job is still running or was killed; materialize it (again)"
        )
    return parse_manifest(data, path)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """The manifest in `data`, checked against itself. Raises CorruptManifestError, which names `path`."""
    try:
        raw = parse_json(data)
    except ValueError as e:
        raise CorruptManifestError(f"{path} is not JSON: {e}") from e
    found = raw.get("format_version") if isinstance(raw, dict) else raw
    if not isinstance(raw, dict) or type(found) is not int or found != FORMAT_VERSION:  # to Python, `true` is 1
        raise CorruptManifestError(
            f"{path} is of format version {found!r:.40}, this version of kd_assets reads {FORMAT_VERSION}"
        )
    claimed = raw.pop(_SELF_HASH, None)
    try:
        found = fingerprint(raw)
    except RecursionError as e:  # shallow enough to be read, and too deep to be written
        raise CorruptManifestError(f"{path} is nested too deep to be a manifest of ours") from e
    if claimed != found:
        raise CorruptManifestError(
            f"{path} was changed after it was written: its {_SELF_HASH} is not that of its content"
        )
    try:
        manifest = decode(Manifest, raw, where=str(path))
        contradiction = _contradiction(manifest)
    except ContractError as e:
        raise CorruptManifestError(str(e)) from e
    if contradiction:
        raise CorruptManifestError(f"{path} contradicts itself: {contradiction}")
    return manifest


def _contradiction(manifest: Manifest) -> str | None:
    """What cannot be true of a manifest that we wrote; None when all is well."""
    parts = manifest.parts
    if [part.index for part in parts] != list(range(len(parts))):
        return f"parts {[part.index for part in parts]} are not 0 to {len(parts) - 1}"
    if odd_name := _odd_name([*(part.name for part in parts), *(file.name for file in manifest.files_beside)]):
        return odd_name
    for name in ("n_documents", "n_tokens", "n_bytes"):
        total, summed = getattr(manifest, name), sum(getattr(part, name) for part in parts)
        if total != summed:
            return f"{name} is {total}, its parts have {summed}"
    if manifest.fingerprint != fingerprint(manifest.identity):
        return "fingerprint is not that of identity"
    if manifest.data_version != data_version(manifest.asset, [part.sha256 for part in parts]):
        return "data_version is not that of its parts"
    return None


def _odd_name(names: Sequence[str]) -> str | None:
    if odd := [name for name in names if not is_file_name(name)]:
        return f"a part is named {odd[0]!r:.80}"
    return "two parts have one name" if len(set(names)) < len(names) else None


def committed(folder: Path, fingerprint: str) -> Manifest | None:
    """The manifest when the folder holds the committed result of this fingerprint, else None.

    A result whose files are missing or of another size counts as not committed, so that a rerun mends it. Raises
    CorruptManifestError when the folder holds another result: it is never overwritten; and StorageUnreachableError when
    the store is not there to be looked at.
    """
    path = folder / MANIFEST_NAME
    # The recipe's folder is as old as its shard plan.
    data = read_if_there(path, known=recipe_folder_of(folder))
    if data is None:
        return None
    manifest = parse_manifest(data, path)
    if manifest.fingerprint != fingerprint:
        raise CorruptManifestError(
            f"{path} is of fingerprint {manifest.fingerprint}, expected {fingerprint}: something else is in this "
            "folder; move it away"
        )
    files: tuple[PartRecord | FileBeside, ...] = (*manifest.parts, *manifest.files_beside)
    is_whole = all(size_if_there(folder / file.name, known=folder) == file.n_bytes for file in files)
    return manifest if is_whole else None


def read_head(partition_folder: Path) -> Path | None:
    """The folder of the partition's current result; None when nothing was committed. Raises CorruptManifestError."""
    current = head_fingerprint(partition_folder)
    return None if current is None else partition_folder / current[:FOLDER_FINGERPRINT_LENGTH]


def head_fingerprint(partition_folder: Path) -> str | None:
    """The fingerprint in the partition's head; None when there is no head. Raises CorruptManifestError."""
    path = partition_folder / HEAD_NAME
    data = read_if_there(path)
    if data is None:
        return None
    try:
        current = parse_json(data)["fingerprint"]
        if not isinstance(current, str) or len(current) != 64:
            raise ValueError(f"fingerprint is {current!r:.80}")
    except (ValueError, KeyError, TypeError) as e:
        raise CorruptManifestError(f"{path} is no head: {e}") from e
    return current


def write_head(folder: Path, fingerprint: str) -> None:
    """Make the result in `folder` its partition's current one; nothing is written when it already is."""
    try:
        if head_fingerprint(folder.parent) == fingerprint:
            return
    except CorruptManifestError:
        pass  # it is replaced
    replace_file(folder.parent / HEAD_NAME, json.dumps({"fingerprint": fingerprint}).encode() + b"\n")


def append_audit(recipe_folder: Path, record: Mapping[str, Any]) -> None:
    """Append one line to the recipe's audit log; nothing in it is ever changed."""
    append_line(recipe_folder / AUDIT_NAME, without_non_finite(dict(record)))


def audit_commit(folder: Path, manifest: Manifest) -> None:
    """Append the line of this commit to the audit log of its recipe."""
    append_audit(recipe_folder_of(folder), audit_record(folder, manifest))


def audit_record(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The line of this commit."""
    path, time = _commit_of(folder, manifest)
    record: dict[str, Any] = {"event": COMMIT_EVENT, "time": time, "path": path}
    return record | {name: getattr(manifest, name) for name in _AUDITED}


def is_audited(folder: Path, manifest: Manifest) -> bool:
    """Whether the audit log has the line of this commit. Reads all of the log: for what a kill left open, and never for
    a commit that this process has just made, whose line cannot be there."""
    record = without_non_finite(audit_record(folder, manifest))
    lines = audited_commits(recipe_folder_of(folder), mentioning=folder.name)
    # All of it: a result that was removed and made again may be of the same second.
    return any(all(record[name] == line[name] for name in record.keys() & line.keys()) for line in lines)


COMMIT_EVENT, QUARANTINE_EVENT = "commit", "quarantine"


def audited_commits(recipe_folder: Path, *, mentioning: str = "") -> list[dict[str, Any]]:
    """The lines of commits of the audit log that mention this text (ASCII), each with `path` and `time`."""
    return [line for line in audited_events(recipe_folder, mentioning=mentioning) if line["event"] == COMMIT_EVENT]


def audited_events(recipe_folder: Path, *, mentioning: str = "") -> list[dict[str, Any]]:
    """The lines of the audit log that mention this text (ASCII), each with `event`, `path` and `time`; what is no such
    line, torn ones among them, is passed over."""
    return audited(recipe_folder, lambda record: record, mentioning=mentioning)


def audited(recipe_folder: Path, take: Callable[[dict[str, Any]], T | None], *, mentioning: str = "") -> list[T]:
    """What `take` makes of each line that `audited_events` gives, without those of which it makes None: so that little
    of a long log is in memory."""
    path = recipe_folder / AUDIT_NAME

    def read() -> list[T]:
        found = []
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), open_file(path) as lines:
            for line in lines:
                if mentioning.encode() not in line:
                    continue
                try:
                    record = parse_json(line)
                    if not all(isinstance(record[name], str) for name in ("event", "path", "time")):
                        continue
                except (ValueError, LookupError, TypeError):
                    continue
                if (taken := take(record)) is not None:
                    found.append(taken)
        return found

    return read_patiently(read, path)


_AUDITED = (
    "recipe",
    "asset",
    "partition_key",
    "variant",
    "fingerprint",
    "data_version",
    "n_documents",
    "n_tokens",
    "n_bytes",
    "provenance",
)
"""What a line of the audit log has of the manifest, besides where and when."""


def _commit_of(folder: Path, manifest: Manifest) -> tuple[str, str]:
    """What tells a commit from all others: a result that was damaged and made again is committed a second time."""
    return str(folder.relative_to(recipe_folder_of(folder))), manifest.created_at


def without_non_finite(value: Any) -> Any:
    """A copy of a JSON value in which NaN and infinity, which JSON lacks, are null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {str(key): without_non_finite(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [without_non_finite(item) for item in value]
    return value
