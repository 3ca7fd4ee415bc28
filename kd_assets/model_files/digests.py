"""SHA-256 of large files: from a Hugging Face blob's own name, from a cache, else by reading them once for all nodes.

Anyone may import it; standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_assets.durable import open_file, replace_file
from kd_assets.errors import InputError, StorageUnavailableError
from kd_assets.locks import locked
from kd_assets.model_files.reading import reading_errors

CHUNK_BYTES = 1 << 22

SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again under the same time stamp (NFS and FAT keep whole seconds), so
its digest is not kept; git calls such an entry racy."""

MOST_STATUSES = 256
"""Kept of one path: nodes with copies of their own see the same path with a status each."""

SAY_S = 10.0
"""How often hashing says how far it is."""

Say = Callable[[str], None]
"""Takes one line for people, such as a log."""

Entry = dict[str, Any]
"""A file's status and the `sha256` that it had with it."""


class DigestCache:
    """SHA-256 digests of files, kept in one JSON file, under a file's path and status (see `_status`).

    A path may have several statuses at a time, since nodes may have copies of their own under one path; the oldest make
    room. Safe for concurrent processes: a writer merges what others wrote meanwhile and replaces the file atomically.
    The cache only saves time: a file that is corrupt, unreadable or unwritable costs a hash computed again, never an
    error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, list[Entry]] | None = None

    def get(self, path: Path, status: os.stat_result) -> str | None:
        """The digest of the file at absolute `path` while its status is still `status`; None when unknown."""
        if self._entries is None:
            self._entries = self._read()
        for entry in self._entries.get(str(path), ()):
            if _is_of(entry, status):
                if "ctime_ns" not in entry:
                    self.put(path, status, entry["sha256"])
                return str(entry["sha256"])
        return None

    def put(self, path: Path, status: os.stat_result, sha256: str) -> None:
        """Keep a digest, for this process and, where the cache's folder can be written, for all."""
        entry = {**_status(status), "sha256": sha256}
        with contextlib.suppress(OSError, StorageUnavailableError):  # read-only or full: the next process hashes again
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            with contextlib.ExitStack() as held:
                # One writer at a time, so that no merge loses another's entry; without locks at worst a digest is lost.
                with contextlib.suppress(StorageUnavailableError):
                    held.enter_context(locked(self._path.with_name(f".{self._path.name}.lock")))
                self._entries = _with(self._read(), str(path), entry)
                record = {"version": 3, "files": self._entries, "files_sha256": _sha256_of(self._entries)}
                replace_file(self._path, json.dumps(record, indent=1, sort_keys=True).encode())
            return
        self._entries = _with(self._entries or {}, str(path), entry)

    def _read(self) -> dict[str, list[Entry]]:
        """What is in the file; nothing where it is missing, unreadable or not ours."""
        try:
            with open_file(self._path) as file:
                record = json.load(file)
            files = record["files"]
            # A damaged digest would be believed of weights; versions 1 and 2 had no hash, and were believed.
            if record.keys() - {"version", "files"} and record["files_sha256"] != _sha256_of(files):
                return {}
            # Version 1 had one entry a path, and no ctime.
            listed = {path: [found] if isinstance(found, dict) else found for path, found in files.items()}
            ours = {path: [e for e in found if _is_sha256(e.get("sha256"))] for path, found in listed.items()}
            return {path: found for path, found in ours.items() if found}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}


def known_sha256(path: Path, cache: DigestCache | None) -> str | None:
    """SHA-256 (hex) of a file's bytes where it takes no reading: by its blob's name, or from `cache`; else None.

    Raises MissingInputError when there is no such file.
    """
    with reading_errors(path):
        real = path.resolve(strict=True)  # a snapshot's links lead to one blob: hashed once for all revisions
        if (named := blob_sha256(path, real)) is not None:
            return named
        return None if cache is None else cache.get(real, real.stat())


def cached_sha256(path: Path, cache: DigestCache | None, *, read: Callable[[int], None] = lambda n_bytes: None) -> str:
    """SHA-256 (hex) of a file's bytes, read only where `known_sha256` does not know it; kept in `cache`.

    `read` is told of every piece that was read. Raises MissingInputError when the file cannot be read, InputError when
    it changes while it is being read.
    """
    return known_sha256(path, cache) or hashed_sha256(path, cache, read=read)


def hashed_sha256(path: Path, cache: DigestCache | None, *, read: Callable[[int], None] = lambda n_bytes: None) -> str:
    """`cached_sha256`, by reading the file whatever is known of it."""
    with reading_errors(path):
        real = path.resolve(strict=True)
        with open_file(real) as f:
            before = os.fstat(f.fileno())
            digest = hashlib.sha256()
            while chunk := f.read(CHUNK_BYTES):
                digest.update(chunk)
                read(len(chunk))
            after = os.fstat(f.fileno())
    if _status(before) != _status(after):
        raise InputError(f"{path} changed while it was being read: run again once nothing writes to it")
    changed_ns = max(after.st_mtime_ns, after.st_ctime_ns)
    if cache is not None and time.time_ns() - changed_ns > SETTLED_NS:
        cache.put(real, after, digest.hexdigest())
    return digest.hexdigest()


def remember_sha256(path: Path, cache: DigestCache, sha256: str) -> None:
    """Keep the digest of a file that was just read whole, unless it changed a moment ago."""
    with reading_errors(path):
        real = path.resolve(strict=True)
        status = real.stat()
    if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > SETTLED_NS:
        cache.put(real, status, sha256)


def blob_sha256(path: Path, real: Path) -> str | None:
    """The SHA-256 that a file of the Hugging Face cache is named after; None for any other file.

    There a snapshot's file is a link to `blobs/<etag>`, and the etag of a large file (Git LFS, Xet) is its SHA-256;
    that of a small one is git's own hash, of 40 digits. `real` is what `path` leads to.
    """
    in_the_cache = real != path and real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return real.name if in_the_cache and _is_sha256(real.name) else None


class HashingProgress:
    """Says every `SAY_S` seconds how much of several files has been read."""

    def __init__(self, files: Sequence[Path], say: Say, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`files`: those that will be read."""
        self._n_bytes = sum(path.stat().st_size for path in files)
        self._where = f"{len(files)} files of {files[0].parent}" if len(files) > 1 else str(files[0])
        self._done_bytes = 0
        self._say, self._clock = say, clock
        self._said_s = clock()
        say(f"hashing {self._where}: {_gb(self._n_bytes)}, once for as long as nothing changes")

    def read(self, n_bytes: int) -> None:
        self._done_bytes += n_bytes
        if self._clock() - self._said_s >= SAY_S:
            self._said_s = self._clock()
            self._say(f"hashing {self._where}: {_gb(self._done_bytes)} of {_gb(self._n_bytes)}")


def _with(entries: dict[str, list[Entry]], path: str, entry: Entry) -> dict[str, list[Entry]]:
    """The entries with one more, the newest of its path."""
    status = {name: value for name, value in entry.items() if name != "sha256"}
    others = [e for e in entries.get(path, ()) if any(e.get(name, value) != value for name, value in status.items())]
    return {**entries, path: [entry, *others][:MOST_STATUSES]}


def _status(status: os.stat_result) -> dict[str, int]:
    """What tells one state of a file from another. With the ctime, which no program sets: contents that changed under
    the old mtime are noticed. Without the device, whose number differs from node to node for one network mount."""
    return {
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _is_of(entry: Entry, status: os.stat_result) -> bool:
    """An entry of version 1, which has no ctime, is believed once more, and then kept with one."""
    return all(
        entry.get(name) == value for name, value in _status(status).items() if name in entry or name != "ctime_ns"
    )


def _sha256_of(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f} GB"
