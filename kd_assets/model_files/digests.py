"""SHA-256 of large files, kept under what the file system says of each file, so that 140 GB are hashed once.

Anyone may import it; standard library only.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd_assets.errors import InputError, MissingInputError

CHUNK_BYTES = 1 << 22

SETTLED_NS = 2_000_000_000
"""A file changed less than this ago may change again under the same time stamp (NFS and FAT keep whole seconds), so
its digest is not kept; git calls such an entry racy."""


class DigestCache:
    """SHA-256 digests of files, kept in one JSON file, under (path, size, mtime_ns, inode).

    Safe for concurrent processes: a writer merges what others wrote meanwhile and replaces the file atomically. The
    cache only saves time: a file that is corrupt, unreadable or unwritable costs a hash computed again, never an error.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digests: dict[str, dict[str, Any]] | None = None

    def get(self, path: Path, status: os.stat_result) -> str | None:
        """The digest of the file at absolute `path` while its status is still `status`; None when unknown."""
        if self._digests is None:
            self._digests = self._read()
        entry = self._digests.get(str(path))
        if entry is None or any(entry.get(name) != value for name, value in _key(status).items()):
            return None
        return str(entry["sha256"])

    def put(self, path: Path, status: os.stat_result, sha256: str) -> None:
        """Keep a digest, for this process and, where the cache's folder can be written, for all."""
        entry = {**_key(status), "sha256": sha256}
        with contextlib.suppress(OSError):  # a read-only folder or a full disk: the next process hashes again
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o750)
            with self._locked():
                self._digests = {**self._read(), str(path): entry}
                self._replace(self._digests)
            return
        self._digests = {**(self._digests or {}), str(path): entry}

    def _read(self) -> dict[str, dict[str, Any]]:
        """What is in the file; nothing where it is missing, unreadable or not ours."""
        try:
            files = json.loads(self._path.read_bytes())["files"]
            return {str(path): entry for path, entry in files.items() if _is_sha256(entry.get("sha256"))}
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return {}

    def _replace(self, digests: Mapping[str, Mapping[str, Any]]) -> None:
        fd, name = tempfile.mkstemp(dir=self._path.parent, prefix=f".{self._path.name}.")
        try:
            with os.fdopen(fd, "w") as f:
                json.dump({"version": 1, "files": digests}, f, indent=1, sort_keys=True)
            os.chmod(name, 0o640)
            os.replace(name, self._path)
        except BaseException:
            os.unlink(name)
            raise

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One writer at a time, so that no merge loses another's entry (where the file system has locks at all)."""
        fd = os.open(self._path.with_name(f".{self._path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            with contextlib.suppress(OSError):  # ENOLCK: some network file systems; at worst a digest is lost
                fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)


def cached_sha256(path: Path, cache: DigestCache | None) -> str:
    """SHA-256 (hex) of a file's bytes, from `cache` where the file is unchanged.

    Raises MissingInputError when the file cannot be read, InputError when it changes while it is being read.
    """
    try:
        real = path.resolve(strict=True)  # a snapshot's links lead to one blob: hashed once for all revisions
        with real.open("rb") as f:
            before = os.fstat(f.fileno())
            if not stat.S_ISREG(before.st_mode):
                raise MissingInputError(f"{path} is not a file")
            if cache is not None and (known := cache.get(real, before)) is not None:
                return known
            digest = hashlib.sha256()
            while chunk := f.read(CHUNK_BYTES):
                digest.update(chunk)
            after = os.fstat(f.fileno())
    except (OSError, RuntimeError) as e:  # RuntimeError: pathlib's word for a loop of symbolic links
        raise MissingInputError(f"{path} cannot be read: {os_reason(e)}") from e
    if _key(before) != _key(after):
        raise InputError(f"{path} changed while it was being read: run again once nothing writes to it")
    if cache is not None and time.time_ns() - after.st_mtime_ns > SETTLED_NS:
        cache.put(real, after, digest.hexdigest())
    return digest.hexdigest()


def _key(status: os.stat_result) -> dict[str, int]:
    return {"size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None


def os_reason(e: Exception) -> str:
    return (e.strerror if isinstance(e, OSError) else None) or str(e)
