"""Which files a source is made of: of a path, a folder, a pattern, a URL or a data set.

Used by the planner; imports neither torch nor transformers. What a folder holds besides data is left out and said, what
cannot be told is refused: nothing is dropped in silence.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kd_assets.contract import FileFormat
from kd_assets.durable import storage_errors
from kd_assets.errors import InputError, MissingInputError
from kd_assets.sources.files.data_sets import find_data_set, find_saved
from kd_assets.sources.files.formats import (
    KNOWN_SUFFIXES,
    SAVED_SPLITS,
    SAVED_STATE,
    compression_of,
    format_of_content,
    format_of_name,
)
from kd_assets.sources.files.found import FoundSource, SourceFile
from kd_assets.sources.files.storage import (
    changed_of,
    file_system,
    is_url,
    local_path,
    remote_errors,
    remote_info,
)
from kd_assets.sources.spec import SourceSpec, absolute_path, with_variables

PLAIN_TEXT = (".txt", ".md", ".rst")
"""What people have their texts in, and no format of records."""


def find_source(spec: SourceSpec, *, base_folder: Path, environment: Mapping[str, str]) -> FoundSource:
    """The files of a source. Relative paths start from `base_folder`; `environment` says what `$NAME` stands for.

    Raises MissingInputError where there are none, InputError for files that no format is known for,
    StorageUnreachableError where their storage does not answer.
    """
    if spec.dataset is not None:
        return find_data_set(spec.dataset, base_folder=base_folder, environment=environment)
    if spec.path is None:
        raise MissingInputError(f"source {spec.name!r} has neither a path nor a dataset: give one")
    what = f"source {spec.name!r}"
    path = with_variables(spec.path, what=what, environment=environment)
    if is_url(path):
        return _found(_remote_files(path), spec.file_format, path)
    local = absolute_path(local_path(path), base_folder, what=what)
    if (saved := _saved_to_disk(local)) is not None:
        return saved
    return _found(_local_files(local), spec.file_format, str(local))


def _saved_to_disk(path: Path) -> FoundSource | None:
    """What a plain path to a folder of `datasets.save_to_disk` names."""
    if not any(os.path.isfile(path / name) for name in (SAVED_STATE, SAVED_SPLITS)):
        return None
    return find_saved(path, split=None)


# ---------------------------------------------------------------------- candidates


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    name: str
    path: str
    n_bytes: int
    changed: str


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidates:
    files: Sequence[_Candidate]
    kind: Literal["file", "folder", "pattern"]


_NO_DATA = re.compile(
    r"(?i)^([._].*|(readme|licen[sc]e|notice|changelog|citation|croissant)(\..*)?|.*\.(md|crc|lock)"
    r"|(dataset_infos?|dataset_dict|state)\.json)$"
)
"""Names in a folder that are no data: hidden ones, those of Spark (`_SUCCESS`), and what goes with a data set."""
_MAGIC = re.compile(r"[*?\[]")


def _local_files(path: Path) -> _Candidates:
    with storage_errors(path, "read"):
        try:
            mode = path.stat().st_mode
        except OSError as e:
            if e.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                raise
            if not _MAGIC.search(str(path)):
                raise MissingInputError(
                    f"source file {path} cannot be read: {e.strerror}; create it, or correct its path in the recipe"
                ) from e
            root = _fixed_part(str(path))
            found = sorted(glob.glob(str(path), recursive=True))
            return _Candidates(
                files=[
                    _candidate(os.path.relpath(file, root), Path(file)) for file in found if not os.path.isdir(file)
                ],
                kind="pattern",
            )
        if not stat.S_ISDIR(mode):
            return _Candidates(files=[_candidate("", path)], kind="file")
        files = [_candidate(str(file.relative_to(path)), file) for file in _walk(path, frozenset())]
        return _Candidates(files=files, kind="folder")


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """Every file of a folder and those below it, links to folders followed, unless they lead back."""
    real = os.path.realpath(folder)
    if real in above:
        return
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir():
            yield Path(entry.path)
        elif not _NO_DATA.match(entry.name):
            yield from _walk(Path(entry.path), above | {real})


def _candidate(name: str, path: Path) -> _Candidate:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise MissingInputError(f"source {path} is not a regular file: take it out of the source")
    return _Candidate(name=name, path=str(path), n_bytes=status.st_size, changed=str(status.st_mtime_ns))


def _fixed_part(pattern: str) -> str:
    """The folder of a pattern that is above everything it matches."""
    found = _MAGIC.search(pattern)
    assert found is not None
    return pattern[: found.start()].rpartition("/")[0] or "/"


def _remote_files(url: str) -> _Candidates:
    fs, path = file_system(url)
    is_pattern = bool((re.compile(r"[*\[]") if url.startswith("http") else _MAGIC).search(path))
    with remote_errors(url):
        if is_pattern:
            root, listed = _fixed_part(path), fs.glob(path, detail=True)
        elif (info := remote_info(url)).get("type") == "directory":
            root, listed = path, fs.find(path, detail=True)
        else:
            file = _Candidate(name="", path=url, n_bytes=info["size"], changed=changed_of(info))
            return _Candidates(files=[file], kind="file")
        files = [
            _remote_candidate(name[len(root) :].lstrip("/"), fs.unstrip_protocol(name), info)
            for name, info in sorted(listed.items())
            if info.get("type") != "directory"
        ]
    return _Candidates(files=files, kind="pattern" if is_pattern else "folder")


def _remote_candidate(name: str, url: str, listed: dict[str, Any]) -> _Candidate:
    # Only an ETag is the same in a listing and in what is asked of one object.
    info = listed if listed.get("ETag") else remote_info(url)
    return _Candidate(name=name, path=url, n_bytes=info["size"], changed=changed_of(info))


# ---------------------------------------------------------------------- those that are data


def _found(candidates: _Candidates, wanted: FileFormat | Literal["auto"], where: str) -> FoundSource:
    is_folder = candidates.kind == "folder"
    left_out = [c for c in candidates.files if is_folder and _NO_DATA.match(os.path.basename(c.name))]
    left_out_paths = {c.path for c in left_out}
    kept = [c for c in candidates.files if c.path not in left_out_paths]
    formats = {c.path: format_of_name(c.path) if wanted == "auto" else wanted for c in kept}
    unknown = [c.name for c in kept if formats[c.path] is None and is_folder]
    if unknown:
        shown = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
        others = f"Name the others by a pattern (such as {where.rstrip('/')}/**/*.jsonl)"
        if len(unknown) == len(kept):
            others = f"Names of data end in {', '.join(KNOWN_SUFFIXES)}"
        if any(name.endswith(PLAIN_TEXT) for name in unknown):
            others += '. Plain texts are not read: write each as a line of JSON, {"text": …}'
        raise InputError(
            f"source {where} has files of no known format: {shown}. {others}; where names do not tell it, set the "
            "source's format"
        )
    if not kept:
        what = {"pattern": "no file matches", "folder": "no data file is in", "file": "there is no"}[candidates.kind]
        raise MissingInputError(f"{what} {where}: create one, or correct the source's path in the recipe")
    return FoundSource(
        files=tuple(sorted((_source_file(c, formats[c.path] or "jsonl") for c in kept), key=lambda f: f.name)),
        licence=next((_card_licence(c.path) for c in left_out if c.name == "README.md"), None),
        said=(f"left out of {where}: {', '.join(c.name for c in left_out)}",) if left_out else (),
    )


def _source_file(candidate: _Candidate, file_format: FileFormat) -> SourceFile:
    compression = compression_of(candidate.path) if file_format not in ("parquet", "arrow") else None
    if file_format == "json" and candidate.n_bytes:
        file_format = format_of_content(candidate.path, compression)
    return SourceFile(
        name=candidate.name,
        path=candidate.path,
        file_format=file_format,
        compression=compression,
        n_bytes=candidate.n_bytes,
        changed=candidate.changed,
    )


def _card_licence(path: str) -> str | None:
    from kd_assets.sources.files.formats import licence_of_card
    from kd_assets.sources.files.storage import open_source

    with open_source(path) as f:
        return licence_of_card(f.read(1 << 20).decode("utf-8", "replace"))
